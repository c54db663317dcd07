//! Arithmetic on slices: the only SIMD, the only thread-parallel loops. Knows no tensor, no model.

pub mod activation;
pub mod attention;
pub mod attention_biased;
pub mod formats;
pub mod gates;
pub mod gemm;
pub mod isa;
pub mod layer_norm;
pub mod loss;
pub mod machine;
pub mod memory;
pub mod momentum;
pub mod narrow;
pub mod norm;
pub mod optimizer;
pub mod orthogonal;
pub mod parallel;
pub mod pointwise;
pub mod quantised;
pub mod recurrent;
pub mod rope;
pub mod select;
mod simd;
mod tasks;
#[cfg(test)]
mod testing;
#[cfg(target_arch = "x86_64")]
mod tiles;
