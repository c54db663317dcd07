//! Our own layout, for what no published family expresses: any routing method, and dense layers between those with
//! experts (`docs/moebius-layout.md`).

use super::keys::Keys;
use super::{Family, TensorMap, shared};
use crate::config::{DepthSampler, DepthsConfig, MoeFfn};
use crate::{Ffn, ModelConfig, ModelError, methods};
use moebius_moe::routers::MethodConfig;
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family =
    Family { name: "moebius", model_types: &["moebius"], architecture: "MoebiusForCausalLM", read, write, tensors };

const DEFAULTS: shared::Defaults =
    shared::Defaults { rope_theta: 1e4, rms_eps: 1e-5, max_positions: 2048, n_kv_heads: None, head_dim: None };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let dense = Ffn::dense(keys.size("intermediate_size")?);
    let every = keys.size("decoder_sparse_step")?;
    if every == 0 {
        return Err(keys.error("decoder_sparse_step", "wanted at least 1, found 0"));
    }
    let mut sparse = dense;
    if keys.has("num_experts") {
        let (n_experts, top_k) = (keys.size("num_experts")?, keys.size("num_experts_per_tok")?);
        sparse = Ffn::moe_of(n_experts, top_k, keys.size("moe_intermediate_size")?, true);
    }
    let mut config = shared::read(keys, FAMILY.name, dense, None, &DEFAULTS)?;
    for (index, layer) in config.layers.iter_mut().enumerate() {
        layer.ffn = if (index + 1).is_multiple_of(every) { sparse } else { dense };
    }
    config.depths = keys.object("depths")?.map(|depths| read_depths(&depths)).transpose()?;
    config.routing = match keys.get("router") {
        None => None,
        Some(router) => {
            let Some(name) = router.get("name").and_then(Value::as_str) else {
                return Err(keys.error("router", format!("wanted an object with a name, found {router}")));
            };
            let options = methods::read_options(router.get("options"), keys.file())?;
            Some(MethodConfig { name: name.to_owned(), options })
        }
    };
    Ok(ModelConfig { router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.0)?, ..config })
}

fn read_depths(keys: &Keys) -> Result<DepthsConfig, ModelError> {
    let sampler = match keys.text("sampler")? {
        "threshold" => DepthSampler::Threshold,
        "random" => DepthSampler::Random,
        "predictor" => DepthSampler::Predictor { width: keys.size("predictor_width")? },
        found => {
            let message = format!("wanted threshold, predictor or random, found {found:?}");
            return Err(keys.error("sampler", message));
        }
    };
    let (share, every) = (keys.number("share", f64::NAN)?, keys.size("every")?);
    Ok(DepthsConfig { share, every, sampler, sampler_loss: keys.number("sampler_loss", 0.0)? })
}

fn write_depths(depths: &DepthsConfig) -> Value {
    let DepthsConfig { share, every, sampler, sampler_loss } = *depths;
    let mut map = json!({"share": share, "every": every, "sampler_loss": sampler_loss});
    map["sampler"] = match sampler {
        DepthSampler::Threshold => "threshold".into(),
        DepthSampler::Random => "random".into(),
        DepthSampler::Predictor { width } => {
            map["predictor_width"] = width.into();
            "predictor".into()
        }
    };
    map
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    let every = config.layers.iter().position(|layer| layer.ffn.moe().is_some()).map_or(1, |first| first + 1);
    map.insert("decoder_sparse_step".into(), every.into());
    map.insert("intermediate_size".into(), config.dense().map_or(config.layers[0].ffn.width(), |d| d.width).into());
    if let Some(moe) = config.moe() {
        map.insert("num_experts".into(), moe.n_experts.into());
        map.insert("num_experts_per_tok".into(), moe.router.top_k.into());
        map.insert("moe_intermediate_size".into(), moe.width.into());
    }
    if let Some(MethodConfig { name, options }) = &config.routing {
        map.insert("router".into(), json!({"name": name, "options": methods::write_options(options)}));
    }
    if let Some(depths) = &config.depths {
        map.insert("depths".into(), write_depths(depths));
    }
    map.insert("router_aux_loss_coef".into(), json!(config.router_aux_loss_coef));
    map
}

fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    shared::tensors(config, |layer| {
        let mut all = depth_tensors(config, layer);
        match (&config.layers[layer].ffn, &config.routing) {
            (Ffn::Moe(moe), Some(method)) => {
                let (theirs, ours) = (format!("model.layers.{layer}.mlp"), format!("layers.{layer}.moe"));
                all.extend(router_tensors(config, moe, method, [&theirs, &ours]));
                all.extend(shared::bank_tensors(moe, config.hidden, &theirs, &ours, shared::PROJECTIONS));
            }
            _ => all.extend(shared::feed_forward_tensors(config, layer, ["mlp", "mlp"], shared::PROJECTIONS)),
        }
        all
    })
}

/// The router around a layer, and its sampler.
fn depth_tensors(config: &ModelConfig, layer: usize) -> Vec<TensorMap> {
    let Some(depths) = config.depths.filter(|depths| depths.applies(layer)) else { return Vec::new() };
    let of = |name: &str, rows, cols| {
        shared::matrix(&format!("model.layers.{layer}.{name}"), &format!("layers.{layer}.{name}"), rows, cols)
    };
    let mut all = vec![of("depth_router", 1, config.hidden)];
    if let DepthSampler::Predictor { width } = depths.sampler {
        all.extend([of("depth_inner", width, config.hidden), of("depth_outer", 1, width)]);
    }
    all
}

/// The weights of a method under their own names.
fn router_tensors(
    config: &ModelConfig,
    moe: &MoeFfn,
    method: &MethodConfig,
    [theirs, ours]: [&str; 2],
) -> Vec<TensorMap> {
    // A configuration is validated before its tensors are asked for, so the method is one that can be built.
    let weights = method.weights(&config.method_layer(moe)).unwrap_or_default();
    let map = |(name, shape): (String, Vec<usize>)| {
        let rows = if shape.len() == 1 { 1 } else { shape[..shape.len() - 1].iter().product() };
        TensorMap {
            file_name: format!("{theirs}.{name}.weight"),
            file_shape: shape,
            param: format!("{ours}.{name}"),
            rows: 0..rows,
        }
    };
    weights.into_iter().map(map).collect()
}
