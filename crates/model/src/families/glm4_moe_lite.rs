//! GLM-4.7-Flash (Z.ai 2026): DeepSeek-V3 in its sizes, dense layers named one by one.

use super::keys::Keys;
use super::tensors::Names;
use super::{Family, latent, shared};
use crate::config::{LayerConfig, Norm};
use crate::{ModelConfig, ModelError};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "glm4_moe_lite",
    model_types: &["glm4_moe_lite"],
    architecture: "Glm4MoeLiteForCausalLM",
    read,
    write,
    tensors: |config| Names::LLAMA.tensors(config),
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.only("moe_layer_freq", json!(1))?;
    let moe = shared::read_sigmoid_experts(keys, 1.8)?;
    let config = latent::read(keys, FAMILY.name, moe, true, 202_752)?;
    let config = ModelConfig { norm: Norm::Rms { eps: keys.number("rms_norm_eps", 1e-5)? }, ..config };
    shared::with_dense_first(keys, config, 1)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = latent::write(config);
    let kind = |layer: &LayerConfig| json!(if layer.ffn.moe().is_some() { "sparse" } else { "dense" });
    map.insert("mlp_layer_types".into(), config.layers.iter().map(kind).collect());
    map
}
