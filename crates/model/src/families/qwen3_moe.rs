//! Qwen3-MoE (Qwen team 2025): softmax over all experts, the best k, weights renormalised; each head's queries and keys
//! normed.

use super::keys::Keys;
use super::tensors::Names;
use super::{Family, shared};
use crate::{ModelConfig, ModelError, QkNorm};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "qwen3_moe",
    model_types: &["qwen3_moe"],
    architecture: "Qwen3MoeForCausalLM",
    read,
    write,
    tensors: |config| Names::LLAMA.tensors(config),
};

const DEFAULTS: shared::Defaults =
    shared::Defaults { max_positions: 32768, n_kv_heads: Some(4), ..shared::Defaults::LLAMA };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    // No layer looks through a window.
    keys.only("use_sliding_window", json!(false))?;
    let ffn = shared::read_experts(keys, "moe_intermediate_size")?;
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    let config = ModelConfig { router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.001)?, ..config };
    let config = shared::with_attention(config, |attention| attention.qk_norm = QkNorm::Head);
    shared::with_sparse_steps(keys, config)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    shared::write_experts(config, &mut map);
    shared::write_sparse_steps(config, &mut map);
    map.insert("moe_intermediate_size".into(), config.moe().map(|moe| moe.width).into());
    map.insert("attention_bias".into(), json!(false));
    map.insert("use_sliding_window".into(), json!(false));
    map
}
