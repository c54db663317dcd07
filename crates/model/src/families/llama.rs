//! Llama (Touvron et al. 2023): the dense decoder that Mixtral differs from in its feed-forward part alone.

use super::keys::Keys;
use super::{Family, TensorMap, shared};
use crate::{Ffn, ModelConfig, ModelError};
use serde_json::{Map, Value};

pub(super) const FAMILY: Family =
    Family { name: "llama", model_types: &["llama"], architecture: "LlamaForCausalLM", read, write, tensors };

const DEFAULTS: shared::Defaults =
    shared::Defaults { rope_theta: 1e4, rms_eps: 1e-6, max_positions: 2048, n_kv_heads: None };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.only("sliding_window", Value::Null)?;
    shared::read(keys, FAMILY.name, Ffn::Dense { width: keys.size("intermediate_size")? }, None, &DEFAULTS)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    shared::write(config)
}

pub(super) fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
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
