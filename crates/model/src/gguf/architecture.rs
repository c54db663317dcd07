//! What llama.cpp calls an architecture, as data: its keys beside those of `config.json`, its tensors beside those of
//! Hugging Face's checkpoints. The families read what comes out, so that what they refuse is refused here too.
//!
//! Sources: llama.cpp, `gguf-py/gguf/constants.py`, `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py`.

use super::GgufFile;
use crate::{ModelConfig, ModelError, families};
use serde_json::{Map, Value, json};

/// One architecture.
#[derive(Debug)]
pub(super) struct Architecture {
    /// Its name, with which its keys begin.
    pub(super) name: &'static str,
    /// The families of its models without experts; the first is taken when reading.
    dense: &'static [&'static str],
    /// The families of its models with experts.
    sparse: &'static [&'static str],
    /// Whether rows of queries and keys that are rotated together stand side by side (2i, 2i + 1), not half a head
    /// apart.
    interleaved: bool,
    /// Keys of `config.json` that its models with experts have beside [`KEYS`].
    sparse_keys: &'static [(&'static str, &'static str)],
    /// What `config.json` would say besides, for models with experts.
    renormalise: Option<bool>,
}

static ARCHITECTURES: [Architecture; 5] = [
    Architecture {
        name: "llama",
        dense: &["llama", "mistral"],
        sparse: &["mixtral"],
        interleaved: true,
        sparse_keys: &[("expert_count", "num_local_experts"), ("feed_forward_length", "intermediate_size")],
        renormalise: None,
    },
    Architecture {
        name: "qwen2",
        dense: &["qwen2"],
        sparse: &[],
        interleaved: false,
        sparse_keys: &[],
        renormalise: None,
    },
    Architecture {
        name: "qwen3",
        dense: &["qwen3"],
        sparse: &[],
        interleaved: false,
        sparse_keys: &[],
        renormalise: None,
    },
    Architecture {
        name: "qwen3moe",
        dense: &[],
        sparse: &["qwen3_moe"],
        interleaved: false,
        sparse_keys: &[
            ("expert_count", "num_experts"),
            ("expert_feed_forward_length", "moe_intermediate_size"),
            ("feed_forward_length", "intermediate_size"),
        ],
        renormalise: Some(true),
    },
    Architecture {
        name: "olmoe",
        dense: &[],
        sparse: &["olmoe"],
        interleaved: false,
        sparse_keys: &[("expert_count", "num_experts"), ("feed_forward_length", "intermediate_size")],
        renormalise: Some(false),
    },
];

/// Whether a key is a whole number, and must be there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyKind {
    Whole,
    OptionalWhole,
    Number,
    OptionalNumber,
}

/// Keys behind the architecture's name, and those of `config.json`.
const KEYS: [(&str, &str, KeyKind); 9] = [
    ("context_length", "max_position_embeddings", KeyKind::Whole),
    ("embedding_length", "hidden_size", KeyKind::Whole),
    ("block_count", "num_hidden_layers", KeyKind::Whole),
    ("attention.head_count", "num_attention_heads", KeyKind::Whole),
    ("attention.head_count_kv", "num_key_value_heads", KeyKind::OptionalWhole),
    ("attention.key_length", "head_dim", KeyKind::OptionalWhole),
    ("attention.sliding_window", "sliding_window", KeyKind::OptionalWhole),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", KeyKind::Number),
    ("rope.freq_base", "rope_theta", KeyKind::OptionalNumber),
];
const EXPERTS_USED: (&str, &str) = ("expert_used_count", "num_experts_per_tok");
const DENSE_KEYS: [(&str, &str); 1] = [("feed_forward_length", "intermediate_size")];
/// Keys of arithmetic that no family here has, and the number with which they change nothing.
const FOREIGN_KEYS: [(&str, f32); 9] = [
    ("rope.scaling.factor", 1.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("embedding_scale", 1.0),
    ("attention.scale", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("expert_shared_count", 0.0),
];

/// What a layer's tensors are called: behind `model.layers.N.` without their ending, and behind `blk.N.`.
const LAYER_TENSORS: [(&str, &str); 13] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
    ("mlp.gate", "ffn_gate_inp"),
];
/// What an expert's tensors are called, behind `experts.N.`; those of all experts of a layer are one tensor.
const EXPERT_TENSORS: [(&str, &str); 6] = [
    ("w1", "ffn_gate_exps"),
    ("w3", "ffn_up_exps"),
    ("w2", "ffn_down_exps"),
    ("gate_proj", "ffn_gate_exps"),
    ("up_proj", "ffn_up_exps"),
    ("down_proj", "ffn_down_exps"),
];

/// Where a tensor of Hugging Face's naming stands in a GGUF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The tensor there.
    pub(super) name: String,
    /// Which of the equal parts of it, if it holds several experts.
    pub(super) part: Option<usize>,
    /// Whether its rows are those of heads whose halves are interleaved.
    pub(super) interleaved: bool,
}

