//! What llama.cpp calls an architecture, as data: its keys beside those of `config.json`, and how its tensors differ from
//! those of its relatives. The families read what comes out, so that what they refuse is refused here too.
//!
//! Sources: llama.cpp, `gguf-py/gguf/constants.py`, `gguf-py/gguf/tensor_mapping.py`, `conversion/` and `src/models/`.

use super::config::Kind::{self, Flag, Number, OptionalNumber, OptionalWhole, Whole};
use super::config::Reading;
use crate::ModelError;
use serde_json::json;

/// One architecture.
#[derive(Debug)]
pub(super) struct Architecture {
    /// Its name, with which its keys begin.
    pub(super) name: &'static str,
    /// The families of its models without experts; the first is taken when reading.
    pub(super) dense: &'static [&'static str],
    /// The families of its models with experts; the first is taken, or what `adjust` says.
    pub(super) sparse: &'static [&'static str],
    /// Whether features that turn together stand side by side (2i, 2i + 1), not half a head apart.
    pub(super) interleaved: bool,
    /// Keys of `config.json` by those of the file, behind the architecture's name.
    pub(super) keys: &'static [Key],
    /// What `config.json` would say besides, as JSON.
    pub(super) says: &'static str,
    /// Flags of `config.json` that are true if a tensor is there.
    pub(super) flags: &'static [(&'static str, &'static str)],
    /// What `config.json` would say besides of positions that YaRN stretches, as JSON.
    pub(super) yarn: &'static str,
    /// What its norms are called: before and after the mixer, before and after the feed-forward part.
    pub(super) norms: [&'static str; 4],
    /// Whether queries, keys and values are one tensor.
    pub(super) joined: bool,
    /// Whether logits are multiplied with `logit_scale`; others that have it divide by it.
    pub(super) multiplies_logits: bool,
    /// What no table says.
    pub(super) adjust: fn(&mut Reading) -> Result<(), ModelError>,
}

/// Behind the architecture's name, in `config.json` (with points where objects are inside each other), and its kind.
pub(super) type Key = (&'static str, &'static str, Kind);

const NORMS: [&str; 4] = ["attn_norm", "", "ffn_norm", ""];
const NORMS_POST: [&str; 4] = ["attn_norm", "", "post_attention_norm", ""];

/// The fields that most have.
const PLAIN: Architecture = Architecture {
    name: "",
    dense: &[],
    sparse: &[],
    interleaved: false,
    keys: &[],
    says: "{}",
    flags: &[],
    yarn: "{}",
    norms: NORMS,
    joined: false,
    multiplies_logits: false,
    adjust: |_| Ok(()),
};

const WIDTH: Key = ("feed_forward_length", "intermediate_size", Whole);
const USED: Key = ("expert_used_count", "num_experts_per_tok", Whole);
const EXPERT_WIDTH: Key = ("expert_feed_forward_length", "moe_intermediate_size", Whole);
/// Experts of Mixtral's kind.
const LOCAL: [Key; 2] = [("expert_count", "num_local_experts", Whole), USED];
/// Experts of DeepSeek-V3's kind.
const DEEPSEEK: [Key; 11] = [
    WIDTH,
    USED,
    EXPERT_WIDTH,
    ("expert_count", "n_routed_experts", Whole),
    ("expert_shared_count", "n_shared_experts", OptionalWhole),
    ("expert_weights_scale", "routed_scaling_factor", OptionalNumber),
    ("expert_weights_norm", "norm_topk_prob", Flag),
    ("expert_gating_func", "", OptionalWhole),
    ("expert_group_count", "n_group", OptionalWhole),
    ("expert_group_used_count", "topk_group", OptionalWhole),
    ("leading_dense_block_count", "first_k_dense_replace", OptionalWhole),
];

