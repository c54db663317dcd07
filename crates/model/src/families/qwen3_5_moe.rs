//! Qwen3.5-MoE, its text model (Qwen team 2026): Qwen3-Next with the delta rule's projections apart and weights always
//! renormalised.

use super::keys::Keys;
use super::{Family, qwen3_next, shared};
use crate::config::DeltaProjections;
use crate::{ModelConfig, ModelError};
use serde_json::json;

pub(super) const FAMILY: Family = Family {
    name: "qwen3_5_moe_text",
    model_types: &["qwen3_5_moe_text"],
    architecture: "Qwen3_5MoeForCausalLM",
    read,
    write: qwen3_next::write_as,
    tensors: qwen3_next::tensors,
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.only("norm_topk_prob", json!(true))?;
    let dense = vec![None; shared::layer_count(keys)?];
    qwen3_next::read_as(keys, FAMILY.name, DeltaProjections::ByKind, 1e7, true, &dense)
}
