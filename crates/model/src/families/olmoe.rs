//! OLMoE (Muennighoff et al. 2024): softmax over all experts, the best k, weights as they are; queries and keys normed.

use super::keys::Keys;
use super::{Family, TensorMap, shared};
use crate::{Ffn, ModelConfig, ModelError, QkNorm};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family =
    Family { name: "olmoe", model_types: &["olmoe"], architecture: "OlmoeForCausalLM", read, write, tensors };

const DEFAULTS: shared::Defaults =
    shared::Defaults { rope_theta: 1e4, rms_eps: 1e-5, max_positions: 4096, n_kv_heads: None };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.only("sliding_window", Value::Null)?;
    let ffn = shared::read_experts(keys, "intermediate_size")?;
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    let router_aux_loss_coef = keys.number("router_aux_loss_coef", 0.01)?;
    Ok(ModelConfig { router_aux_loss_coef, qk_norm: QkNorm::Projection, ..config })
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    shared::write_experts(config, &mut map);
    map.insert("attention_bias".into(), json!(false));
    map.insert("clip_qkv".into(), Value::Null);
    map
}

pub(super) fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    let Ffn::Moe { n_experts, width, .. } = config.ffn else { return Vec::new() };
    let hidden = config.hidden;
    shared::tensors(config, |layer| {
        let (theirs, ours) = (format!("model.layers.{layer}.mlp"), format!("layers.{layer}.moe"));
        let mut all = vec![shared::matrix(&format!("{theirs}.gate"), &format!("{ours}.router"), n_experts, hidden)];
        let (gate_up, down) = (format!("{ours}.gate_up"), format!("{ours}.down"));
        for expert in 0..n_experts {
            let theirs = |part: &str| format!("{theirs}.experts.{expert}.{part}_proj");
            all.push(shared::part(&theirs("gate"), &gate_up, 2 * expert * width, width, hidden));
            all.push(shared::part(&theirs("up"), &gate_up, (2 * expert + 1) * width, width, hidden));
            all.push(shared::part(&theirs("down"), &down, expert * hidden, hidden, width));
        }
        all
    })
}
