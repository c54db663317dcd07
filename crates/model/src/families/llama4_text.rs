//! Llama 4, the text part (Meta 2025): experts weighed by sigmoid at their input; layers that turn attend in chunks, those
//! that do not attend to all with a temperature.

use super::keys::Keys;
use super::rope::RopeDefaults;
use super::tensors::{ExpertTensors, Names};
use super::{Family, shared};
use crate::config::{Mixer, Reach, SharedExperts, Temperature};
use crate::{Ffn, ModelConfig, ModelError, QkNorm};
use moebius_moe::{RouterSettings, Score};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "llama4_text",
    model_types: &["llama4_text"],
    architecture: "Llama4ForCausalLM",
    read,
    write,
    tensors: |config| NAMES.tensors(config),
};

const NAMES: Names = Names {
    dense: "feed_forward",
    moe: "feed_forward",
    router: "router",
    experts: ExpertTensors::Transposed { names: ["gate_up_proj", "down_proj"], alternating: false },
    shared: "shared_expert",
    ..Names::LLAMA
};

const DEFAULTS: shared::Defaults = shared::Defaults {
    rope: RopeDefaults::neighbours(5e5),
    rms_eps: 1e-5,
    max_positions: 4096 * 32,
    n_kv_heads: Some(8),
    head_dim: Some(128),
    understood: &["use_qk_norm", "attention_chunk_size", "layer_types"],
};

/// A number for each layer that is 0 or not.
fn flags(keys: &Keys, key: &str, n_layers: usize) -> Result<Option<Vec<bool>>, ModelError> {
    match keys.get(key) {
        None => Ok(None),
        Some(Value::Array(list)) if list.is_empty() => Ok(None),
        Some(_) => {
            let flags = keys.list(key, "0 or 1 for each layer", |flag| flag.as_u64().map(|flag| flag != 0))?;
            if flags.len() != n_layers {
                return Err(keys.error(key, format!("wanted {n_layers} numbers, found {}", flags.len())));
            }
            Ok(Some(flags))
        }
    }
}

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let (top_k, width) = (keys.size("num_experts_per_tok")?, keys.size("intermediate_size")?);
    let router =
        RouterSettings { score: Score::SigmoidOfChosen, weighs_input: true, ..RouterSettings::softmax(top_k, false) };
    let shared = Some(SharedExperts { width, gated: false });
    let ffn = Ffn::moe_with(keys.size("num_local_experts")?, width, router, shared);
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    let n_layers = config.n_layers();
    let interval = keys.optional_size("no_rope_layer_interval")?.unwrap_or(4).max(1);
    let turning = flags(keys, "no_rope_layers", n_layers)?
        .unwrap_or_else(|| (0..n_layers).map(|layer| (layer + 1) % interval != 0).collect());
    let chunked = shared::read_layer_types(keys, n_layers, |layer| turning[layer], "chunked_attention")?;
    // Null means that no layer attends in chunks.
    let chunk = if keys.has("attention_chunk_size") { keys.optional_size("attention_chunk_size")? } else { Some(8192) };
    let qk_norm = if keys.flag("use_qk_norm", true)? { QkNorm::UnitTurned } else { QkNorm::None };
    let temperature = match keys.flag("attn_temperature_tuning", true)? {
        true => {
            Some(Temperature { scale: keys.number("attn_scale", 0.1)?, floor: keys.number("floor_scale", 8192.0)? })
        }
        false => None,
    };
    let config = shared::with_layers(config, |index, layer| {
        let Mixer::Attention(attention) = &mut layer.mixer else { return };
        attention.reach = chunk.filter(|_| chunked[index]).map_or(Reach::All, Reach::Chunk);
        if turning[index] {
            attention.qk_norm = qk_norm;
        } else {
            (attention.rope, attention.temperature) = (None, temperature);
        }
    });
    let step = keys.optional_size("interleave_moe_layer_step")?.unwrap_or(1).max(1);
    let sparse: Vec<usize> = match keys.get("moe_layers") {
        None => (step - 1..n_layers).step_by(step).collect(),
        Some(_) => keys.list("moe_layers", "numbers of layers", |layer| {
            layer.as_u64().and_then(|layer| usize::try_from(layer).ok())
        })?,
    };
    let dense: Vec<bool> = (0..n_layers).map(|layer| !sparse.contains(&layer)).collect();
    let dense_width = if dense.contains(&true) { keys.size("intermediate_size_mlp")? } else { 0 };
    let config = ModelConfig { router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.001)?, ..config };
    shared::with_dense(keys, config, "moe_layers", &dense, dense_width)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    let attentions = || config.layers.iter().filter_map(|layer| layer.mixer.attention());
    if let Some(moe) = config.moe() {
        map.insert("num_local_experts".into(), moe.n_experts.into());
        map.insert("num_experts_per_tok".into(), moe.router.top_k.into());
        map.insert("intermediate_size".into(), moe.width.into());
    }
    map.insert("intermediate_size_mlp".into(), shared::dense_width(config).into());
    shared::write_balance(config, &mut map);
    let sparse = (0..config.n_layers()).filter(|&layer| config.layers[layer].ffn.moe().is_some());
    map.insert("moe_layers".into(), sparse.collect());
    let turning = attentions().map(|attention| u8::from(attention.rope.is_some()));
    map.insert("no_rope_layers".into(), turning.collect());
    let chunk = attentions().find_map(|attention| match attention.reach {
        Reach::Chunk(chunk) => Some(chunk),
        Reach::All | Reach::Window(_) => None,
    });
    map.insert("attention_chunk_size".into(), json!(chunk));
    map.insert("layer_types".into(), shared::layer_types(config, "chunked_attention"));
    let is_normed = attentions().any(|attention| attention.qk_norm == QkNorm::UnitTurned);
    map.insert("use_qk_norm".into(), json!(is_normed));
    let temperature = attentions().find_map(|attention| attention.temperature);
    map.insert("attn_temperature_tuning".into(), json!(temperature.is_some()));
    if let Some(Temperature { scale, floor }) = temperature {
        map.insert("attn_scale".into(), json!(scale));
        map.insert("floor_scale".into(), json!(floor));
    }
    map.insert("attention_bias".into(), json!(false));
    map
}
