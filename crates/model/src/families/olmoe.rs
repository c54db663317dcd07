//! OLMoE (Muennighoff et al. 2024): softmax over all experts, the best k, weights as they are; queries and keys normed.

use super::keys::Keys;
use super::{Family, TensorMap, shared};
use crate::{ModelConfig, ModelError, QkNorm};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family =
    Family { name: "olmoe", model_types: &["olmoe"], architecture: "OlmoeForCausalLM", read, write, tensors };

const DEFAULTS: shared::Defaults =
    shared::Defaults { rope_theta: 1e4, rms_eps: 1e-5, max_positions: 4096, n_kv_heads: None, head_dim: None };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.only("sliding_window", Value::Null)?;
    let ffn = shared::read_experts(keys, "intermediate_size")?;
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    let router_aux_loss_coef = keys.number("router_aux_loss_coef", 0.01)?;
    let config = ModelConfig { router_aux_loss_coef, ..config };
    Ok(shared::with_attention(config, |attention| attention.qk_norm = QkNorm::Projection))
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    shared::write_experts(config, &mut map);
    map.insert("attention_bias".into(), json!(false));
    map.insert("clip_qkv".into(), Value::Null);
    map
}

pub(super) fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    shared::tensors(config, |layer| shared::feed_forward_tensors(config, layer, ["mlp", "mlp"], shared::PROJECTIONS))
}
