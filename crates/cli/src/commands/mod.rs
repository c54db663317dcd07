//! One file a command: each has `execute`, which takes the parsed arguments and gives the exit status.

pub mod bench;
pub mod chat;
pub mod check;
pub mod compare;
pub mod eval;
pub mod export;
pub mod info;
pub mod load;
pub mod logits;
pub mod pack;
pub mod run;
pub mod serve;
pub mod train;

use moebius_engine::{GenerationDefaults, GenerationOptions, SamplingOptions};
use moebius_kernels::gemm::Precision;

use crate::arguments::{Dtype, SamplingArguments};

impl SamplingArguments {
    /// Flags before the model's own advice before our defaults.
    pub fn options(&self, model: &GenerationDefaults) -> GenerationOptions {
        GenerationOptions {
            sampling: SamplingOptions {
                temperature: self.temperature.or(model.temperature).unwrap_or(0.8),
                top_k: self.top_k.or(model.top_k).unwrap_or(0),
                top_p: self.top_p.or(model.top_p).unwrap_or(0.95),
                min_p: self.min_p.or(model.min_p).unwrap_or(0.0),
                repetition_penalty: self.repetition_penalty.or(model.repetition_penalty).unwrap_or(1.0),
                seed: self.seed,
                ..SamplingOptions::greedy()
            },
            stop: self.stop.clone(),
            end_tokens: model.end_tokens.clone(),
            ..GenerationOptions::default()
        }
    }
}

impl From<Dtype> for Precision {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}
