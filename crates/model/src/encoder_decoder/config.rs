//! [`EncoderDecoderConfig`]: what an encoder-decoder is made of, and Switch Transformers' spelling of it.

use crate::ModelError;
use crate::families::Keys;
use serde_json::{Value, json};

/// Sizes and constants of a T5 with Switch layers (Raffel et al. 2020; Fedus et al. 2021).
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderDecoderConfig {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Inner width of a network.
    pub width: usize,
    /// The encoder's layers.
    pub encoder: StackConfig,
    /// The decoder's layers.
    pub decoder: StackConfig,
    /// Networks of a Switch layer.
    pub n_experts: usize,
    /// Tokens of a sequence that one network takes; the others pass by.
    pub capacity: usize,
    /// Kinds of distance between query and key.
    pub buckets: usize,
    /// From this distance on all are of one kind.
    pub max_distance: usize,
    /// Added to the mean square in the norms.
    pub eps: f64,
    /// Whether the output projection is the embedding.
    pub tie_embeddings: bool,
    /// The token that the decoder begins with.
    pub start_token: u32,
    /// The tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

/// Layers and which of them have experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackConfig {
    /// Layers there are.
    pub n_layers: usize,
    /// Of every so many layers, the second has experts; of every one, each; none if 0.
    pub sparse_step: usize,
}

impl StackConfig {
    /// Whether a layer has experts.
    pub fn is_sparse(&self, layer: usize) -> bool {
        self.sparse_step == 1 || (self.sparse_step > 1 && layer % self.sparse_step == 1)
    }
}

/// The largest size of any one dimension, the most layers, the most experts.
const LARGEST: usize = 1 << 24;
const MOST_LAYERS: usize = 1 << 12;
const MOST_EXPERTS: usize = 1 << 16;
/// The most weights: more than the largest published model's sixteen times over.
const MOST_WEIGHTS: u128 = 1 << 46;

impl EncoderDecoderConfig {
    /// Reads a `config.json` of `switch_transformers`; `file` is its name for errors.
    ///
    /// # Errors
    /// Text that is no JSON object, another family, keys missing, of a wrong type, out of range, or that ask for arithmetic
    /// we lack.
    pub fn read(bytes: &[u8], file: &str) -> Result<Self, ModelError> {
        let value: Value =
            serde_json::from_slice(bytes).map_err(|error| ModelError::file(file, format!("wanted JSON: {error}")))?;
        let Value::Object(map) = value else {
            return Err(ModelError::file(file, "wanted a JSON object"));
        };
        let keys = Keys::new(file, &map);
        keys.only("model_type", json!(super::MODEL_TYPE))?;
        refuse_other_arithmetic(&keys)?;
        let n_layers = keys.size("num_layers")?;
        let decoder_layers = keys.optional_size("num_decoder_layers")?.unwrap_or(n_layers);
        let config = Self {
            vocab_size: keys.size("vocab_size")?,
            hidden: keys.size("d_model")?,
            n_heads: keys.size("num_heads")?,
            head_dim: keys.size("d_kv")?,
            width: keys.size("d_ff")?,
            encoder: StackConfig { n_layers, sparse_step: sparse_step(&keys, "encoder", n_layers)? },
            decoder: StackConfig {
                n_layers: decoder_layers,
                sparse_step: sparse_step(&keys, "decoder", decoder_layers)?,
            },
            n_experts: keys.size("num_experts")?,
            capacity: keys.size("expert_capacity")?,
            buckets: keys.optional_size("relative_attention_num_buckets")?.unwrap_or(32),
            max_distance: keys.optional_size("relative_attention_max_distance")?.unwrap_or(128),
            eps: keys.number("layer_norm_epsilon", 1e-6)?,
            tie_embeddings: keys.flag("tie_word_embeddings", true)?,
            start_token: keys.token_ids("decoder_start_token_id")?.first().copied().unwrap_or(0),
            eos_tokens: keys.token_ids("eos_token_id")?,
        };
        config.validate().map_err(|(key, message)| keys.error(key, message))?;
        Ok(config)
    }

