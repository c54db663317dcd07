//! Token mixers that carry a state, and attention heads as experts.

use super::Rope;
use super::validate::{Wrong, check_experts, check_size, check_taps};
use moebius_moe::RouterSettings;

/// Linear attention by the gated delta rule (Yang et al. 2024), behind a short convolution, as Qwen3-Next mixes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaNet {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Width of a key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Tokens that the convolution sees.
    pub taps: usize,
    /// How the projections are stored.
    pub projections: DeltaProjections,
}

/// How the projections of a [`DeltaNet`] are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaProjections {
    /// Two matrices: one with each key head's query, key, its values and their output gates, one with its betas and
    /// decays (Qwen3-Next).
    ByHead,
    /// Four: all queries, keys and values; output gates; betas; decays (Qwen3.5).
    ByKind,
}

impl DeltaNet {
    /// Numbers of all queries, keys and values of a token.
    pub fn mixed_width(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.value_width()
    }

    /// Numbers of all values of a token.
    pub fn value_width(&self) -> usize {
        self.value_heads * self.value_dim
    }
}

/// A convolution over a few tokens between two gates (Liquid AI 2025, "LFM2").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShortConvolution {
    /// Tokens that it sees.
    pub taps: usize,
    /// Whether its projections and the convolution have biases.
    pub bias: bool,
}

/// A selective state space (Gu and Dao 2023, "Mamba"), with the norms of Jamba (Lieber et al. 2024).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mamba {
    /// Channels.
    pub width: usize,
    /// Numbers of state of each channel.
    pub states: usize,
    /// Tokens that the convolution sees.
    pub taps: usize,
    /// Numbers from which the step sizes of all channels are made.
    pub rank: usize,
    /// Whether the convolution has a bias.
    pub convolution_bias: bool,
    /// Whether the projections in and out have biases.
    pub projection_bias: bool,
}

/// Attention whose query heads are experts (Shen et al. 2024, "JetMoE"): each chosen expert brings as many as there are key
/// heads.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadMixture {
    /// Experts there are.
    pub n_experts: usize,
    /// How experts are chosen and weighed.
    pub router: RouterSettings,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head; even, for the rotation works on pairs.
    pub head_dim: usize,
    /// How queries and keys turn with their position.
    pub rope: Option<Rope>,
    /// What the scores are multiplied with.
    pub scale: f64,
}

impl DeltaNet {
    pub(super) fn validate(&self) -> Result<(), Wrong> {
        for (key, size) in [
            ("linear_num_key_heads", self.key_heads),
            ("linear_num_value_heads", self.value_heads),
            ("linear_key_head_dim", self.key_dim),
            ("linear_value_head_dim", self.value_dim),
        ] {
            check_size(key, size)?;
        }
        if !self.value_heads.is_multiple_of(self.key_heads) {
            let (values, keys) = (self.value_heads, self.key_heads);
            let message = format!("wanted a multiple of linear_num_key_heads {keys}, found {values}");
            return Err(("linear_num_value_heads", message));
        }
        check_taps("linear_conv_kernel_dim", self.taps)
    }

    /// Rows of its matrices, each as wide as the residual stream.
    pub(super) fn count_rows(&self) -> u128 {
        let [keys, values] = [(self.key_heads, self.key_dim), (self.value_heads, self.value_dim)]
            .map(|(heads, dim)| heads as u128 * dim as u128);
        2 * keys + 3 * values + 2 * self.value_heads as u128
    }
}

impl ShortConvolution {
    pub(super) fn validate(&self) -> Result<(), Wrong> {
        check_taps("conv_L_cache", self.taps)
    }
}

impl Mamba {
    pub(super) fn validate(&self) -> Result<(), Wrong> {
        for (key, size) in [("mamba_expand", self.width), ("mamba_d_state", self.states), ("mamba_dt_rank", self.rank)]
        {
            check_size(key, size)?;
        }
        check_taps("mamba_d_conv", self.taps)
    }

    /// Rows of its matrices, each as wide as the residual stream: those inside are no larger than the channels' number of
    /// rows as wide as what they make.
    pub(super) fn count_rows(&self, hidden: usize) -> u128 {
        let inside = self.width as u128 * (2 * self.rank as u128 + 3 * self.states as u128);
        3 * self.width as u128 + inside.div_ceil(hidden.max(1) as u128)
    }
}

impl HeadMixture {
    pub(super) fn validate(&self) -> Result<(), Wrong> {
        for (key, size) in [("num_key_value_heads", self.n_kv_heads), ("kv_channels", self.head_dim)] {
            check_size(key, size)?;
        }
        check_experts(self.n_experts, &self.router, 1)?;
        if !self.scale.is_finite() {
            return Err(("kv_channels", format!("wanted a scale that is a number, found {}", self.scale)));
        }
        self.rope.as_ref().map_or(Ok(()), |rope| rope.validate(self.head_dim))
    }

    /// Rows of its matrices, each as wide as the residual stream.
    pub(super) fn count_rows(&self) -> u128 {
        let heads = self.n_kv_heads as u128 * self.head_dim as u128;
        2 * heads + self.n_experts as u128 * (2 * heads + 1)
    }
}