/// All architectures.
pub(super) static ARCHITECTURES: [Architecture; 18] = [
    Architecture {
        name: "llama",
        dense: &["llama", "mistral"],
        sparse: &["mixtral"],
        interleaved: true,
        keys: &[LOCAL[0], LOCAL[1], WIDTH],
        ..PLAIN
    },
    Architecture { name: "qwen2", dense: &["qwen2"], keys: &[WIDTH], ..PLAIN },
    Architecture { name: "qwen3", dense: &["qwen3"], keys: &[WIDTH], ..PLAIN },
    Architecture {
        name: "qwen2moe",
        sparse: &["qwen2_moe"],
        keys: &[
            ("expert_count", "num_experts", Whole),
            USED,
            EXPERT_WIDTH,
            ("expert_shared_feed_forward_length", "shared_expert_intermediate_size", Whole),
        ],
        says: r#"{"norm_topk_prob": false}"#,
        flags: &[("qkv_bias", "blk.0.attn_q.bias")],
        ..PLAIN
    },
    Architecture {
        name: "qwen3moe",
        sparse: &["qwen3_moe"],
        keys: &[("expert_count", "num_experts", Whole), USED, EXPERT_WIDTH, WIDTH],
        says: r#"{"norm_topk_prob": true}"#,
        ..PLAIN
    },
    Architecture {
        name: "olmoe",
        sparse: &["olmoe"],
        keys: &[("expert_count", "num_experts", Whole), USED, WIDTH],
        says: r#"{"norm_topk_prob": false}"#,
        ..PLAIN
    },
    Architecture {
        name: "deepseek2",
        sparse: &["deepseek_v2", "deepseek_v3", "glm4_moe_lite"],
        interleaved: true,
        keys: &DEEPSEEK,
        adjust: adjust_deepseek2,
        ..PLAIN
    },
    Architecture {
        name: "glm4moe",
        sparse: &["glm4_moe"],
        keys: &DEEPSEEK,
        flags: &[("attention_bias", "blk.0.attn_q.bias"), ("use_qk_norm", "blk.0.attn_q_norm.weight")],
        norms: NORMS_POST,
        adjust: |reading| adjust_sigmoid(reading, true),
        ..PLAIN
    },
    Architecture {
        name: "dots1",
        sparse: &["dots1"],
        keys: &DEEPSEEK,
        says: r#"{"sliding_window": null}"#,
        adjust: |reading| adjust_sigmoid(reading, false),
        ..PLAIN
    },
    Architecture {
        name: "ernie4_5-moe",
        sparse: &["ernie4_5_moe"],
        interleaved: true,
        keys: &[
            WIDTH,
            EXPERT_WIDTH,
            ("expert_count", "moe_num_experts", Whole),
            ("expert_used_count", "moe_k", Whole),
            ("expert_shared_count", "moe_num_shared_experts", Whole),
            ("expert_shared_feed_forward_length", "", OptionalWhole),
            ("leading_dense_block_count", "moe_layer_start_index", Whole),
            ("interleave_moe_layer_step", "moe_layer_interval", Whole),
        ],
        says: r#"{"moe_layer_end_index": -1}"#,
        ..PLAIN
    },
    Architecture {
        name: "hunyuan-moe",
        sparse: &["hunyuan_v1_moe"],
        keys: &[
            EXPERT_WIDTH,
            ("expert_count", "num_experts", Whole),
            ("expert_used_count", "moe_topk", Whole),
            ("expert_shared_count", "num_shared_expert", OptionalWhole),
            ("expert_shared_feed_forward_length", "intermediate_size", Whole),
        ],
        ..PLAIN
    },
    Architecture {
        name: "minimax-m2",
        sparse: &["minimax_m2"],
        keys: &[
            LOCAL[0],
            LOCAL[1],
            ("expert_feed_forward_length", "intermediate_size", Whole),
            ("expert_gating_func", "", OptionalWhole),
        ],
        adjust: |reading| adjust_sigmoid(reading, false),
        ..PLAIN
    },
    Architecture {
        name: "granitemoe",
        sparse: &["granitemoe", "granitemoeshared"],
        interleaved: true,
        keys: &[
            LOCAL[0],
            LOCAL[1],
            WIDTH,
            ("expert_shared_feed_forward_length", "shared_intermediate_size", OptionalWhole),
            ("embedding_scale", "embedding_multiplier", OptionalNumber),
            ("residual_scale", "residual_multiplier", OptionalNumber),
            ("logit_scale", "logits_scaling", Number),
            ("attention.scale", "attention_multiplier", OptionalNumber),
        ],
        adjust: adjust_granite,
        ..PLAIN
    },
    Architecture {
        name: "phimoe",
        sparse: &["phimoe"],
        keys: &[LOCAL[0], LOCAL[1], WIDTH],
        flags: &[("attention_bias", "blk.0.attn_q.bias"), ("lm_head_bias", "output.bias")],
        ..PLAIN
    },
    Architecture {
        name: "dbrx",
        sparse: &["dbrx"],
        keys: &[
            ("context_length", "max_seq_len", Whole),
            ("embedding_length", "d_model", Whole),
            ("block_count", "n_layers", Whole),
            ("attention.head_count", "n_heads", Whole),
            ("attention.head_count_kv", "attn_config.kv_n_heads", Whole),
            ("attention.clamp_kqv", "attn_config.clip_qkv", Number),
            ("feed_forward_length", "ffn_config.ffn_hidden_size", Whole),
            ("expert_count", "ffn_config.moe_num_experts", Whole),
            ("expert_used_count", "ffn_config.moe_top_k", Whole),
            ("attention.layer_norm_epsilon", "", Number),
        ],
        says: r#"{"ffn_config": {"moe_normalize_expert_weights": 1.0}}"#,
        norms: ["attn_norm", "", "attn_output_norm", ""],
        joined: true,
        adjust: check_dbrx,
        ..PLAIN
    },
    Architecture {
        name: "llama4",
        sparse: &["llama4_text"],
        interleaved: true,
        keys: &[
            LOCAL[0],
            LOCAL[1],
            ("feed_forward_length", "intermediate_size_mlp", Whole),
            ("expert_feed_forward_length", "intermediate_size", Whole),
            ("interleave_moe_layer_step", "interleave_moe_layer_step", Whole),
        ],
        says: r#"{"attention_chunk_size": 8192, "attn_temperature_tuning": true, "attn_scale": 0.1,
            "floor_scale": 8192.0, "no_rope_layer_interval": 4}"#,
        adjust: adjust_llama4,
        ..PLAIN
    },
    Architecture {
        name: "gpt-oss",
        sparse: &["gpt_oss"],
        keys: &[
            LOCAL[0],
            LOCAL[1],
            ("expert_feed_forward_length", "intermediate_size", Whole),
            ("attention.sliding_window", "sliding_window", Whole),
        ],
        says: r#"{"attention_bias": true, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}"#,
        yarn: r#"{"truncate": false}"#,
        norms: NORMS_POST,
        ..PLAIN
    },
    Architecture {
        name: "grok",
        sparse: &["grok-1"],
        keys: &[
            ("expert_count", "num_experts", Whole),
            USED,
            WIDTH,
            ("embedding_scale", "embedding_multiplier_scale", OptionalNumber),
            ("logit_scale", "output_multiplier_scale", OptionalNumber),
            ("attention.output_scale", "attn_output_multiplier", OptionalNumber),
            ("attn_logit_softcapping", "max_attn_value", OptionalNumber),
            // llama.cpp computes nothing with it.
            ("router_logit_softcapping", "", OptionalNumber),
        ],
        says: r#"{"hidden_act": "gelu"}"#,
        norms: ["attn_norm", "attn_output_norm", "ffn_norm", "layer_output_norm"],
        multiplies_logits: true,
        adjust: adjust_grok,
        ..PLAIN
    },
];

