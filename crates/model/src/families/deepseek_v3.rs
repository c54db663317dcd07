//! DeepSeek-V3 (DeepSeek-AI 2024; R1 and Kimi-K2 are this): latent attention; experts chosen by sigmoid and a bias within the
//! best groups, weighed without the bias; shared experts; the first layers dense.

use super::keys::Keys;
use super::tensors::Names;
use super::{Family, latent, shared};
use crate::{ModelConfig, ModelError};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "deepseek_v3",
    model_types: &["deepseek_v3", "kimi_k2"],
    architecture: "DeepseekV3ForCausalLM",
    read,
    write,
    tensors: |config| Names::LLAMA.tensors(config),
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.only("moe_layer_freq", json!(1))?;
    let moe = shared::read_sigmoid_experts(keys, 2.5)?;
    shared::with_dense_first(keys, latent::read(keys, FAMILY.name, moe, true, 4096)?, 3)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    latent::write(config)
}
