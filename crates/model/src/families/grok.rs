//! Grok-1 (xAI 2024): norms before and after attention and experts, scores under a soft cap, GELU gates, two experts by
//! softmax that is not renormalised, constant factors of embedding, scores and logits.
//!
//! xAI's own files are one pickle a tensor; names and keys are those of the safetensors conversions on the hub.

use super::keys::Keys;
use super::rope::RopeDefaults;
use super::tensors::{ExpertTensors, Names};
use super::{Family, TensorMap, shared};
use crate::config::{Gate, MoeFfn, NormPlace, Scales};
use crate::{Ffn, ModelConfig, ModelError};
use moebius_moe::RouterSettings;
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family =
    Family { name: "grok-1", model_types: &["grok-1"], architecture: "Grok1ModelForCausalLM", read, write, tensors };

const NAMES: Names = Names {
    mixer_norms: ["pre_attn_norm", "post_attn_norm"],
    attention: "attn",
    ffn_norms: ["pre_moe_norm", "post_moe_norm"],
    moe: "moe_block",
    experts: ExpertTensors::Separate(["linear", "linear_v", "linear_1"]),
    ..Names::LLAMA
};

const DEFAULTS: shared::Defaults = shared::Defaults {
    rope: RopeDefaults::halves(1e4),
    rms_eps: 1e-5,
    max_positions: 8192,
    n_kv_heads: Some(8),
    understood: &["hidden_act"],
    ..shared::Defaults::LLAMA
};

/// The cap of the scores in xAI's program, which some conversions do not spell out.
const SOFT_CAP: f64 = 30.0;

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    // JAX's gelu is the tanh form.
    keys.only("hidden_act", json!("gelu"))?;
    let ffn = Ffn::Moe(MoeFfn {
        n_experts: keys.size(keys.spelled(&["num_experts", "num_local_experts"]))?,
        width: keys.size("intermediate_size")?,
        gate: Gate::GeluTanh,
        bias: false,
        router: RouterSettings::softmax(keys.size("num_experts_per_tok")?, false),
        shared: None,
        output_bias: false,
    });
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    // Conversions disagree on what their absence means.
    let scale = keys.needed_number("attn_output_multiplier")?;
    let embedding = keys.needed_number("embedding_multiplier_scale")?;
    let logits = keys.needed_number("output_multiplier_scale")?;
    let soft_cap = Some(keys.number("max_attn_value", SOFT_CAP)?);
    let config = ModelConfig {
        norm_place: NormPlace::Both,
        scales: Scales { embedding, residual: 1.0, logits },
        tie_embeddings: keys.flag("tie_word_embeddings", true)?,
        router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.001)?,
        ..config
    };
    Ok(shared::with_attention(config, |attention| (attention.scale, attention.soft_cap) = (scale, soft_cap)))
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    let attention = shared::attention(config);
    if let Some(moe) = config.moe() {
        map.insert("num_experts".into(), moe.n_experts.into());
        map.insert("num_experts_per_tok".into(), moe.router.top_k.into());
    }
    shared::write_balance(config, &mut map);
    map.insert("hidden_act".into(), json!("gelu"));
    map.insert("attn_output_multiplier".into(), json!(attention.scale));
    map.insert("max_attn_value".into(), json!(attention.soft_cap));
    map.insert("embedding_multiplier_scale".into(), json!(config.scales.embedding));
    map.insert("output_multiplier_scale".into(), json!(config.scales.logits));
    map
}

/// As the names say, but norms have scales instead of weights.
fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    let as_scale = |map: TensorMap| match map.file_name.strip_suffix("norm.weight") {
        Some(theirs) => TensorMap { file_name: format!("{theirs}norm.scale"), ..map },
        None => map,
    };
    NAMES.tensors(config).into_iter().map(as_scale).collect()
}
