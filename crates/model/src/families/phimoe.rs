//! Phi-3.5-MoE (Abdin et al. 2024): two experts by SparseMixer; layer norms; biases of attention and head.

use super::keys::Keys;
use super::rope::RopeDefaults;
use super::tensors::{self, Names};
use super::{Family, shared};
use crate::config::Norm;
use crate::{Ffn, ModelConfig, ModelError};
use moebius_moe::{RouterSettings, Score};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "phimoe",
    model_types: &["phimoe"],
    architecture: "PhimoeForCausalLM",
    read,
    write,
    tensors: |config| NAMES.tensors(config),
};

const NAMES: Names = Names { moe: "block_sparse_moe", experts: tensors::NUMBERED, ..Names::LLAMA };

const DEFAULTS: shared::Defaults = shared::Defaults {
    rope: RopeDefaults::halves(1e6),
    rms_eps: 1e-5,
    max_positions: 4096 * 32,
    n_kv_heads: Some(8),
    understood: &["attention_bias", "lm_head_bias"],
    ..shared::Defaults::LLAMA
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let score = Score::SparseMixer { jitter: keys.number("router_jitter_noise", 0.01)? as f32 };
    let top_k = keys.optional_size("num_experts_per_tok")?.unwrap_or(2);
    let router = RouterSettings { score, ..RouterSettings::softmax(top_k, false) };
    let ffn = Ffn::moe_with(keys.size("num_local_experts")?, keys.size("intermediate_size")?, router, None);
    let config = shared::read(keys, FAMILY.name, ffn, keys.optional_size("sliding_window")?, &DEFAULTS)?;
    let bias = keys.flag("attention_bias", false)?;
    let config = ModelConfig {
        norm: Norm::Layer { eps: config.norm.eps(), bias: true },
        head_bias: keys.flag("lm_head_bias", false)?,
        router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.001)?,
        ..config
    };
    Ok(shared::with_attention(config, |attention| (attention.qkv_bias, attention.o_bias) = (bias, bias)))
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    if let Some(moe) = config.moe() {
        map.insert("num_local_experts".into(), moe.n_experts.into());
        map.insert("num_experts_per_tok".into(), moe.router.top_k.into());
        if let Score::SparseMixer { jitter } = moe.router.score {
            map.insert("router_jitter_noise".into(), json!(shared::number(jitter)));
        }
    }
    shared::write_balance(config, &mut map);
    map.insert("attention_bias".into(), json!(shared::attention(config).o_bias));
    map.insert("lm_head_bias".into(), json!(config.head_bias));
    map.insert("sliding_window".into(), json!(shared::attention(config).reach.window()));
    map
}
