//! Token mixers: attention in its forms.

use super::{DeltaNet, HeadMixture, Mamba, Rope, ShortConvolution};

/// What carries numbers from token to token.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Softmax attention with grouped query heads.
    Attention(AttentionConfig),
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
            Self::HeadMixture(_) | Self::DeltaNet(_) | Self::ShortConvolution(_) | Self::Mamba(_) => None,
        }
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
    /// Whether what a head has read is multiplied with the logistic function of a projection of the token, which is stored
    /// behind the head's query (Qwen3-Next).
    pub gated: bool,
}

/// What a token sees of those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// All.
    #[default]
    All,
    /// The last so many, itself included.
    Window(usize),
}

impl Reach {
    /// The window, if it is one.
    pub fn window(self) -> Option<usize> {
        match self {
            Self::All => None,
            Self::Window(window) => Some(window),
        }
    }
}

impl From<Option<usize>> for Reach {
    fn from(window: Option<usize>) -> Self {
        window.map_or(Self::All, Self::Window)
    }
}

/// RMSNorm of queries and keys, between their projection and their rotation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    #[default]
    None,
    /// Each head by itself, all with the same weights (Qwen3).
    Head,
    /// All heads together (OLMoE).
    Projection,
}

impl QkNorm {
    /// The numbers that are normed together, which is the length of the weights.
    pub fn width(self, n_heads: usize, head_dim: usize) -> Option<usize> {
        match self {
            Self::None => None,
            Self::Head => Some(head_dim),
            Self::Projection => Some(n_heads * head_dim),
        }
    }
}
