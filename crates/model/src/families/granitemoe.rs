//! Granite 3 (IBM 2024): the best experts by logit, weighed by their own softmax; constant factors of embedding, scores,
//! residual stream and logits.

use super::keys::Keys;
use super::tensors::{ExpertTensors, Names};
use super::{Family, shared};
use crate::config::{Scales, SharedExperts};
use crate::{Ffn, ModelConfig, ModelError};
use moebius_moe::{RouterSettings, Score};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "granitemoe",
    model_types: &["granitemoe"],
    architecture: "GraniteMoeForCausalLM",
    read,
    write,
    tensors: |config| NAMES.tensors(config),
};

pub(super) const NAMES: Names = Names {
    moe: "block_sparse_moe",
    router: "router.layer",
    experts: ExpertTensors::Stacked(["input_linear", "output_linear"]),
    shared: ".shared_mlp",
    shared_is_fused: true,
    ..Names::LLAMA
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    read_with(keys, FAMILY.name, None)
}

pub(super) fn read_with(keys: &Keys, family: &str, shared: Option<SharedExperts>) -> Result<ModelConfig, ModelError> {
    let top_k = keys.size("num_experts_per_tok")?;
    let router = RouterSettings { score: Score::SoftmaxOfChosen, ..RouterSettings::softmax(top_k, false) };
    let ffn = Ffn::moe_with(keys.size("num_local_experts")?, keys.size("intermediate_size")?, router, shared);
    let config = shared::read(keys, family, ffn, None, &shared::Defaults::LLAMA)?;
    let scales = Scales {
        embedding: keys.number("embedding_multiplier", 1.0)?,
        residual: keys.number("residual_multiplier", 1.0)?,
        logits: 1.0 / keys.number("logits_scaling", 1.0)?,
    };
    let scale = keys.number("attention_multiplier", 1.0)?;
    let router_aux_loss_coef = keys.number("router_aux_loss_coef", 0.001)?;
    let config = ModelConfig { scales, router_aux_loss_coef, ..config };
    Ok(shared::with_attention(config, |attention| attention.scale = scale))
}

pub(super) fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    if let Some(moe) = config.moe() {
        map.insert("num_local_experts".into(), moe.n_experts.into());
        map.insert("num_experts_per_tok".into(), moe.router.top_k.into());
    }
    shared::write_balance(config, &mut map);
    map.insert("embedding_multiplier".into(), json!(config.scales.embedding));
    map.insert("residual_multiplier".into(), json!(config.scales.residual));
    map.insert("logits_scaling".into(), json!(1.0 / config.scales.logits));
    map.insert("attention_multiplier".into(), json!(shared::attention(config).scale));
    map.insert("attention_bias".into(), json!(false));
    map
}
