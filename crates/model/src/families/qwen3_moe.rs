//! Qwen3-MoE (Qwen team 2025): softmax over all experts, the best k, weights renormalised; each head's queries and keys
//! normed.

use super::keys::Keys;
use super::{Family, olmoe, shared};
use crate::{ModelConfig, ModelError, QkNorm};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "qwen3_moe",
    model_types: &["qwen3_moe"],
    architecture: "Qwen3MoeForCausalLM",
    read,
    write,
    tensors: olmoe::tensors,
};

const DEFAULTS: shared::Defaults =
    shared::Defaults { rope_theta: 1e4, rms_eps: 1e-6, max_positions: 32768, n_kv_heads: Some(4), head_dim: None };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    // Every layer is a mixture, and none looks through a window.
    keys.only("decoder_sparse_step", json!(1))?;
    keys.only("mlp_only_layers", json!([]))?;
    keys.only("use_sliding_window", json!(false))?;
    let ffn = shared::read_experts(keys, "moe_intermediate_size")?;
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    let router_aux_loss_coef = keys.number("router_aux_loss_coef", 0.001)?;
    let config = ModelConfig { router_aux_loss_coef, ..config };
    Ok(shared::with_attention(config, |attention| attention.qk_norm = QkNorm::Head))
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    shared::write_experts(config, &mut map);
    map.insert("moe_intermediate_size".into(), config.layers[0].ffn.width().into());
    map.insert("attention_bias".into(), json!(false));
    map.insert("decoder_sparse_step".into(), json!(1));
    map.insert("mlp_only_layers".into(), json!([]));
    map.insert("use_sliding_window".into(), json!(false));
    map
}
