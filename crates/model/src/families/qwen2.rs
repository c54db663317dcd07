//! Qwen2 (Yang et al. 2024): Llama with biases on queries, keys and values.

use super::keys::Keys;
use super::{Family, olmoe, shared};
use crate::{Ffn, ModelConfig, ModelError};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "qwen2",
    model_types: &["qwen2"],
    architecture: "Qwen2ForCausalLM",
    read,
    write,
    tensors: olmoe::tensors,
};

const DEFAULTS: shared::Defaults =
    shared::Defaults { rope_theta: 1e4, rms_eps: 1e-6, max_positions: 32768, n_kv_heads: Some(32), head_dim: None };

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
