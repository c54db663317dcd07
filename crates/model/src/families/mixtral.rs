//! Mixtral (Jiang et al. 2024): softmax over all experts, the best k, weights renormalised.

use super::keys::Keys;
use super::rope::RopeDefaults;
use super::tensors::{self, Names};
use super::{Family, shared};
use crate::{Ffn, ModelConfig, ModelError};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "mixtral",
    model_types: &["mixtral"],
    architecture: "MixtralForCausalLM",
    read,
    write,
    tensors: |config| NAMES.tensors(config),
};

const DEFAULTS: shared::Defaults = shared::Defaults {
    rope: RopeDefaults::halves(1e6),
    rms_eps: 1e-5,
    max_positions: 4096 * 32,
    n_kv_heads: Some(8),
    ..shared::Defaults::LLAMA
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let (n_experts, top_k) = (keys.size("num_local_experts")?, keys.size("num_experts_per_tok")?);
    let ffn = Ffn::moe_of(n_experts, top_k, keys.size("intermediate_size")?, true);
    let config = shared::read(keys, FAMILY.name, ffn, keys.optional_size("sliding_window")?, &DEFAULTS)?;
    Ok(ModelConfig { router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.001)?, ..config })
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    if let Some(moe) = config.moe() {
        map.insert("num_local_experts".into(), moe.n_experts.into());
        map.insert("num_experts_per_tok".into(), moe.router.top_k.into());
    }
    map.insert("router_aux_loss_coef".into(), json!(config.router_aux_loss_coef));
    map.insert("router_jitter_noise".into(), json!(0.0));
    map.insert("output_router_logits".into(), json!(false));
    map.insert("sliding_window".into(), json!(shared::attention(config).reach.window()));
    map
}

const NAMES: Names = Names { moe: "block_sparse_moe", experts: tensors::NUMBERED, ..Names::LLAMA };