    /// Looks for contradictions.
    ///
    /// # Errors
    /// The key of Hugging Face's spelling that is wrong, and what was wanted and found.
    pub fn validate(&self) -> Result<(), (&'static str, String)> {
        let sizes = [
            ("vocab_size", self.vocab_size, LARGEST),
            ("d_model", self.hidden, LARGEST),
            ("num_heads", self.n_heads, LARGEST),
            ("d_kv", self.head_dim, LARGEST),
            ("d_ff", self.width, LARGEST),
            ("num_layers", self.encoder.n_layers, MOST_LAYERS),
            ("num_decoder_layers", self.decoder.n_layers, MOST_LAYERS),
            ("num_experts", self.n_experts, MOST_EXPERTS),
            ("expert_capacity", self.capacity, usize::MAX),
            ("relative_attention_max_distance", self.max_distance, LARGEST),
        ];
        for (key, size, most) in sizes {
            if !(1..=most).contains(&size) {
                return Err((key, format!("wanted 1 to {most}, found {size}")));
            }
        }
        // Half of the kinds are exact distances, in the encoder of either side, so there must be one of each.
        if !(4..=MOST_EXPERTS).contains(&self.buckets) || self.max_distance <= self.buckets / 2 {
            let (buckets, distance) = (self.buckets, self.max_distance);
            let message = format!("wanted 4 to {MOST_EXPERTS}, half of them below {distance}, found {buckets}");
            return Err(("relative_attention_num_buckets", message));
        }
        if !(self.eps.is_finite() && self.eps >= 0.0) {
            return Err(("layer_norm_epsilon", format!("wanted a number of at least 0, found {}", self.eps)));
        }
        for (key, tokens) in [("decoder_start_token_id", &[self.start_token][..]), ("eos_token_id", &self.eos_tokens)] {
            if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.vocab_size) {
                let message = format!("wanted a token of the vocabulary of {}, found {token}", self.vocab_size);
                return Err((key, message));
            }
        }
        let weights = self.count_weights();
        if weights > MOST_WEIGHTS {
            let message = format!("with the other sizes it asks for {weights} weights, wanted at most {MOST_WEIGHTS}");
            return Err(("d_model", message));
        }
        Ok(())
    }

    /// The weights of all matrices.
    fn count_weights(&self) -> u128 {
        let wide = |size: usize| size as u128;
        let attention = 4 * wide(self.n_heads) * wide(self.head_dim);
        let stack = |stack: StackConfig, attentions: u128| -> u128 {
            let layer = |layer: usize| {
                let networks = if stack.is_sparse(layer) { wide(self.n_experts) } else { 1 };
                attentions * attention + networks * (2 * wide(self.width) + 1)
            };
            (0..stack.n_layers).map(layer).sum()
        };
        wide(self.hidden) * (2 * wide(self.vocab_size) + stack(self.encoder, 1) + stack(self.decoder, 2))
    }

    /// The kind of a distance from query to key (Raffel et al. 2020): near ones each have their own, farther ones share
    /// theirs by the logarithm. Looking both ways, half of the kinds are for what comes after.
    pub(crate) fn bucket(&self, distance: i64, both_ways: bool) -> usize {
        let kinds = if both_ways { self.buckets / 2 } else { self.buckets };
        let after = if both_ways && distance > 0 { kinds } else { 0 };
        let far = if both_ways { distance.unsigned_abs() } else { (-distance).max(0).unsigned_abs() } as usize;
        let exact = kinds / 2;
        if far < exact {
            return after + far;
        }
        // In f32 and rounded down, as the reference computes it.
        let steps = (far as f32 / exact as f32).ln() / (self.max_distance as f64 / exact as f64).ln() as f32;
        after + (exact + (steps * (kinds - exact) as f32) as usize).min(kinds - 1)
    }

    /// As `config.json`, with the dtype of the weights beside it.
    pub fn write(&self, dtype: &str) -> Value {
        let sparse = |stack: StackConfig| (0..stack.n_layers).filter(|&layer| stack.is_sparse(layer)).count();
        json!({
            "architectures": ["SwitchTransformersForConditionalGeneration"],
            "model_type": super::MODEL_TYPE,
            "torch_dtype": dtype,
            "is_encoder_decoder": true,
            "vocab_size": self.vocab_size,
            "d_model": self.hidden,
            "num_heads": self.n_heads,
            "d_kv": self.head_dim,
            "d_ff": self.width,
            "num_layers": self.encoder.n_layers,
            "num_decoder_layers": self.decoder.n_layers,
            "num_sparse_encoder_layers": sparse(self.encoder),
            "num_sparse_decoder_layers": sparse(self.decoder),
            "encoder_sparse_step": self.encoder.sparse_step,
            "decoder_sparse_step": self.decoder.sparse_step,
            "num_experts": self.n_experts,
            "expert_capacity": self.capacity,
            "relative_attention_num_buckets": self.buckets,
            "relative_attention_max_distance": self.max_distance,
            "layer_norm_epsilon": self.eps,
            "dense_act_fn": "relu",
            "router_bias": false,
            "router_dtype": "float32",
            "router_ignore_padding_tokens": false,
            "tie_word_embeddings": self.tie_embeddings,
            "decoder_start_token_id": self.start_token,
            "eos_token_id": self.eos_tokens.first(),
            "pad_token_id": 0,
        })
    }
}