impl Architecture {
    /// The architecture in which a family's models are written.
    pub(super) fn of_family(family: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().find(|known| known.dense.contains(&family) || known.sparse.contains(&family))
    }

    /// Whether its files say something under a key, or might.
    pub(super) fn knows(&self, suffix: &str) -> bool {
        self.keys.iter().any(|(known, ..)| *known == suffix)
    }
}

/// llama.cpp's numbers of what makes scores of a router's logits (`enum llama_expert_gating_func_type`).
pub(super) const SOFTMAX: u32 = 1;
/// See [`SOFTMAX`].
pub(super) const SIGMOID: u32 = 2;

/// Old files of DeepSeek-V2 do not say how they score.
fn adjust_deepseek2(reading: &mut Reading) -> Result<(), ModelError> {
    let key = reading.key("expert_gating_func");
    match reading.metadata.optional_u32(&key)?.unwrap_or(SOFTMAX) {
        SOFTMAX => {
            let norm = reading.key("expert_weights_norm");
            if reading.metadata.optional_flag(&norm)? == Some(true) {
                return Err(reading.metadata.error(&norm, "wanted false for experts scored by softmax, found true"));
            }
            if reading.map.get("n_group").and_then(serde_json::Value::as_u64).is_some_and(|groups| groups > 1) {
                reading.map.insert("topk_method".into(), json!("group_limited_greedy"));
            }
        }
        SIGMOID => {
            reading.map.insert("model_type".into(), json!("deepseek_v3"));
            // As llama.cpp turns them: the files keep the order of the published ones.
            reading.map.insert("rope_interleave".into(), json!(true));
        }
        other => {
            let message = format!("wanted {SOFTMAX} (softmax) or {SIGMOID} (sigmoid), found {other}");
            return Err(reading.metadata.error(&key, message));
        }
    }
    reading.default("routed_scaling_factor", json!(1.0));
    reading.default("n_shared_experts", json!(0));
    reading.default("first_k_dense_replace", json!(0));
    Ok(())
}

