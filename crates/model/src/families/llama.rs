//! Llama and Mistral: the dense decoder that Mixtral's differs from in its feed-forward part alone.

use super::keys::Keys;
use super::{Family, TensorMap, shared};
use crate::{Ffn, ModelConfig, ModelError};
use serde_json::{Map, Value};

pub(super) const FAMILY: Family = Family {
    name: "llama",
    model_types: &["llama", "mistral"],
    architecture: "LlamaForCausalLM",
    read,
    write,
    tensors,
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    // Llama has no window; what we write is Llama, so a Mistral that uses one would be written without it.
    keys.only("sliding_window", Value::Null)?;
    shared::read(keys, FAMILY.name, Ffn::Dense { width: keys.size("intermediate_size")? }, 1e4)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    shared::write(config)
}

fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    let (hidden, width) = (config.hidden, config.ffn.width());
    shared::tensors(config, |layer| {
        let (theirs, ours) = (format!("model.layers.{layer}.mlp"), format!("layers.{layer}.mlp"));
        let gate_up = format!("{ours}.gate_up");
        vec![
            shared::part(&format!("{theirs}.gate_proj"), &gate_up, 0, width, hidden),
            shared::part(&format!("{theirs}.up_proj"), &gate_up, width, width, hidden),
            shared::matrix(&format!("{theirs}.down_proj"), &format!("{ours}.down"), hidden, width),
        ]
    })
}
