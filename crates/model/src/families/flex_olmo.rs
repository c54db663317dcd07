//! FlexOlmo (Shi et al. 2025): OLMoE with the norms behind attention and experts.

use super::keys::Keys;
use super::rope::RopeDefaults;
use super::tensors::Names;
use super::{Family, shared};
use crate::config::NormPlace;
use crate::{ModelConfig, ModelError, QkNorm};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "flex_olmo",
    model_types: &["flex_olmo"],
    architecture: "FlexOlmoForCausalLM",
    read,
    write,
    tensors: |config| Names::LLAMA.tensors(config),
};

const DEFAULTS: shared::Defaults =
    shared::Defaults { rope: RopeDefaults::halves(5e5), max_positions: 4096, ..shared::Defaults::LLAMA };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let ffn = shared::read_experts(keys, "intermediate_size")?;
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    let router_aux_loss_coef = keys.number("router_aux_loss_coef", 0.01)?;
    let config = ModelConfig { router_aux_loss_coef, norm_place: NormPlace::After, ..config };
    Ok(shared::with_attention(config, |attention| attention.qk_norm = QkNorm::Projection))
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    shared::write_experts(config, &mut map);
    map.insert("attention_bias".into(), json!(false));
    map
}