/// Scores are logistic functions; `unsaid` is whether a file may leave that out.
fn adjust_sigmoid(reading: &mut Reading, unsaid: bool) -> Result<(), ModelError> {
    let key = reading.key("expert_gating_func");
    let found = reading.metadata.optional_u32(&key)?;
    if found != Some(SIGMOID) && !(unsaid && found.is_none()) {
        let found = found.map_or_else(|| "nothing".to_string(), |found| found.to_string());
        return Err(reading.metadata.error(&key, format!("wanted {SIGMOID} (sigmoid), found {found}")));
    }
    reading.default("routed_scaling_factor", json!(1.0));
    reading.default("first_k_dense_replace", json!(0));
    Ok(())
}

/// A shared expert makes it another family; what files leave out is not what `config.json` would mean by it.
fn adjust_granite(reading: &mut Reading) -> Result<(), ModelError> {
    if reading.map.get("shared_intermediate_size").is_some_and(|width| *width != json!(0)) {
        reading.map.insert("model_type".into(), json!("granitemoeshared"));
    } else {
        reading.map.remove("shared_intermediate_size");
    }
    let head_dim = reading.head_dim();
    reading.default("attention_multiplier", json!((head_dim as f64).powf(-0.5)));
    Ok(())
}

/// The family has one constant in its norms.
fn check_dbrx(reading: &mut Reading) -> Result<(), ModelError> {
    let key = reading.key("attention.layer_norm_epsilon");
    match reading.metadata.f32(&key)? {
        1e-5 => Ok(()),
        found => Err(reading.metadata.error(&key, format!("wanted 0.00001, found {found}"))),
    }
}

/// Old files leave xAI's factors to llama.cpp, which has them to seven digits.
fn adjust_grok(reading: &mut Reading) -> Result<(), ModelError> {
    reading.default("embedding_multiplier_scale", json!(78.383_67));
    reading.default("output_multiplier_scale", json!(0.577_350_3));
    reading.default("attn_output_multiplier", json!(0.088_388_35));
    reading.default("max_attn_value", json!(30.0));
    Ok(())
}

/// Maverick, which llama.cpp knows by its 128 experts, has no norm of queries and keys.
fn adjust_llama4(reading: &mut Reading) -> Result<(), ModelError> {
    let is_normed = reading.map.get("num_local_experts").is_none_or(|experts| *experts != json!(128));
    reading.map.insert("use_qk_norm".into(), json!(is_normed));
    // With 0 there, llama.cpp lets every layer see and turn all.
    let key = reading.key("attention.sliding_window");
    match reading.metadata.optional_u32(&key)? {
        None => Ok(()),
        Some(found) => Err(reading.metadata.error(&key, format!("wanted nothing, found {found}"))),
    }
}
