//! Qwen2 (Yang et al. 2024): Llama with biases on queries, keys and values.

use super::keys::Keys;
use super::{Family, llama, shared};
use crate::{Ffn, ModelConfig, ModelError};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "qwen2",
    model_types: &["qwen2"],
    architecture: "Qwen2ForCausalLM",
    read,
    write,
    tensors: llama::tensors,
};

const DEFAULTS: shared::Defaults =
    shared::Defaults { rope_theta: 1e4, rms_eps: 1e-6, max_positions: 32768, n_kv_heads: Some(32) };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    // Published files name a window that this switch leaves unused.
    keys.only("use_sliding_window", json!(false))?;
    let ffn = Ffn::Dense { width: keys.size("intermediate_size")? };
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    Ok(ModelConfig { qkv_bias: true, ..config })
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    map.insert("use_sliding_window".into(), json!(false));
    map
}
