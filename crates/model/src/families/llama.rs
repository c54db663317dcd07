//! Llama (Touvron et al. 2023): the dense decoder that Mixtral differs from in its feed-forward part alone.

use super::keys::Keys;
use super::tensors::Names;
use super::{Family, shared};
use crate::{Ffn, ModelConfig, ModelError};
use serde_json::{Map, Value};

pub(super) const FAMILY: Family = Family {
    name: "llama",
    model_types: &["llama"],
    architecture: "LlamaForCausalLM",
    read,
    write,
    tensors: |config| Names::LLAMA.tensors(config),
};

const DEFAULTS: shared::Defaults = shared::Defaults::LLAMA;

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.only("sliding_window", Value::Null)?;
    shared::read(keys, FAMILY.name, Ffn::dense(keys.size("intermediate_size")?), None, &DEFAULTS)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    shared::write(config)
}