fn refuse_other_arithmetic(keys: &Keys) -> Result<(), ModelError> {
    for key in ["dense_act_fn", "feed_forward_proj"] {
        keys.only(key, json!("relu"))?;
    }
    for key in ["router_bias", "router_ignore_padding_tokens", "is_gated_act", "add_router_probs"] {
        keys.only(key, json!(false))?;
    }
    keys.only("router_dtype", json!("float32"))?;
    keys.only("quantization_config", Value::Null)
}

/// Every how many layers of a stack there are experts: said, or by how many layers have them.
fn sparse_step(keys: &Keys, stack: &str, n_layers: usize) -> Result<usize, ModelError> {
    if let Some(step) = keys.optional_size(&format!("{stack}_sparse_step"))? {
        return Ok(step);
    }
    let sparse = keys.optional_size(&format!("num_sparse_{stack}_layers"))?.unwrap_or(3);
    // As transformers: without any, a step beyond the last layer.
    Ok(n_layers.checked_div(sparse).unwrap_or(n_layers))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(more: Value) -> Vec<u8> {
        let mut config = json!({
            "model_type": "switch_transformers", "vocab_size": 8, "d_model": 4, "num_heads": 2, "d_kv": 2, "d_ff": 3,
            "num_layers": 4, "num_experts": 2, "expert_capacity": 5, "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20, "encoder_sparse_step": 2, "decoder_sparse_step": 1,
        });
        let Value::Object(more) = more else { unreachable!() };
        config.as_object_mut().unwrap().extend(more);
        config.to_string().into_bytes()
    }

    #[test]
    fn what_is_written_is_read() {
        let config = EncoderDecoderConfig::read(&text(json!({})), "config.json").unwrap();
        assert_eq!((0..4).filter(|&layer| config.encoder.is_sparse(layer)).collect::<Vec<_>>(), [1, 3]);
        assert!((0..4).all(|layer| config.decoder.is_sparse(layer)));
        let written = config.write("float32").to_string();
        assert_eq!(EncoderDecoderConfig::read(written.as_bytes(), "again").unwrap(), config);
    }

    #[test]
    fn bad_configurations_are_named() {
        for (more, part) in [
            (json!({"d_model": 0}), "`d_model`: wanted 1 to"),
            (json!({"num_layers": 100_000}), "`num_layers`: wanted 1 to 4096"),
            (json!({"dense_act_fn": "gelu"}), "`dense_act_fn`: this family is computed for \"relu\" only"),
            (json!({"router_bias": true}), "`router_bias`"),
            (json!({"relative_attention_num_buckets": 2}), "`relative_attention_num_buckets`: wanted 4 to"),
            (json!({"relative_attention_max_distance": 3}), "half of them below 3"),
            (json!({"decoder_start_token_id": 8}), "`decoder_start_token_id`: wanted a token of the vocabulary of 8"),
            (json!({"model_type": "t5"}), "`model_type`"),
            (json!({"d_ff": 1 << 24, "d_model": 1 << 24, "num_experts": 1 << 16}), "weights, wanted at most"),
        ] {
            let error = EncoderDecoderConfig::read(&text(more), "config.json").unwrap_err().to_string();
            assert!(error.starts_with("config.json: ") && error.contains(part), "{error}");
        }
        assert!(EncoderDecoderConfig::read(b"[]", "x").unwrap_err().to_string().contains("wanted a JSON object"));
    }

    #[test]
    fn distances_on_paper() {
        let config = EncoderDecoderConfig::read(&text(json!({})), "config.json").unwrap();
        // Four exact ones behind, then by the logarithm up to 20.
        let behind: Vec<usize> = [0, -1, -2, -3, -4, -6, -9, -14, -100].map(|d| config.bucket(d, false)).into();
        assert_eq!(behind, [0, 1, 2, 3, 4, 5, 6, 7, 7]);
        assert_eq!(config.bucket(5, false), 0, "nobody sees what comes after");
        let both: Vec<usize> = [0, -1, -2, -30, 1, 2, 30].map(|d| config.bucket(d, true)).into();
        assert_eq!(both, [0, 1, 2, 3, 5, 6, 7]);
    }
}
