//! Contradictions in a configuration, by the key of Hugging Face's spelling.

use super::{AttentionConfig, DepthSampler, Ffn, LayerConfig, Mixer, ModelConfig, MoeFfn, Reach, Rope};

/// The largest size that any one dimension may ask for: far above published models, far below what overflows.
const LARGEST: usize = 1 << 24;
/// The most layers.
const MOST_LAYERS: usize = 1 << 14;
/// The most experts, over all layers: each is three tensors of a checkpoint.
const MOST_EXPERTS: usize = 1 << 20;
/// The most weights: sixteen times the largest published model's, times sixteen again.
const MOST_WEIGHTS: u128 = 1 << 48;

/// What is wrong: a key, and what was wanted and found.
type Wrong = (&'static str, String);

fn check_size(key: &'static str, size: usize) -> Result<(), Wrong> {
    if (1..=LARGEST).contains(&size) { Ok(()) } else { Err((key, format!("wanted 1 to {LARGEST}, found {size}"))) }
}

fn check_number(key: &'static str, least: f64, number: f64) -> Result<(), Wrong> {
    if number.is_finite() && number >= least {
        Ok(())
    } else {
        Err((key, format!("wanted a number of at least {least}, found {number}")))
    }
}

/// Looks at a number of layers before a list of so many is made.
pub(crate) fn check_layer_count(n_layers: usize) -> Result<(), Wrong> {
    if (1..=MOST_LAYERS).contains(&n_layers) {
        Ok(())
    } else {
        Err(("num_hidden_layers", format!("wanted 1 to {MOST_LAYERS}, found {n_layers}")))
    }
}

impl ModelConfig {
    /// Looks for contradictions.
    ///
    /// # Errors
    /// The key of Hugging Face's spelling that is wrong, and what was wanted and found.
    pub fn validate(&self) -> Result<(), Wrong> {
        check_layer_count(self.layers.len())?;
        for (key, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden),
            ("max_position_embeddings", self.max_positions),
        ] {
            check_size(key, size)?;
        }
        let mut before: Option<&LayerConfig> = None;
        for layer in &self.layers {
            // Most layers are as the one before.
            if before != Some(layer) {
                layer.validate(self.layers.len())?;
            }
            before = Some(layer);
        }
        if let Some(depths) = &self.depths {
            if !(depths.share > 0.0 && depths.share <= 1.0) || depths.every == 0 {
                let found = format!("found {} and {}", depths.share, depths.every);
                return Err(("depths", format!("wanted a share above 0 and at most 1, every so many layers, {found}")));
            }
            check_number("sampler_loss", 0.0, depths.sampler_loss)?;
            if let DepthSampler::Predictor { width } = depths.sampler {
                check_size("predictor_width", width)?;
            }
            let windowed = |layer: &LayerConfig| layer.mixer.attention().is_none_or(|a| a.reach.window().is_some());
            if self.layers.iter().enumerate().any(|(index, layer)| depths.applies(index) && windowed(layer)) {
                return Err(("depths", "wanted full attention in the layers that tokens go around".into()));
            }
        }
        if let Some(method) = &self.routing {
            let mut checked = None;
            for moe in self.layers.iter().filter_map(|layer| layer.ffn.moe()) {
                let layer = self.method_layer(moe);
                if checked != Some(layer) {
                    method.weights(&layer).map_err(|error| ("router", error.to_string()))?;
                    checked = Some(layer);
                }
            }
        }
        let weights = self.count_weights_of(self.layers.len());
        if weights > MOST_WEIGHTS {
            let message = format!("with the other sizes it asks for {weights} weights, wanted at most {MOST_WEIGHTS}");
            return Err(("hidden_size", message));
        }
        check_number("rms_norm_eps", 0.0, self.norm.eps())?;
        for (key, scale) in [
            ("embedding_multiplier", self.scales.embedding),
            ("residual_multiplier", self.scales.residual),
            ("logits_scaling", self.scales.logits),
        ] {
            if !scale.is_finite() {
                return Err((key, format!("wanted a number, found {scale}")));
            }
        }
        check_number("router_aux_loss_coef", 0.0, self.router_aux_loss_coef)?;
        for (key, tokens) in [("bos_token_id", self.bos_token.as_slice()), ("eos_token_id", &self.eos_tokens)] {
            if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.vocab_size) {
                let message = format!("wanted a token of the vocabulary of {}, found {token}", self.vocab_size);
                return Err((key, message));
            }
        }
        Ok(())
    }

    /// The weights of the matrices of the first `n_layers` layers, embedding and head.
    pub fn count_weights_of(&self, n_layers: usize) -> u128 {
        // At sizes up to the largest, a product needs more than 64 bits.
        let layers = self.layers.iter().take(n_layers);
        let rows: u128 = layers.map(|layer| layer.mixer.count_rows() + layer.ffn.count_rows()).sum();
        self.hidden as u128 * (2 * self.vocab_size as u128 + rows)
    }
}

