//! The configuration of a file: its metadata as the `config.json` that the family would have written.

use super::architecture::{ARCHITECTURES, Architecture, Key};
use super::positions::read_positions;
use super::{GgufFile, Metadata};
use crate::{ModelConfig, ModelError, families};
use serde_json::{Map, Value, json};

/// What a key holds, and whether it must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each says its name")]
pub(super) enum Kind {
    Whole,
    OptionalWhole,
    Number,
    OptionalNumber,
    /// False if it is absent.
    Flag,
}

/// Keys that all architectures have, but those that say them otherwise.
pub(super) const KEYS: [Key; 8] = [
    ("context_length", "max_position_embeddings", Kind::Whole),
    ("embedding_length", "hidden_size", Kind::Whole),
    ("block_count", "num_hidden_layers", Kind::Whole),
    ("attention.head_count", "num_attention_heads", Kind::Whole),
    ("attention.head_count_kv", "num_key_value_heads", Kind::OptionalWhole),
    ("attention.key_length", "head_dim", Kind::OptionalWhole),
    ("attention.sliding_window", "sliding_window", Kind::OptionalWhole),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", Kind::Number),
];
/// Keys of arithmetic that only some architectures have, and the number with which they change nothing.
const FOREIGN_KEYS: [(&str, f32); 9] = [
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("embedding_scale", 1.0),
    ("attention.scale", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("router_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("expert_shared_count", 0.0),
];

/// A configuration on its way from a file.
pub(super) struct Reading<'f> {
    pub(super) file: &'f GgufFile<'f>,
    pub(super) metadata: Metadata<'f>,
    pub(super) architecture: &'static Architecture,
    /// `config.json` so far.
    pub(super) map: Map<String, Value>,
}

/// Reads the configuration of a file.
pub(super) fn read_config(file: &GgufFile) -> Result<(ModelConfig, &'static Architecture), ModelError> {
    let metadata = file.metadata();
    let name = metadata.text("general.architecture")?;
    let Some(architecture) = ARCHITECTURES.iter().find(|known| known.name == name) else {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|known| known.name).collect();
        let message = format!("architecture `{name}` is not known; known are {}", known.join(", "));
        return Err(metadata.error("general.architecture", message));
    };
    let mut reading = Reading { file, metadata, architecture, map: Map::new() };
    reading.begin()?;
    reading.read_keys()?;
    reading.refuse_other_arithmetic()?;
    reading.read_vocabulary()?;
    if reading.is_latent() {
        reading.read_latent()?
    } else {
        reading.read_heads()?
    }
    read_positions(&mut reading)?;
    (architecture.adjust)(&mut reading)?;
    let config = families::read_config(Value::Object(reading.map).to_string().as_bytes(), file.name())?;
    Ok((config, architecture))
}

/// The f64 whose decimal digits are the fewest that tell an f32 from its neighbours: 1e-5 as it was meant.
pub(super) fn decimal(number: f32) -> Value {
    let digits = number.to_string();
    json!(digits.parse::<f64>().unwrap_or(f64::NAN))
}

