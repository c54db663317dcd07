//! Mistral (Jiang et al. 2023): Llama with a sliding window.

use super::keys::Keys;
use super::tensors::Names;
use super::{Family, shared};
use crate::{Ffn, ModelConfig, ModelError};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "mistral",
    model_types: &["mistral"],
    architecture: "MistralForCausalLM",
    read,
    write,
    tensors: |config| Names::LLAMA.tensors(config),
};

const DEFAULTS: shared::Defaults =
    shared::Defaults { max_positions: 4096 * 32, n_kv_heads: Some(8), ..shared::Defaults::LLAMA };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let ffn = Ffn::dense(keys.size("intermediate_size")?);
    // Null means none; absent means what the first release had.
    let window = if keys.has("sliding_window") { keys.optional_size("sliding_window")? } else { Some(4096) };
    shared::read(keys, FAMILY.name, ffn, window, &DEFAULTS)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    map.insert("sliding_window".into(), json!(shared::attention(config).reach.window()));
    map
}
