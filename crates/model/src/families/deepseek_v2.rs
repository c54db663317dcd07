//! DeepSeek-V2 (DeepSeek-AI 2024): latent attention; softmax over all experts, perhaps of the best groups only, weights
//! scaled and never renormalised; shared experts; the first layers dense.

use super::keys::Keys;
use super::tensors::Names;
use super::{Family, latent, shared};
use crate::{ModelConfig, ModelError};
use moebius_moe::{GroupScore, RouterSettings};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "deepseek_v2",
    model_types: &["deepseek_v2"],
    architecture: "DeepseekV2ForCausalLM",
    read,
    write,
    tensors: |config| Names::LLAMA.tensors(config),
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.only("scoring_func", json!("softmax"))?;
    keys.only("moe_layer_freq", json!(1))?;
    let groups = match keys.get("topk_method").and_then(Value::as_str) {
        // `norm_topk_prob` has no effect here, whatever it says.
        None | Some("greedy") => None,
        Some("group_limited_greedy") => shared::read_groups(keys, GroupScore::Best)?,
        Some(other) => {
            let message = format!("wanted greedy or group_limited_greedy, found {other}");
            return Err(keys.error("topk_method", message));
        }
    };
    let scale = keys.number("routed_scaling_factor", 1.0)? as f32;
    let router = RouterSettings { groups, scale, ..RouterSettings::softmax(keys.size("num_experts_per_tok")?, false) };
    let config = latent::read(keys, FAMILY.name, shared::moe_of(keys, router)?, false, 2048)?;
    let config = ModelConfig { router_aux_loss_coef: keys.number("aux_loss_alpha", 0.001)?, ..config };
    shared::with_dense_first(keys, config, 0)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = latent::write(config);
    let is_grouped = config.moe().is_some_and(|moe| moe.router.groups.is_some());
    map.insert("topk_method".into(), json!(if is_grouped { "group_limited_greedy" } else { "greedy" }));
    map.insert("aux_loss_alpha".into(), json!(config.router_aux_loss_coef));
    map
}