impl Architecture {
    /// The architecture in which a family's models are written.
    pub(super) fn of_family(family: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().find(|known| known.dense.contains(&family) || known.sparse.contains(&family))
    }

    /// The keys of its models: behind its name, and in `config.json`.
    pub(super) fn keys(
        &self,
        has_experts: bool,
    ) -> impl Iterator<Item = (&'static str, &'static str, KeyKind)> + use<> {
        let (counts, used) = if has_experts { (self.sparse_keys, Some(EXPERTS_USED)) } else { (&DENSE_KEYS[..], None) };
        let whole = counts.iter().copied().chain(used).map(|(key, theirs)| (key, theirs, KeyKind::Whole));
        KEYS.into_iter().chain(whole)
    }

    /// Where a tensor stands, by Hugging Face's name; none if the architecture has no such.
    pub(super) fn place(&self, name: &str) -> Option<Place> {
        let (stem, ending) = name.rsplit_once('.')?;
        let whole = |name: String| Some(Place { name, part: None, interleaved: false });
        match stem {
            "model.embed_tokens" => return whole(format!("token_embd.{ending}")),
            "model.norm" => return whole(format!("output_norm.{ending}")),
            "lm_head" => return whole(format!("output.{ending}")),
            _ => {}
        }
        let (layer, rest) = stem.strip_prefix("model.layers.")?.split_once('.')?;
        if let Some((_, expert)) = rest.split_once(".experts.") {
            let (expert, matrix) = expert.split_once('.')?;
            let (_, theirs) = EXPERT_TENSORS.iter().find(|(ours, _)| *ours == matrix)?;
            let part = Some(expert.parse().ok()?);
            return Some(Place { name: format!("blk.{layer}.{theirs}.{ending}"), part, interleaved: false });
        }
        let (_, theirs) = LAYER_TENSORS.iter().find(|(ours, _)| *ours == rest)?;
        let interleaved = self.interleaved && matches!(*theirs, "attn_q" | "attn_k");
        Some(Place { name: format!("blk.{layer}.{theirs}.{ending}"), part: None, interleaved })
    }
}

/// The row of a head with its halves apart that stands at row `row` when they are interleaved; rows of all heads are
/// counted through.
pub(super) fn row_of_halves(row: usize, head_dim: usize) -> usize {
    let (head, inner) = (row / head_dim, row % head_dim);
    head * head_dim + inner % 2 * (head_dim / 2) + inner / 2
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
    let key = |suffix: &str| format!("{name}.{suffix}");
    let has_experts = metadata.optional_u32(&key("expert_count"))?.unwrap_or(0) > 0;
    let kinds = if has_experts { architecture.sparse } else { architecture.dense };
    let Some(family) = kinds.first() else {
        let wanted = if has_experts { "0" } else { "a number of experts" };
        return Err(metadata.error(&key("expert_count"), format!("wanted {wanted} for this architecture")));
    };
    let mut map = Map::new();
    map.insert("model_type".into(), json!(family));
    map.insert("hidden_act".into(), json!("silu"));
    for (suffix, theirs, kind) in architecture.keys(has_experts) {
        let key = key(suffix);
        let value = match kind {
            KeyKind::Whole => Some(json!(metadata.u32(&key)?)),
            KeyKind::OptionalWhole => metadata.optional_u32(&key)?.map(|number| json!(number)),
            KeyKind::Number => Some(decimal(metadata.f32(&key)?)),
            KeyKind::OptionalNumber => metadata.optional_f32(&key)?.map(decimal),
        };
        map.extend(value.map(|value| (theirs.to_string(), value)));
    }
    if let Some(renormalise) = architecture.renormalise.filter(|_| has_experts) {
        map.insert("norm_topk_prob".into(), json!(renormalise));
    }
    // What llama.cpp takes where the keys are absent, which is not what the families take.
    let heads = map["num_attention_heads"].as_u64().unwrap_or_default();
    map.entry("num_key_value_heads").or_insert(json!(heads));
    map.entry("rope_theta").or_insert(json!(10_000.0));
    refuse_other_arithmetic(file, name, &map)?;
    read_vocabulary(file, &mut map)?;
    let config = families::read_config(Value::Object(map).to_string().as_bytes(), file.name())?;
    Ok((config, architecture))
}

