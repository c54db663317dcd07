//! Arithmetic on slices: the only SIMD, the only thread-parallel loops. Knows no tensor, no model.

pub mod activation;
pub mod attention;
pub mod loss;
pub mod norm;
pub mod optimizer;
pub mod rope;
pub mod select;
