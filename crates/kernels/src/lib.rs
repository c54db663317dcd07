//! Arithmetic on slices: the only SIMD, the only thread-parallel loops. Knows no tensor, no model.

pub mod activation;
pub mod attention;
pub mod formats;
pub mod gemm;
pub mod isa;
pub mod loss;
pub mod machine;
pub mod memory;
pub mod momentum;
pub mod norm;
pub mod optimizer;
pub mod orthogonal;
pub mod parallel;
pub mod quantised;
pub mod rope;
pub mod select;
mod simd;
mod tasks;
#[cfg(test)]
mod testing;
#[cfg(target_arch = "x86_64")]
mod tiles;