impl LayerConfig {
    fn validate(&self, n_layers: usize) -> Result<(), Wrong> {
        match &self.mixer {
            Mixer::Attention(attention) => attention.validate()?,
        }
        check_size("intermediate_size", self.ffn.width())?;
        let Ffn::Moe(MoeFfn { n_experts, router, shared, .. }) = self.ffn else { return Ok(()) };
        let most = (1 << 16).min(MOST_EXPERTS / n_layers);
        if !(1..=most).contains(&n_experts) {
            return Err(("num_local_experts", format!("wanted 1 to {most}, found {n_experts}")));
        }
        if !(1..=n_experts).contains(&router.top_k) {
            let found = router.top_k;
            return Err(("num_experts_per_tok", format!("wanted 1 to the {n_experts} experts, found {found}")));
        }
        router.check(n_experts).map_err(|error| ("n_group", error.to_string()))?;
        shared.map_or(Ok(()), |shared| check_size("shared_expert_intermediate_size", shared.width))
    }
}

impl AttentionConfig {
    fn validate(&self) -> Result<(), Wrong> {
        for (key, size) in [
            ("num_attention_heads", self.n_heads),
            ("num_key_value_heads", self.n_kv_heads),
            ("head_dim", self.head_dim),
        ] {
            check_size(key, size)?;
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let (heads, kv) = (self.n_heads, self.n_kv_heads);
            return Err((
                "num_key_value_heads",
                format!("wanted a divisor of num_attention_heads {heads}, found {kv}"),
            ));
        }
        if self.reach == Reach::Window(0) {
            return Err(("sliding_window", "wanted at least 1, or null for none, found 0".into()));
        }
        if !self.scale.is_finite() {
            return Err(("attention_multiplier", format!("wanted a number, found {}", self.scale)));
        }
        self.rope.as_ref().map_or(Ok(()), |rope| rope.validate(self.head_dim))
    }
}

impl Rope {
    fn validate(&self, head_dim: usize) -> Result<(), Wrong> {
        if !self.dims.is_multiple_of(2) || !(1..=head_dim).contains(&self.dims) {
            let (key, dims) = if self.dims == head_dim {
                ("head_dim", String::new())
            } else {
                ("partial_rotary_factor", format!(" of at most {head_dim} rotated features"))
            };
            return Err((key, format!("wanted an even number{dims}, found {}", self.dims)));
        }
        check_number("rope_theta", 1.0, self.theta)
    }
}

impl Mixer {
    /// Rows of its matrices, each as wide as the residual stream.
    fn count_rows(&self) -> u128 {
        match self {
            Self::Attention(AttentionConfig { n_heads, n_kv_heads, head_dim, .. }) => {
                2 * (*n_heads as u128 + *n_kv_heads as u128) * *head_dim as u128
            }
        }
    }
}

impl Ffn {
    /// Rows of its matrices, each as wide as the residual stream.
    fn count_rows(&self) -> u128 {
        match *self {
            Self::Dense(dense) => 3 * dense.width as u128,
            Self::Moe(MoeFfn { n_experts, width, shared, .. }) => {
                let shared = shared.map_or(0, |shared| 3 * shared.width as u128 + 1);
                n_experts as u128 * (3 * width as u128 + 1) + shared
            }
        }
    }
}
