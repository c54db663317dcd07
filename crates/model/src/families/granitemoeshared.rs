//! Granite 3 with a shared expert (IBM 2025): GraniteMoE, and one network that every token passes.

use super::keys::Keys;
use super::{Family, granitemoe};
use crate::config::SharedExperts;
use crate::{ModelConfig, ModelError};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "granitemoeshared",
    model_types: &["granitemoeshared"],
    architecture: "GraniteMoeSharedForCausalLM",
    read,
    write,
    tensors: |config| granitemoe::NAMES.tensors(config),
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let shared = match keys.size("shared_intermediate_size")? {
        0 => None,
        width => Some(SharedExperts { width, gated: false }),
    };
    granitemoe::read_with(keys, FAMILY.name, shared)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = granitemoe::write(config);
    let width = config.moe().and_then(|moe| moe.shared).map_or(0, |shared| shared.width);
    map.insert("shared_intermediate_size".into(), json!(width));
    map
}