impl Reading<'_> {
    /// A key of this architecture.
    pub(super) fn key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.architecture.name)
    }

    /// What a key of `config.json` is if nothing has said it.
    pub(super) fn default(&mut self, key: &str, value: Value) {
        self.map.entry(key).or_insert(value);
    }

    /// Puts a value where the points of `path` lead.
    fn put(&mut self, path: &str, value: Value) {
        match path.split_once('.') {
            None => drop(self.map.insert(path.into(), value)),
            Some((object, key)) => {
                let object = self.map.entry(object).or_insert_with(|| json!({}));
                object[key] = value;
            }
        }
    }

    /// The family, and what its models always say.
    fn begin(&mut self) -> Result<(), ModelError> {
        let key = self.key("expert_count");
        let has_experts = self.metadata.optional_u32(&key)?.unwrap_or(0) > 0;
        let families = if has_experts { self.architecture.sparse } else { self.architecture.dense };
        let Some(family) = families.first() else {
            let wanted = if has_experts { "0" } else { "a number of experts" };
            return Err(self.metadata.error(&key, format!("wanted {wanted} for this architecture")));
        };
        let says = serde_json::from_str(self.architecture.says);
        self.map = says.expect("what an architecture says is a JSON object");
        self.map.insert("model_type".into(), json!(family));
        self.default("hidden_act", json!("silu"));
        for (flag, tensor) in self.architecture.flags {
            self.map.insert((*flag).into(), json!(self.file.get(tensor).is_some()));
        }
        Ok(())
    }

    fn read_keys(&mut self) -> Result<(), ModelError> {
        let is_dense = families::find(self.map["model_type"].as_str().unwrap_or_default())
            .is_some_and(|family| self.architecture.dense.contains(&family.name));
        let own = self.architecture.keys;
        let common = KEYS.iter().filter(|(suffix, ..)| {
            let is_norm =
                suffix.ends_with("norm_rms_epsilon") && self.architecture.knows("attention.layer_norm_epsilon");
            !self.architecture.knows(suffix) && !is_norm
        });
        // Models without experts need not say how many they have.
        let own = own.iter().filter(|(suffix, ..)| !(is_dense && suffix.starts_with("expert_")));
        for &(suffix, path, kind) in common.chain(own).filter(|(_, path, _)| !path.is_empty()) {
            let key = self.key(suffix);
            let metadata = &self.metadata;
            let value = match kind {
                Kind::Whole => Some(json!(metadata.u32(&key)?)),
                Kind::OptionalWhole => metadata.optional_u32(&key)?.map(|number| json!(number)),
                Kind::Number => Some(decimal(metadata.f32(&key)?)),
                Kind::OptionalNumber => metadata.optional_f32(&key)?.map(decimal),
                Kind::Flag => Some(json!(metadata.optional_flag(&key)?.unwrap_or(false))),
            };
            if let Some(value) = value {
                self.put(path, value);
            }
        }
        // No window, as some writers say it.
        if self.map.get("sliding_window") == Some(&json!(0)) {
            self.map.remove("sliding_window");
        }
        // Layers that only guess further tokens are counted, and left out here.
        let further = self.metadata.optional_u32(&self.key("nextn_predict_layers"))?.unwrap_or(0);
        if let Some(layers) = self.map.get("num_hidden_layers").and_then(Value::as_u64) {
            self.map.insert("num_hidden_layers".into(), json!(layers.saturating_sub(further.into())));
        }
        Ok(())
    }

    fn refuse_other_arithmetic(&self) -> Result<(), ModelError> {
        for (suffix, neutral) in FOREIGN_KEYS.into_iter().filter(|(suffix, _)| !self.architecture.knows(suffix)) {
            let key = self.key(suffix);
            if let Some(found) = self.metadata.optional_f32(&key)?.filter(|found| *found != neutral) {
                let message = format!("wanted {neutral}, which changes nothing, or no such key, found {found}");
                return Err(self.metadata.error(&key, message));
            }
        }
        Ok(())
    }

    /// The size of the vocabulary, whether the head is the embedding, and the tokens that begin and end a text.
    fn read_vocabulary(&mut self) -> Result<(), ModelError> {
        let Some(embedding) = self.file.get("token_embd.weight") else {
            return Err(ModelError::tensor(self.file.name(), "token_embd.weight", "missing"));
        };
        let is_tied = self.file.get("output.weight").is_none();
        self.map.insert("vocab_size".into(), json!(embedding.shape.first()));
        self.map.insert("tie_word_embeddings".into(), json!(is_tied));
        self.map.insert("bos_token_id".into(), json!(self.metadata.optional_u32("tokenizer.ggml.bos_token_id")?));
        let mut ends = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            ends.extend(self.metadata.optional_u32(key)?.filter(|end| !ends.contains(end)));
        }
        self.map.insert("eos_token_id".into(), json!(ends));
        Ok(())
    }

    fn size(&self, key: &str) -> usize {
        let size = self.map.get(key).and_then(Value::as_u64).and_then(|size| usize::try_from(size).ok());
        size.unwrap_or_default()
    }

    /// The width of a head.
    pub(super) fn head_dim(&self) -> usize {
        match self.map.get("head_dim") {
            Some(_) => self.size("head_dim"),
            // DBRX has names of its own.
            None => (self.size("hidden_size") + self.size("d_model"))
                .checked_div(self.size("num_attention_heads") + self.size("n_heads"))
                .unwrap_or_default(),
        }
    }

    /// Whether keys and values are made of a latent.
    pub(super) fn is_latent(&self) -> bool {
        self.architecture.name == "deepseek2"
    }

    fn read_heads(&mut self) -> Result<(), ModelError> {
        // What llama.cpp takes where the key is absent, which is not what the families take.
        if !self.map.contains_key("n_heads") {
            let heads = self.size("num_attention_heads");
            self.default("num_key_value_heads", json!(heads));
        }
        let (key, head_dim) = (self.key("attention.value_length"), self.head_dim());
        match self.metadata.optional_u32(&key)?.filter(|&found| found as usize != head_dim) {
            None => Ok(()),
            Some(found) => {
                Err(self.metadata.error(&key, format!("wanted the width of a head, {head_dim}, found {found}")))
            }
        }
    }

    /// The widths of latents and heads; in old files the heads' own widths stand where newer ones have those of the one
    /// head that they attend with.
    fn read_latent(&mut self) -> Result<(), ModelError> {
        let metadata = self.metadata;
        let whole = |suffix: &str| metadata.u32(&self.key(suffix));
        let is_split = metadata.has(&self.key("attention.key_length_mla"));
        let (keys, values) = match is_split {
            true => (whole("attention.key_length_mla")?, whole("attention.value_length_mla")?),
            false => (whole("attention.key_length")?, whole("attention.value_length")?),
        };
        let turning = whole("rope.dimension_count")?;
        let Some(still) = keys.checked_sub(turning) else {
            let message = format!("wanted at most the {keys} of a key, found {turning}");
            return Err(metadata.error(&self.key("rope.dimension_count"), message));
        };
        let kv_rank = whole("attention.kv_lora_rank")?;
        let q_rank = metadata.optional_u32(&self.key("attention.q_lora_rank"))?.filter(|&rank| rank > 0);
        for (key, size) in [
            ("qk_nope_head_dim", still),
            ("qk_rope_head_dim", turning),
            ("v_head_dim", values),
            ("kv_lora_rank", kv_rank),
        ] {
            self.map.insert(key.into(), json!(size));
        }
        self.map.insert("q_lora_rank".into(), json!(q_rank));
        self.map.remove("num_key_value_heads");
        self.map.remove("head_dim");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_32_bits_are_read_as_they_were_meant() {
        assert_eq!(decimal(1e-5f32), json!(1e-5));
        assert_eq!(decimal(500_000.0), json!(500_000.0));
    }
}
