//! [`UniformDecoder`]: a configuration whose layers are all alike, from its sizes.

use super::{AttentionConfig, Ffn, LayerConfig, Mixer, ModelConfig, Norm, NormPlace, QkNorm, Reach, Rope, Scales};

/// The sizes of a decoder of Llama's kind, all layers alike. What is not said is as in Llama.
#[derive(Clone, Debug, PartialEq)]
pub struct UniformDecoder<'a> {
    /// The family that reads and writes it.
    pub family: &'a str,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The longest sequence.
    pub max_positions: usize,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f64,
    /// Sliding window: a token sees `window` tokens, itself included.
    pub window: Option<usize>,
    /// Whether the output projection is the embedding.
    pub tie_embeddings: bool,
    /// The norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// The feed-forward part of every layer.
    pub ffn: Ffn,
}

impl Default for UniformDecoder<'_> {
    fn default() -> Self {
        Self {
            family: "llama",
            vocab_size: 32000,
            hidden: 64,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 16,
            max_positions: 2048,
            rope_theta: 1e4,
            rms_eps: 1e-5,
            window: None,
            tie_embeddings: false,
            qk_norm: QkNorm::None,
            qkv_bias: false,
            ffn: Ffn::dense(96),
        }
    }
}

impl UniformDecoder<'_> {
    /// The configuration.
    pub fn config(&self) -> ModelConfig {
        let attention = AttentionConfig {
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            reach: Reach::from(self.window),
            rope: Some(Rope::plain(self.rope_theta, self.head_dim)),
            scale: (self.head_dim as f64).powf(-0.5),
            qk_norm: self.qk_norm,
            qkv_bias: self.qkv_bias,
        };
        let layer = LayerConfig { mixer: Mixer::Attention(attention), ffn: self.ffn };
        ModelConfig {
            family: self.family.into(),
            vocab_size: self.vocab_size,
            hidden: self.hidden,
            layers: vec![layer; self.n_layers],
            max_positions: self.max_positions,
            norm: Norm::Rms { eps: self.rms_eps },
            norm_place: NormPlace::Before,
            scales: Scales::default(),
            routing: None,
            depths: None,
            tie_embeddings: self.tie_embeddings,
            router_aux_loss_coef: 0.0,
            bos_token: None,
            eos_tokens: Vec::new(),
        }
    }
}
