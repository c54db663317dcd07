//! Qwen3 (Qwen team 2025): Llama with each head's queries and keys normed.

use super::keys::Keys;
use super::tensors::Names;
use super::{Family, shared};
use crate::{Ffn, ModelConfig, ModelError, QkNorm};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "qwen3",
    model_types: &["qwen3"],
    architecture: "Qwen3ForCausalLM",
    read,
    write,
    tensors: |config| Names::LLAMA.tensors(config),
};

const DEFAULTS: shared::Defaults =
    shared::Defaults { max_positions: 32768, n_kv_heads: Some(32), head_dim: Some(128), ..shared::Defaults::LLAMA };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.only("use_sliding_window", json!(false))?;
    let ffn = Ffn::dense(keys.size("intermediate_size")?);
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    Ok(shared::with_attention(config, |attention| attention.qk_norm = QkNorm::Head))
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    map.insert("attention_bias".into(), json!(false));
    map.insert("use_sliding_window".into(), json!(false));
    map
}