/// The f64 whose decimal digits are the fewest that tell an f32 from its neighbours: 1e-5 as it was meant.
fn decimal(number: f32) -> Value {
    let digits = number.to_string();
    json!(digits.parse::<f64>().unwrap_or(f64::NAN))
}

fn refuse_other_arithmetic(file: &GgufFile, name: &str, map: &Map<String, Value>) -> Result<(), ModelError> {
    let metadata = file.metadata();
    let key = |suffix: &str| format!("{name}.{suffix}");
    if let Some(kind) = metadata.optional_text(&key("rope.scaling.type"))?.filter(|kind| *kind != "none") {
        let message = format!("wanted positions that are not scaled, found `{kind}`");
        return Err(metadata.error(&key("rope.scaling.type"), message));
    }
    for (suffix, neutral) in FOREIGN_KEYS {
        if let Some(found) = metadata.optional_f32(&key(suffix))?.filter(|found| *found != neutral) {
            let message = format!("wanted {neutral}, which changes nothing, or no such key, found {found}");
            return Err(metadata.error(&key(suffix), message));
        }
    }
    let size = |key: &str| map.get(key).and_then(Value::as_u64).unwrap_or_default();
    let head_dim = match map.get("head_dim") {
        Some(head_dim) => head_dim.as_u64().unwrap_or_default(),
        None => size("hidden_size").checked_div(size("num_attention_heads")).unwrap_or_default(),
    };
    for suffix in ["attention.value_length", "rope.dimension_count"] {
        if let Some(found) = metadata.optional_u32(&key(suffix))?.filter(|&found| u64::from(found) != head_dim) {
            let message = format!("wanted the width of a head, {head_dim}, found {found}");
            return Err(metadata.error(&key(suffix), message));
        }
    }
    Ok(())
}

/// The size of the vocabulary, whether the head is the embedding, and the tokens that begin and end a text.
fn read_vocabulary(file: &GgufFile, map: &mut Map<String, Value>) -> Result<(), ModelError> {
    let metadata = file.metadata();
    let Some(embedding) = file.get("token_embd.weight") else {
        return Err(ModelError::tensor(file.name(), "token_embd.weight", "missing"));
    };
    map.insert("vocab_size".into(), json!(embedding.shape.first()));
    map.insert("tie_word_embeddings".into(), json!(file.get("output.weight").is_none()));
    map.insert("bos_token_id".into(), json!(metadata.optional_u32("tokenizer.ggml.bos_token_id")?));
    let mut ends = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        ends.extend(metadata.optional_u32(key)?.filter(|end| !ends.contains(end)));
    }
    map.insert("eos_token_id".into(), json!(ends));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_have_their_places() {
        let llama = Architecture::of_family("mixtral").unwrap();
        let place = |name: &str| llama.place(name).map(|place| (place.name, place.part, place.interleaved));
        assert_eq!(place("lm_head.weight"), Some(("output.weight".into(), None, false)));
        let query = place("model.layers.12.self_attn.q_proj.weight");
        assert_eq!(query, Some(("blk.12.attn_q.weight".into(), None, true)));
        let expert = place("model.layers.3.block_sparse_moe.experts.7.w2.weight");
        assert_eq!(expert, Some(("blk.3.ffn_down_exps.weight".into(), Some(7), false)));
        assert_eq!(place("model.layers.3.self_attn.rotary.weight"), None);
        let qwen = Architecture::of_family("qwen2").unwrap();
        assert!(!qwen.place("model.layers.0.self_attn.q_proj.bias").unwrap().interleaved);
    }

    #[test]
    fn interleaved_rows_are_those_of_the_converter() {
        // convert_hf_to_gguf.py: reshape(heads, 2, half, cols).swapaxes(1, 2), two heads of six rows.
        let rows: Vec<usize> = (0..12).map(|row| row_of_halves(row, 6)).collect();
        assert_eq!(rows, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
    }

    #[test]
    fn numbers_of_32_bits_are_read_as_they_were_meant() {
        assert_eq!(decimal(1e-5f32), json!(1e-5));
        assert_eq!(decimal(500_000.0), json!(500_000.0));
    }
}
