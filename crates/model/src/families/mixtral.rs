//! Mixtral (Jiang et al. 2024): softmax over all experts, the best k, weights renormalised.

use super::keys::Keys;
use super::{Family, TensorMap, shared};
use crate::{Ffn, ModelConfig, ModelError};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family =
    Family { name: "mixtral", model_types: &["mixtral"], architecture: "MixtralForCausalLM", read, write, tensors };

const DEFAULTS: shared::Defaults =
    shared::Defaults { rope_theta: 1e6, rms_eps: 1e-5, max_positions: 4096 * 32, n_kv_heads: Some(8) };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let ffn = Ffn::Moe {
        n_experts: keys.size("num_local_experts")?,
        top_k: keys.size("num_experts_per_tok")?,
        width: keys.size("intermediate_size")?,
        renormalise: true,
    };
    let config = shared::read(keys, FAMILY.name, ffn, keys.optional_size("sliding_window")?, &DEFAULTS)?;
    Ok(ModelConfig { router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.001)?, ..config })
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    if let Ffn::Moe { n_experts, top_k, .. } = config.ffn {
        map.insert("num_local_experts".into(), n_experts.into());
        map.insert("num_experts_per_tok".into(), top_k.into());
    }
    map.insert("router_aux_loss_coef".into(), json!(config.router_aux_loss_coef));
    map.insert("router_jitter_noise".into(), json!(0.0));
    map.insert("output_router_logits".into(), json!(false));
    map.insert("sliding_window".into(), json!(config.window));
    map
}

fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    let Ffn::Moe { n_experts, width, .. } = config.ffn else { return Vec::new() };
    let hidden = config.hidden;
    shared::tensors(config, |layer| {
        let (theirs, ours) = (format!("model.layers.{layer}.block_sparse_moe"), format!("layers.{layer}.moe"));
        let mut all = vec![shared::matrix(&format!("{theirs}.gate"), &format!("{ours}.router"), n_experts, hidden)];
        let (gate_up, down) = (format!("{ours}.gate_up"), format!("{ours}.down"));
        for expert in 0..n_experts {
            let theirs = |letter: &str| format!("{theirs}.experts.{expert}.{letter}");
            // w1 is the gate, w3 goes up, w2 goes down.
            all.push(shared::part(&theirs("w1"), &gate_up, 2 * expert * width, width, hidden));
            all.push(shared::part(&theirs("w3"), &gate_up, (2 * expert + 1) * width, width, hidden));
            all.push(shared::part(&theirs("w2"), &down, expert * hidden, hidden, width));
        }
        all
    })
}
