//! GLM-4.5 (Zeng et al. 2025): DeepSeek-V3's experts with grouped-query attention, half of a head turning.

use super::keys::Keys;
use super::rope::RopeDefaults;
use super::tensors::Names;
use super::{Family, shared};
use crate::{Ffn, ModelConfig, ModelError, QkNorm};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "glm4_moe",
    model_types: &["glm4_moe"],
    architecture: "Glm4MoeForCausalLM",
    read,
    write,
    tensors: |config| Names::LLAMA.tensors(config),
};

const DEFAULTS: shared::Defaults = shared::Defaults {
    rope: RopeDefaults { partial: 0.5, ..RopeDefaults::halves(1e4) },
    rms_eps: 1e-5,
    max_positions: 131_072,
    n_kv_heads: Some(8),
    understood: &["attention_bias", "use_qk_norm"],
    ..shared::Defaults::LLAMA
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let moe = shared::read_sigmoid_experts(keys, 1.0)?;
    let config = shared::read(keys, FAMILY.name, Ffn::Moe(moe), None, &DEFAULTS)?;
    let qkv_bias = keys.flag("attention_bias", false)?;
    let qk_norm = if keys.flag("use_qk_norm", false)? { QkNorm::Head } else { QkNorm::None };
    let config = shared::with_attention(config, |attention| {
        attention.qkv_bias = qkv_bias;
        attention.qk_norm = qk_norm;
    });
    shared::with_dense_first(keys, config, 1)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    shared::write_deepseek_experts(config, &mut map);
    let attention = shared::attention(config);
    map.insert("attention_bias".into(), json!(attention.qkv_bias));
    map.insert("use_qk_norm".into(), json!(attention.qk_norm == QkNorm::Head));
    // Absent means half.
    let turning = attention.rope.as_ref().map_or(0, |rope| rope.dims);
    map.insert("partial_rotary_factor".into(), json!(turning as f64 / attention.head_dim as f64));
    map
}
