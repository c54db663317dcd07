//! Qwen2 (Yang et al. 2024): Llama with biases on queries, keys and values.

use super::keys::Keys;
use super::tensors::Names;
use super::{Family, shared};
use crate::{Ffn, ModelConfig, ModelError};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "qwen2",
    model_types: &["qwen2"],
    architecture: "Qwen2ForCausalLM",
    read,
    write,
    tensors: |config| Names::LLAMA.tensors(config),
};

const DEFAULTS: shared::Defaults =
    shared::Defaults { max_positions: 32768, n_kv_heads: Some(32), ..shared::Defaults::LLAMA };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    // Published files name a window that this switch leaves unused.
    keys.only("use_sliding_window", json!(false))?;
    let ffn = Ffn::dense(keys.size("intermediate_size")?);
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    Ok(shared::with_attention(config, |attention| attention.qkv_bias = true))
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    map.insert("use_sliding_window".into(), json!(false));
    map
}
