//! What a model is run in: products, weights, keys and values.

use clap::{Args, ValueEnum};
use moebius_kernels::attention::CacheFormat;
use moebius_kernels::gemm::Precision;
use moebius_model::{Numerics, RunFormat};

/// What a model is run in.
#[derive(Debug, Args)]
pub struct RunPrecision {
    /// Precision of matrix products
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    pub dtype: Dtype,

    /// What the weights are held in while running: stored, f32, bf16, or a block format as q8_0, q4_k, q4_0, mxfp4. `stored`
    /// leaves block formats as they are and takes everything else in --dtype [default: stored; f32 with --dtype f32]
    #[arg(long, value_name = "FORMAT")]
    pub weights: Option<RunFormat>,

    /// What keys and values are held in [default: f32 with --dtype f32, else bf16]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub cache: Option<CacheType>,
}

impl RunPrecision {
    /// What is computed in.
    pub fn numerics(&self) -> Numerics {
        let usual = Numerics::from(Precision::from(self.dtype));
        Numerics { cache: self.cache.map_or(usual.cache, CacheFormat::from), ..usual }
    }
}

/// What keys and values are held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheType {
    /// 32 bits.
    F32,
    /// bfloat16.
    Bf16,
    /// 8 bits, with a scale for each head's key and value: half of bf16's memory, not quite the same answers.
    Q8,
}

impl From<CacheType> for CacheFormat {
    fn from(kind: CacheType) -> Self {
        match kind {
            CacheType::F32 => Self::F32,
            CacheType::Bf16 => Self::Bf16,
            CacheType::Q8 => Self::Q8,
        }
    }
}

impl Dtype {
    /// What weights are held in where nothing is asked for: `--dtype f32` is for comparing with references.
    pub fn weights(self) -> RunFormat {
        match self {
            Self::F32 => RunFormat::F32,
            Self::Bf16 => RunFormat::AsStored,
        }
    }
}

/// The precision of matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// Everything in 32 bits.
    F32,
    /// Operands of matrix products rounded to bfloat16, sums in 32 bits: faster.
    Bf16,
}
