//! [`ModelConfig`]: what a decoder is made of, whatever family it came from.

/// A decoder's shape and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family that reads and writes it: a name from [`crate::families::all`].
    pub family: String,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head; even, for the rotation works on pairs.
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
    /// The norm of queries and keys before their rotation.
    pub qk_norm: QkNorm,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// The feed-forward part of every layer.
    pub ffn: Ffn,
    /// Weight of the load-balancing loss in training.
    pub router_aux_loss_coef: f64,
    /// The token that begins a text, if any.
    pub bos_token: Option<u32>,
    /// The tokens that end a text.
    pub eos_tokens: Vec<u32>,
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

/// The feed-forward part of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ffn {
    /// One SwiGLU network.
    Dense {
        /// Its inner width.
        width: usize,
    },
    /// Several, of which a router chooses a few for each token.
    Moe {
        /// Networks there are.
        n_experts: usize,
        /// Networks a token is sent to.
        top_k: usize,
        /// Inner width of each.
        width: usize,
        /// Whether the weights of a token's experts are made to sum to one.
        renormalise: bool,
    },
}

/// The largest size that any one dimension may ask for: far above published models, far below what overflows.
const LARGEST: usize = 1 << 24;
/// The most experts, over all layers: each is three tensors of a checkpoint.
const MOST_EXPERTS: usize = 1 << 20;
/// The most weights: sixteen times the largest published model's, times sixteen again.
const MOST_WEIGHTS: u128 = 1 << 48;

impl ModelConfig {
    /// Looks for contradictions.
    ///
    /// # Errors
    /// The key of Hugging Face's spelling that is wrong, and what was wanted and found.
    pub fn validate(&self) -> Result<(), (&'static str, String)> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden),
            ("num_hidden_layers", self.n_layers),
            ("num_attention_heads", self.n_heads),
            ("num_key_value_heads", self.n_kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_positions),
            ("intermediate_size", self.ffn.width()),
        ];
        for (key, size) in sizes {
            if !(1..=LARGEST).contains(&size) {
                return Err((key, format!("wanted 1 to {LARGEST}, found {size}")));
            }
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let (heads, kv) = (self.n_heads, self.n_kv_heads);
            return Err((
                "num_key_value_heads",
                format!("wanted a divisor of num_attention_heads {heads}, found {kv}"),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(("head_dim", format!("wanted an even number, found {}", self.head_dim)));
        }
        if self.n_layers > 1 << 14 {
            return Err(("num_hidden_layers", format!("wanted 1 to {}, found {}", 1 << 14, self.n_layers)));
        }
        if let Ffn::Moe { n_experts, top_k, .. } = self.ffn {
            let most = (1 << 16).min(MOST_EXPERTS / self.n_layers);
            if !(1..=most).contains(&n_experts) {
                return Err(("num_local_experts", format!("wanted 1 to {most}, found {n_experts}")));
            }
            if !(1..=n_experts).contains(&top_k) {
                return Err(("num_experts_per_tok", format!("wanted 1 to the {n_experts} experts, found {top_k}")));
            }
        }
        let weights = self.count_weights();
        if weights > MOST_WEIGHTS {
            let message = format!("with the other sizes it asks for {weights} weights, wanted at most {MOST_WEIGHTS}");
            return Err(("hidden_size", message));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta >= 1.0) {
            return Err(("rope_theta", format!("wanted a number of at least 1, found {}", self.rope_theta)));
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return Err(("rms_norm_eps", format!("wanted a number of at least 0, found {}", self.rms_eps)));
        }
        if self.window == Some(0) {
            return Err(("sliding_window", "wanted at least 1, or null for none, found 0".into()));
        }
        if !(self.router_aux_loss_coef.is_finite() && self.router_aux_loss_coef >= 0.0) {
            let found = self.router_aux_loss_coef;
            return Err(("router_aux_loss_coef", format!("wanted a number of at least 0, found {found}")));
        }
        for (key, tokens) in [("bos_token_id", self.bos_token.as_slice()), ("eos_token_id", &self.eos_tokens)] {
            if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.vocab_size) {
                let message = format!("wanted a token of the vocabulary of {}, found {token}", self.vocab_size);
                return Err((key, message));
            }
        }
        Ok(())
    }

    /// The weights of all matrices, which at sizes up to [`LARGEST`] need more than 64 bits.
    fn count_weights(&self) -> u128 {
        let wide = |size: usize| size as u128;
        let heads = 2 * (wide(self.n_heads) + wide(self.n_kv_heads)) * wide(self.head_dim);
        let ffn = match self.ffn {
            Ffn::Dense { width } => 3 * wide(width),
            Ffn::Moe { n_experts, width, .. } => wide(n_experts) * (3 * wide(width) + 1),
        };
        wide(self.hidden) * (2 * wide(self.vocab_size) + wide(self.n_layers) * (heads + ffn))
    }
}

impl Ffn {
    /// The inner width of one network.
    pub fn width(&self) -> usize {
        match *self {
            Self::Dense { width } | Self::Moe { width, .. } => width,
        }
    }
}
