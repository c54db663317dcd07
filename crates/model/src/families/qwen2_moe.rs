//! Qwen2-MoE (Qwen team 2024, Qwen1.5-MoE and Qwen2-57B-A14B): a gated shared expert; some layers dense, some behind a
//! window.

use super::keys::Keys;
use super::tensors::Names;
use super::{Family, shared};
use crate::config::{Mixer, Reach, SharedExperts};
use crate::{Ffn, ModelConfig, ModelError};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "qwen2_moe",
    model_types: &["qwen2_moe"],
    architecture: "Qwen2MoeForCausalLM",
    read,
    write,
    tensors: |config| NAMES.tensors(config),
};

const NAMES: Names = Names { shared: "shared_expert", ..Names::LLAMA };

const DEFAULTS: shared::Defaults = shared::Defaults {
    max_positions: 32768,
    n_kv_heads: Some(16),
    understood: &["layer_types"],
    ..shared::Defaults::LLAMA
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let Ffn::Moe(mut moe) = shared::read_experts(keys, "moe_intermediate_size")? else {
        unreachable!("made of experts")
    };
    moe.shared = Some(SharedExperts { width: keys.size("shared_expert_intermediate_size")?, gated: true });
    let config = shared::read(keys, FAMILY.name, Ffn::Moe(moe), None, &DEFAULTS)?;
    let n_layers = config.n_layers();
    let qkv_bias = keys.flag("qkv_bias", true)?;
    let windowed = if keys.flag("use_sliding_window", false)? {
        let last = keys.optional_size("max_window_layers")?.unwrap_or(28);
        shared::read_layer_types(keys, n_layers, |layer| layer % 2 == 0 && layer < last, "sliding_attention")?
    } else {
        shared::read_layer_types(keys, n_layers, |_| false, "sliding_attention")?
    };
    let window = if windowed.contains(&true) { keys.size("sliding_window")? } else { 0 };
    let config = shared::with_layers(config, |index, layer| {
        if let Mixer::Attention(attention) = &mut layer.mixer {
            attention.qkv_bias = qkv_bias;
            attention.reach = if windowed[index] { Reach::Window(window) } else { Reach::All };
        }
    });
    let config = shared::with_sparse_steps(keys, config)?;
    Ok(ModelConfig { router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.001)?, ..config })
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    shared::write_experts(config, &mut map);
    shared::write_sparse_steps(config, &mut map);
    if let Some(moe) = config.moe() {
        map.insert("moe_intermediate_size".into(), moe.width.into());
        map.insert("shared_expert_intermediate_size".into(), moe.shared.map(|shared| shared.width).into());
    }
    map.insert("qkv_bias".into(), json!(shared::attention(config).qkv_bias));
    let window = config.layers.iter().find_map(|layer| layer.mixer.attention()?.reach.window());
    map.insert("use_sliding_window".into(), json!(window.is_some()));
    map.insert("sliding_window".into(), json!(window));
    map.insert("layer_types".into(), shared::layer_types(config, "sliding_attention"));
    map
}
