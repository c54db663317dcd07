//! DBRX (Databricks 2024): softmax, the chosen weights divided by their norm; queries, keys and values in one matrix, cut to
//! a range; layer norms without bias.

use super::keys::Keys;
use super::rope::{self, RopeDefaults};
use super::tensors::{ExpertTensors, Names};
use super::{Family, TensorMap, View, shared};
use crate::config::{AttentionConfig, Norm};
use crate::{Ffn, ModelConfig, ModelError, UniformDecoder};
use moebius_moe::{Normalise, RouterSettings};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family =
    Family { name: "dbrx", model_types: &["dbrx"], architecture: "DbrxForCausalLM", read, write, tensors };

const NAMES: Names = Names {
    embedding: "transformer.wte",
    layers: "transformer.blocks",
    mixer_norms: ["norm_attn_norm.norm_1", ""],
    attention: "norm_attn_norm.attn",
    ffn_norms: ["norm_attn_norm.norm_2", ""],
    moe: "ffn",
    router: "router.layer",
    experts: ExpertTensors::Flat(["w1", "v1", "w2"]),
    final_norm: "transformer.norm_f",
    ..Names::LLAMA
};

/// What torch adds to the variance.
const EPS: f64 = 1e-5;

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let empty = Map::new();
    let nothing = Keys::new("config.json", &empty);
    let attention = keys.object("attn_config")?.unwrap_or(Keys::new("config.json", &empty));
    let experts = keys.object("ffn_config")?.unwrap_or(nothing);
    keys.only("quantization_config", Value::Null)?;
    if let Some(act) = experts.object("ffn_act_fn")? {
        act.only("name", json!("silu"))?;
    }
    let top_k = experts.optional_size("moe_top_k")?.unwrap_or(1);
    let normalise = match experts.optional_number("moe_normalize_expert_weights")? {
        None => Normalise::None,
        Some(p) if p > 0.0 => Normalise::Norm { p: p as f32 },
        Some(p) => {
            return Err(experts.error("moe_normalize_expert_weights", format!("wanted more than 0 or null, found {p}")));
        }
    };
    let router = RouterSettings { normalise, ..RouterSettings::softmax(top_k, false) };
    let (hidden, n_heads) = (keys.size("d_model")?, keys.size("n_heads")?);
    let n_layers = keys.size("n_layers")?;
    crate::config::check_layer_count(n_layers).map_err(|(_, message)| keys.error("n_layers", message))?;
    if n_heads == 0 || !hidden.is_multiple_of(n_heads) {
        return Err(keys.error("n_heads", format!("wanted a divisor of d_model {hidden}, found {n_heads}")));
    }
    let rope = rope::read(keys, hidden / n_heads, RopeDefaults::halves(attention.number("rope_theta", 1e4)?))?;
    let decoder = UniformDecoder {
        family: FAMILY.name,
        vocab_size: keys.size("vocab_size")?,
        hidden,
        n_layers,
        n_heads,
        n_kv_heads: attention.optional_size("kv_n_heads")?.unwrap_or(1),
        head_dim: hidden / n_heads,
        max_positions: keys.size("max_seq_len")?,
        tie_embeddings: keys.flag("tie_word_embeddings", false)?,
        ffn: Ffn::moe_with(experts.size("moe_num_experts")?, experts.size("ffn_hidden_size")?, router, None),
        ..UniformDecoder::default()
    };
    let config = ModelConfig {
        norm: Norm::Layer { eps: EPS, bias: false },
        router_aux_loss_coef: experts.number("moe_loss_weight", 0.01)?,
        bos_token: keys.token_ids("bos_token_id")?.first().copied(),
        eos_tokens: keys.token_ids("eos_token_id")?,
        ..decoder.config()
    };
    let clip = attention.optional_number("clip_qkv")?;
    Ok(shared::with_attention(config, |attention| {
        attention.rope = Some(rope.clone());
        attention.clip = clip;
    }))
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let common = shared::write_common(config);
    let attention = shared::attention(config);
    let mut map = Map::new();
    for key in ["vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "initializer_range", "use_cache"] {
        map.insert(key.into(), common[key].clone());
    }
    map.insert("d_model".into(), config.hidden.into());
    map.insert("n_layers".into(), config.n_layers().into());
    map.insert("n_heads".into(), attention.n_heads.into());
    map.insert("max_seq_len".into(), config.max_positions.into());
    let mut rotary = Map::new();
    if let Some(turning) = &attention.rope {
        rope::write(turning, attention.head_dim, &mut rotary);
    }
    let theta = rotary.remove("rope_theta");
    map.extend(rotary);
    map.insert(
        "attn_config".into(),
        json!({"kv_n_heads": attention.n_kv_heads, "clip_qkv": attention.clip, "rope_theta": theta}),
    );
    if let Some(moe) = config.moe() {
        let norm = match moe.router.normalise {
            Normalise::Norm { p } => json!(shared::number(p)),
            _ => Value::Null,
        };
        let experts = json!({
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": moe.width,
            "moe_num_experts": moe.n_experts,
            "moe_top_k": moe.router.top_k,
            "moe_normalize_expert_weights": norm,
            "moe_loss_weight": config.router_aux_loss_coef,
        });
        map.insert("ffn_config".into(), experts);
    }
    map
}

/// As the names say, but queries, keys and values are rows of one matrix.
fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    let AttentionConfig { n_heads, n_kv_heads, head_dim, .. } = *shared::attention(config);
    let (queries, keys, hidden) = (n_heads * head_dim, n_kv_heads * head_dim, config.hidden);
    let in_one_matrix = |map: TensorMap| {
        let Some((stem, letter)) = map.file_name.strip_suffix("_proj.weight").and_then(|name| name.rsplit_once('.'))
        else {
            return map;
        };
        let (first, rows) = match letter {
            "q" => (0, queries),
            "k" => (queries, keys),
            "v" => (queries + keys, keys),
            _ => return TensorMap { file_name: format!("{stem}.out_proj.weight"), ..map },
        };
        let view = View { first: first * hidden, row_stride: hidden, col_stride: 1 };
        let shape = [queries + 2 * keys, hidden];
        TensorMap::whole(format!("{stem}.Wqkv.weight"), &shape, map.param, 0..rows).viewed(hidden, view)
    };
    NAMES.tensors(config).into_iter().map(in_one_matrix).collect()
}
