//! One file a command: each has `execute`, which takes the parsed arguments and gives the exit status.

pub mod bench;
pub mod check;
pub mod eval;
pub mod logits;
pub mod pack;
pub mod run;
pub mod train;

use moebius_kernels::gemm::Precision;

use crate::arguments::Dtype;

impl From<Dtype> for Precision {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}
