//! Our own layout, for what no published family expresses: any routing method, and dense layers between those with
//! experts (`docs/moebius-layout.md`).

use super::keys::Keys;
use super::tensors::{self, Names};
use super::{Family, TensorMap, shared};
use crate::config::{DepthSampler, DepthsConfig, Gate, MoeFfn};
use crate::{Ffn, ModelConfig, ModelError, QkNorm, methods};
use moebius_moe::routers::MethodConfig;
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family =
    Family { name: "moebius", model_types: &["moebius"], architecture: "MoebiusForCausalLM", read, write, tensors };

const DEFAULTS: shared::Defaults =
    shared::Defaults { rms_eps: 1e-5, understood: &["hidden_act"], ..shared::Defaults::LLAMA };

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let gate = read_gate(keys, "hidden_act", Gate::Silu)?;
    let dense_gate = read_gate(keys, "dense_hidden_act", gate)?;
    let dense = Ffn::dense(keys.size("intermediate_size")?).with_gate(dense_gate);
    let every = keys.size("decoder_sparse_step")?;
    if every == 0 {
        return Err(keys.error("decoder_sparse_step", "wanted at least 1, found 0"));
    }
    let mut sparse = dense;
    if keys.has("num_experts") {
        let (n_experts, top_k) = (keys.size("num_experts")?, keys.size("num_experts_per_tok")?);
        sparse = Ffn::moe_of(n_experts, top_k, keys.size("moe_intermediate_size")?, true).with_gate(gate);
    }
    let mut config = shared::read(keys, FAMILY.name, dense, None, &DEFAULTS)?;
    for (index, layer) in config.layers.iter_mut().enumerate() {
        layer.ffn = if (index + 1).is_multiple_of(every) { sparse } else { dense };
    }
    let qk_norm = read_norm(keys)?;
    config = shared::with_attention(config, |attention| attention.qk_norm = qk_norm);
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

/// What `config.json` calls a non-linearity.
const GATES: [(&str, Gate); 2] = [("silu", Gate::Silu), ("gelu_pytorch_tanh", Gate::GeluTanh)];

/// What `config.json` calls the norm of queries and keys.
const NORMS: [(&str, QkNorm); 3] = [("none", QkNorm::None), ("head", QkNorm::Head), ("projection", QkNorm::Projection)];

fn read_norm(keys: &Keys) -> Result<QkNorm, ModelError> {
    if !keys.has("qk_norm") {
        return Ok(QkNorm::None);
    }
    let name = keys.text("qk_norm")?;
    let found = NORMS.iter().find(|(known, _)| *known == name).map(|(_, norm)| *norm);
    found.ok_or_else(|| keys.error("qk_norm", format!("wanted none, head or projection, found {name:?}")))
}

fn read_gate(keys: &Keys, key: &str, default: Gate) -> Result<Gate, ModelError> {
    if !keys.has(key) {
        return Ok(default);
    }
    let name = keys.text(key)?;
    let found = GATES.iter().find(|(known, _)| *known == name).map(|(_, gate)| *gate);
    found.ok_or_else(|| keys.error(key, format!("wanted silu or gelu_pytorch_tanh, found {name:?}")))
}

/// The name of a gate; recipes make no others.
fn gate_name(gate: Gate) -> &'static str {
    GATES.iter().find(|(_, known)| *known == gate).map_or("silu", |(name, _)| name)
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
    let norm = shared::attention(config).qk_norm;
    let norm = NORMS.iter().find(|(_, known)| *known == norm).map_or("none", |(name, _)| name);
    map.insert("qk_norm".into(), norm.into());
    let gates = [config.moe().map(|moe| moe.gate), config.dense().map(|dense| dense.gate)];
    map.insert("hidden_act".into(), gates.iter().flatten().next().map_or("silu", |&gate| gate_name(gate)).into());
    if let [Some(_), Some(gate)] = gates {
        map.insert("dense_hidden_act".into(), gate_name(gate).into());
    }
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
    let mut all = Names::LLAMA.tensors(config);
    for (layer, parts) in config.layers.iter().enumerate() {
        all.extend(depth_tensors(config, layer));
        if let (Ffn::Moe(moe), Some(method)) = (&parts.ffn, &config.routing) {
            let (theirs, ours) = (format!("model.layers.{layer}.mlp"), format!("layers.{layer}.moe"));
            // The method's weights stand in place of the family router's.
            all.retain(|map| map.param != format!("{ours}.router"));
            all.extend(router_tensors(config, moe, method, [&theirs, &ours]));
        }
    }
    all
}

/// The router around a layer, and its sampler.
fn depth_tensors(config: &ModelConfig, layer: usize) -> Vec<TensorMap> {
    let Some(depths) = config.depths.filter(|depths| depths.applies(layer)) else { return Vec::new() };
    let of = |name: &str, rows, cols| {
        tensors::matrix(&format!("model.layers.{layer}.{name}"), &format!("layers.{layer}.{name}"), rows, cols)
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
        TensorMap::whole(format!("{theirs}.{name}.weight"), &shape, format!("{ours}.{name}"), 0..rows)
    };
    weights.into_iter().map(map).collect()
}
