//! Hunyuan-A13B and relatives (Tencent 2025): softmax, renormalised; a shared expert; heads normed after they turn.

use super::keys::Keys;
use super::tensors::Names;
use super::{Family, shared};
use crate::config::SharedExperts;
use crate::{Ffn, ModelConfig, ModelError, QkNorm};
use moebius_moe::RouterSettings;
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "hunyuan_v1_moe",
    model_types: &["hunyuan_v1_moe"],
    architecture: "HunYuanMoEV1ForCausalLM",
    read,
    write,
    tensors: |config| NAMES.tensors(config),
};

const NAMES: Names =
    Names { router: "gate.wg", shared: "shared_mlp", qk_norms: ["query_layernorm", "key_layernorm"], ..Names::LLAMA };

const DEFAULTS: shared::Defaults =
    shared::Defaults { rms_eps: 1e-5, understood: &["use_qk_norm"], ..shared::Defaults::LLAMA };

/// A number, or the same for each layer.
fn uniform(keys: &Keys, key: &'static str) -> Result<usize, ModelError> {
    let Some(Value::Array(_)) = keys.get(key) else { return keys.size(key) };
    let wanted = "a whole number, or the same one for each layer";
    let numbers = keys.list(key, wanted, |number| number.as_u64().and_then(|number| usize::try_from(number).ok()))?;
    match numbers.first() {
        Some(first) if numbers.iter().all(|number| number == first) => Ok(*first),
        _ => Err(keys.error(key, format!("wanted {wanted}, found {numbers:?}"))),
    }
}

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.only("use_qk_norm", json!(true))?;
    keys.only("use_cla", json!(false))?;
    let (n_experts, top_k) = (uniform(keys, "num_experts")?, uniform(keys, "moe_topk")?);
    let width = if keys.has("moe_intermediate_size") { "moe_intermediate_size" } else { "intermediate_size" };
    let width = uniform(keys, width)?;
    let shared = if keys.has("num_shared_expert") { uniform(keys, "num_shared_expert")? } else { 1 };
    let shared = SharedExperts { width: shared.saturating_mul(keys.size("intermediate_size")?), gated: false };
    let ffn = Ffn::moe_with(n_experts, width, RouterSettings::softmax(top_k, true), Some(shared));
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    Ok(shared::with_attention(config, |attention| attention.qk_norm = QkNorm::HeadTurned))
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    if let Some(moe) = config.moe() {
        map.insert("num_experts".into(), moe.n_experts.into());
        map.insert("moe_topk".into(), moe.router.top_k.into());
        map.insert("moe_intermediate_size".into(), moe.width.into());
        map.insert("intermediate_size".into(), moe.shared.map_or(moe.width, |shared| shared.width).into());
        map.insert("num_shared_expert".into(), json!(1));
    }
    map.insert("attention_bias".into(), json!(false));
    map.insert("use_qk_norm".into(), json!(true));
    map
}
