//! ERNIE 4.5 (Baidu 2025): experts chosen by softmax and a bias, weighed by softmax over their sum; shared experts;
//! neighbours turn together.

use super::keys::Keys;
use super::rope::RopeDefaults;
use super::tensors::Names;
use super::{Family, TensorMap, shared};
use crate::config::SharedExperts;
use crate::{Ffn, ModelConfig, ModelError};
use moebius_moe::{Normalise, RouterSettings};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "ernie4_5_moe",
    model_types: &["ernie4_5_moe"],
    architecture: "Ernie4_5_MoeForCausalLM",
    read,
    write,
    tensors,
};

const NAMES: Names = Names { selection_bias: "moe_statics.e_score_correction_bias", ..Names::LLAMA };

const DEFAULTS: shared::Defaults = shared::Defaults {
    rope: RopeDefaults::neighbours(5e5),
    rms_eps: 1e-5,
    max_positions: 131_072,
    n_kv_heads: Some(4),
    ..shared::Defaults::LLAMA
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let router = RouterSettings {
        selection_bias: true,
        normalise: Normalise::SumAtLeast { least: keys.number("moe_norm_min", 1e-12)? as f32 },
        ..RouterSettings::softmax(keys.size(keys.spelled(&["moe_k", "num_experts_per_tok"]))?, false)
    };
    let width = keys.size("moe_intermediate_size")?;
    let shared = match keys.optional_size("moe_num_shared_experts")?.unwrap_or(2) {
        0 => None,
        count => Some(SharedExperts { width: count.saturating_mul(width), gated: false }),
    };
    let n_experts = keys.size(keys.spelled(&["moe_num_experts", "num_experts", "num_local_experts"]))?;
    let ffn = Ffn::moe_with(n_experts, width, router, shared);
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    let size = |key: &str, otherwise: usize| keys.optional_size(key).map(|size| size.unwrap_or(otherwise));
    let (first, interval) = (size("moe_layer_start_index", 1)?, size("moe_layer_interval", 1)?.max(1));
    // −1 means the last layer.
    let last = match keys.get("moe_layer_end_index").and_then(Value::as_i64) {
        Some(-1) | None => config.n_layers() - 1,
        Some(_) => keys.size("moe_layer_end_index")?,
    };
    let is_dense = |layer: usize| !(first..=last).contains(&layer) || !(layer + 1).is_multiple_of(interval);
    let dense: Vec<bool> = (0..config.n_layers()).map(is_dense).collect();
    let config = ModelConfig {
        router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.001)?,
        tie_embeddings: keys.flag("tie_word_embeddings", true)?,
        ..config
    };
    shared::with_dense(keys, config, "num_hidden_layers", &dense, keys.size("intermediate_size")?)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    if let Some(moe) = config.moe() {
        map.insert("moe_num_experts".into(), moe.n_experts.into());
        map.insert("moe_k".into(), moe.router.top_k.into());
        map.insert("moe_intermediate_size".into(), moe.width.into());
        map.insert("moe_num_shared_experts".into(), moe.shared.map_or(0, |shared| shared.width / moe.width).into());
        if let Normalise::SumAtLeast { least } = moe.router.normalise {
            map.insert("moe_norm_min".into(), json!(shared::number(least)));
        }
    }
    shared::write_balance(config, &mut map);
    let sparse: Vec<usize> = (0..config.n_layers()).filter(|&layer| config.layers[layer].ffn.moe().is_some()).collect();
    let (first, last) = (sparse.first().copied().unwrap_or(0), sparse.last().copied().unwrap_or(0));
    let interval = sparse.windows(2).map(|pair| pair[1] - pair[0]).next().unwrap_or(1);
    map.insert("moe_layer_start_index".into(), first.into());
    map.insert("moe_layer_end_index".into(), last.into());
    map.insert("moe_layer_interval".into(), interval.into());
    map.insert("use_bias".into(), json!(false));
    map
}

/// As the names say, but the selection bias is a row of a matrix.
fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    let as_row = |map: TensorMap| match map.file_shape[..] {
        [len] if map.param.ends_with(".selection_bias") => TensorMap { file_shape: vec![1, len], ..map },
        _ => map,
    };
    NAMES.tensors(config).into_iter().map(as_row).collect()
}
