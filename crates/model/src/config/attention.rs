//! Token mixers: attention in its forms.

use super::{DeltaNet, HeadMixture, Mamba, Rope, ShortConvolution};

/// What carries numbers from token to token.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Softmax attention with grouped query heads.
    Attention(AttentionConfig),
    /// Multi-head latent attention.
    Latent(LatentConfig),
    /// Softmax attention whose query heads are experts.
    HeadMixture(HeadMixture),
    /// Linear attention by the gated delta rule.
    DeltaNet(DeltaNet),
    /// A gated convolution over a few tokens.
    ShortConvolution(ShortConvolution),
    /// A selective state space.
    Mamba(Mamba),
}

impl Mixer {
    /// The attention, if it is of this kind.
    pub fn attention(&self) -> Option<&AttentionConfig> {
        match self {
            Self::Attention(attention) => Some(attention),
            Self::Latent(_) | Self::HeadMixture(_) | Self::DeltaNet(_) | Self::ShortConvolution(_) | Self::Mamba(_) => {
                None
            }
        }
    }

    /// What a token sees.
    pub fn reach(&self) -> Reach {
        self.attention().map_or(Reach::All, |attention| attention.reach)
    }
}

/// Softmax attention with grouped query heads (Ainslie et al. 2023).
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head; even, for the rotation works on pairs.
    pub head_dim: usize,
    /// What a token sees.
    pub reach: Reach,
    /// How queries and keys turn with their position; none: not at all.
    pub rope: Option<Rope>,
    /// What the scores are multiplied with.
    pub scale: f64,
    /// The norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub o_bias: bool,
    /// What queries, keys and values are cut to either way, before they turn.
    pub clip: Option<f64>,
    /// Whether each query head has a score that takes part in the softmax and brings no value (gpt-oss).
    pub sinks: bool,
    /// Scores `s` become `cap · tanh(s / cap)`.
    pub soft_cap: Option<f64>,
    /// What queries are multiplied with, by their position.
    pub temperature: Option<Temperature>,
    /// Whether what a head has read is multiplied with the logistic function of a projection of the token, which is stored
    /// behind the head's query (Qwen3-Next).
    pub gated: bool,
}

/// Queries are multiplied with `1 + scale · ln(1 + ⌊(position + 1) / floor⌋)` (Nakanishi 2025, as Llama 4 does where
/// nothing turns).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    /// How fast they grow.
    pub scale: f64,
    /// Positions of a step.
    pub floor: f64,
}

/// Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1): keys and values of all heads are made
/// from one latent a token, which is all that the cache holds, beside one key part that turns.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentConfig {
    /// Heads.
    pub n_heads: usize,
    /// Width of the latent that queries are made from; none: from the residual stream.
    pub q_rank: Option<usize>,
    /// Width of the latent that keys and values are made from.
    pub kv_rank: usize,
    /// Features of a head's queries and keys that do not turn.
    pub nope_dim: usize,
    /// Features of a head's queries, and of the key that all heads share, that turn.
    pub rope_dim: usize,
    /// Features of a head's values.
    pub value_dim: usize,
    /// How they turn.
    pub rope: Rope,
    /// What the scores are multiplied with.
    pub scale: f64,
    /// Added to the mean square in the norms of the latents.
    pub eps: f64,
}

/// What a token sees of those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// All.
    #[default]
    All,
    /// The last so many, itself included.
    Window(usize),
    /// Those of its own chunk of so many.
    Chunk(usize),
}

impl Reach {
    /// The window, if it is one.
    pub fn window(self) -> Option<usize> {
        match self {
            Self::All | Self::Chunk(_) => None,
            Self::Window(window) => Some(window),
        }
    }
}

impl From<Option<usize>> for Reach {
    fn from(window: Option<usize>) -> Self {
        window.map_or(Self::All, Self::Window)
    }
}

/// RMSNorm of queries and keys: after their projection, before their rotation unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    #[default]
    None,
    /// Each head by itself, all with the same weights (Qwen3).
    Head,
    /// All heads together (OLMoE).
    Projection,
    /// As [`QkNorm::Head`], after the rotation (Hunyuan).
    HeadTurned,
    /// Each head by itself, after the rotation, without weights (Llama 4).
    UnitTurned,
}

impl QkNorm {
    /// The length of the weights, if there are any: the numbers that are normed together.
    pub fn width(self, n_heads: usize, head_dim: usize) -> Option<usize> {
        match self {
            Self::None | Self::UnitTurned => None,
            Self::Head | Self::HeadTurned => Some(head_dim),
            Self::Projection => Some(n_heads * head_dim),
        }
    }
}
