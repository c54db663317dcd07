//! OLMoE (Muennighoff et al. 2024): softmax over all experts, the best k, weights as they are; queries and keys normed.

use super::keys::Keys;
use super::tensors::Names;
use super::{Family, shared};
use crate::{ModelConfig, ModelError, QkNorm};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "olmoe",
    model_types: &["olmoe"],
    architecture: "OlmoeForCausalLM",
    read,
    write,
    tensors: |config| Names::LLAMA.tensors(config),
};

const DEFAULTS: shared::Defaults =
    shared::Defaults { rms_eps: 1e-5, max_positions: 4096, understood: &["clip_qkv"], ..shared::Defaults::LLAMA };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.only("sliding_window", Value::Null)?;
    let ffn = shared::read_experts(keys, "intermediate_size")?;
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    let router_aux_loss_coef = keys.number("router_aux_loss_coef", 0.01)?;
    let config = ModelConfig { router_aux_loss_coef, ..config };
    let clip = keys.optional_number("clip_qkv")?;
    Ok(shared::with_attention(config, |attention| {
        attention.qk_norm = QkNorm::Projection;
        attention.clip = clip;
    }))
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    shared::write_experts(config, &mut map);
    map.insert("attention_bias".into(), json!(false));
    map.insert("clip_qkv".into(), json!(shared::attention(config).clip));
    map
}
