//! Qwen3-Next (Qwen team 2025): three layers of the gated delta rule to one of gated attention, of which a quarter of each
//! head turns; many small experts, one shared, its answer gated; norms by one plus the weight.

use super::hybrid::{self, extend, whole};
use super::keys::Keys;
use super::shared::{self, matrix, vector};
use super::{Family, TensorMap};
use crate::config::{
    AttentionConfig, DeltaNet, DeltaProjections, Gate, LayerConfig, Mixer, MoeFfn, Norm, Reach, SharedExperts,
};
use crate::{Ffn, ModelConfig, ModelError, QkNorm};
use moebius_moe::{Normalise, RouterSettings};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "qwen3_next",
    model_types: &["qwen3_next"],
    architecture: "Qwen3NextForCausalLM",
    read,
    write,
    tensors,
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let n_layers = shared::layer_count(keys)?;
    let renormalise = keys.flag("norm_topk_prob", true)?;
    let dense = dense_layers(keys, n_layers)?;
    read_as(keys, FAMILY.name, DeltaProjections::ByHead, 1e6, renormalise, &dense)
}

/// The inner width of the layers that have no experts.
fn dense_layers(keys: &Keys, n_layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
    let step = keys.optional_size("decoder_sparse_step")?.unwrap_or(1);
    let only = match keys.get("mlp_only_layers") {
        None => Vec::new(),
        Some(Value::Array(layers)) => layers.clone(),
        Some(other) => return Err(keys.error("mlp_only_layers", format!("wanted a list of layers, found {other}"))),
    };
    let width = keys.optional_size("intermediate_size")?.unwrap_or(5632);
    let is_sparse = |layer: usize| !only.contains(&layer.into()) && step > 0 && (layer + 1).is_multiple_of(step);
    Ok((0..n_layers).map(|layer| (!is_sparse(layer)).then_some(width)).collect())
}

/// Reads the keys that Qwen3-Next and its successor have in common; `dense` has the inner width of each layer without
/// experts.
pub(super) fn read_as(
    keys: &Keys,
    family: &str,
    projections: DeltaProjections,
    theta: f64,
    renormalise: bool,
    dense: &[Option<usize>],
) -> Result<ModelConfig, ModelError> {
    hybrid::refuse_other_arithmetic(keys, "hidden_act")?;
    let head_dim = keys.optional_size("head_dim")?.unwrap_or(256);
    let attention = Mixer::Attention(AttentionConfig {
        n_heads: keys.size("num_attention_heads")?,
        n_kv_heads: keys.size("num_key_value_heads")?,
        head_dim,
        reach: Reach::All,
        rope: Some(hybrid::rope(keys, theta, 0.25, head_dim)?),
        scale: (head_dim as f64).powf(-0.5),
        qk_norm: QkNorm::Head,
        qkv_bias: false,
        gated: true,
        o_bias: false,
        clip: None,
        sinks: false,
        soft_cap: None,
        temperature: None,
    });
    let net = Mixer::DeltaNet(DeltaNet {
        key_heads: keys.size("linear_num_key_heads")?,
        value_heads: keys.size("linear_num_value_heads")?,
        key_dim: keys.size("linear_key_head_dim")?,
        value_dim: keys.size("linear_value_head_dim")?,
        taps: keys.size("linear_conv_kernel_dim")?,
        projections,
    });
    let count = if keys.has("num_experts") { "num_experts" } else { "num_local_experts" };
    let experts = Ffn::Moe(MoeFfn {
        n_experts: keys.size(count)?,
        width: keys.size("moe_intermediate_size")?,
        router: RouterSettings::softmax(keys.size("num_experts_per_tok")?, renormalise),
        shared: Some(SharedExperts { width: keys.size("shared_expert_intermediate_size")?, gated: true }),
        gate: Gate::Silu,
        bias: false,
        output_bias: false,
    });
    let every = keys.optional_size("full_attention_interval")?.unwrap_or(4).max(1);
    let kinds =
        hybrid::attention_layers(keys, dense.len(), "linear_attention", |layer| (layer + 1).is_multiple_of(every))?;
    let layers = kinds.iter().zip(dense).map(|(&is_attention, dense)| LayerConfig {
        mixer: if is_attention { attention.clone() } else { net.clone() },
        ffn: dense.map_or(experts, Ffn::dense),
    });
    let norm = Norm::RmsFromOne { eps: keys.number("rms_norm_eps", 1e-6)? };
    let config = hybrid::config(keys, family, layers.collect(), norm, false)?;
    Ok(ModelConfig { router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.001)?, ..config })
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = write_as(config);
    let renormalise = config.moe().is_none_or(|moe| moe.router.normalise != Normalise::None);
    let dense: Vec<usize> = (0..config.n_layers()).filter(|&layer| config.layers[layer].ffn.moe().is_none()).collect();
    extend(
        &mut map,
        json!({
            "norm_topk_prob": renormalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
            "intermediate_size": config.dense().map_or(5632, |dense| dense.width),
        }),
    );
    map
}

/// Writes what [`read_as`] reads.
pub(super) fn write_as(config: &ModelConfig) -> Map<String, Value> {
    let mut map = hybrid::write(config);
    let kind = |layer: &LayerConfig| match layer.mixer {
        Mixer::Attention(_) => "full_attention",
        _ => "linear_attention",
    };
    extend(
        &mut map,
        json!({
            "hidden_act": "silu",
            "rms_norm_eps": config.norm.eps(),
            "layer_types": config.layers.iter().map(kind).collect::<Vec<_>>(),
            "attention_bias": false,
            "router_aux_loss_coef": config.router_aux_loss_coef,
            "output_router_logits": false,
        }),
    );
    if let Some(attention) = config.attention() {
        let rope = attention.rope.as_ref().expect("read with a rotation");
        extend(
            &mut map,
            json!({
                "num_attention_heads": attention.n_heads,
                "num_key_value_heads": attention.n_kv_heads,
                "head_dim": attention.head_dim,
                "rope_theta": rope.theta,
                "partial_rotary_factor": rope.dims as f64 / attention.head_dim as f64,
            }),
        );
    }
    let nets = config.layers.iter().find_map(|layer| match &layer.mixer {
        Mixer::DeltaNet(net) => Some(net),
        _ => None,
    });
    if let Some(net) = nets {
        extend(
            &mut map,
            json!({
                "linear_num_key_heads": net.key_heads,
                "linear_num_value_heads": net.value_heads,
                "linear_key_head_dim": net.key_dim,
                "linear_value_head_dim": net.value_dim,
                "linear_conv_kernel_dim": net.taps,
            }),
        );
    }
    if let Some(moe) = config.moe() {
        extend(
            &mut map,
            json!({
                "num_experts": moe.n_experts,
                "num_experts_per_tok": moe.router.top_k,
                "moe_intermediate_size": moe.width,
                "shared_expert_intermediate_size": moe.shared.map_or(0, |shared| shared.width),
            }),
        );
    }
    map
}

pub(super) fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    let hidden = config.hidden;
    hybrid::tensors(config, "model.norm", |theirs, ours, layer| {
        let mut all = vec![vector(&format!("{theirs}.input_layernorm"), &format!("{ours}.attention_norm"), hidden)];
        match &layer.mixer {
            Mixer::Attention(attention) => {
                let (theirs, ours) = (format!("{theirs}.self_attn"), format!("{ours}.attention"));
                all.extend(shared::attention_tensors(attention, hidden, &theirs, &ours));
            }
            Mixer::DeltaNet(net) => {
                all.extend(net_tensors(net, hidden, &format!("{theirs}.linear_attn"), &format!("{ours}.delta")));
            }
            other => unreachable!("read without {other:?}"),
        }
        all.push(vector(&format!("{theirs}.post_attention_layernorm"), &format!("{ours}.ffn_norm"), hidden));
        let theirs = format!("{theirs}.mlp");
        match &layer.ffn {
            Ffn::Dense(network) => {
                all.extend(shared::network_tensors(network.width, hidden, &theirs, &format!("{ours}.mlp")));
            }
            Ffn::Moe(moe) => {
                let ours = format!("{ours}.moe");
                all.extend(shared::expert_tensors(moe, hidden, &theirs, &ours, shared::PROJECTIONS));
                let shared_width = moe.shared.map_or(0, |shared| shared.width);
                let network = (format!("{theirs}.shared_expert"), format!("{ours}.shared"));
                all.extend(shared::network_tensors(shared_width, hidden, &network.0, &network.1));
                all.push(matrix(&format!("{theirs}.shared_expert_gate"), &format!("{ours}.shared.gate"), 1, hidden));
            }
        }
        all
    })
}

fn net_tensors(net: &DeltaNet, hidden: usize, theirs: &str, ours: &str) -> Vec<TensorMap> {
    let (mixed, values, heads) = (net.mixed_width(), net.value_width(), net.value_heads);
    let projections: &[(&str, &str, usize)] = match net.projections {
        DeltaProjections::ByHead => &[("in_proj_qkvz", "qkvz", mixed + values), ("in_proj_ba", "ba", 2 * heads)],
        DeltaProjections::ByKind => &[
            ("in_proj_qkv", "qkv", mixed),
            ("in_proj_z", "z", values),
            ("in_proj_b", "b", heads),
            ("in_proj_a", "a", heads),
        ],
    };
    let mut all: Vec<TensorMap> = (projections.iter())
        .map(|(name, part, rows)| matrix(&format!("{theirs}.{name}"), &format!("{ours}.{part}"), *rows, hidden))
        .collect();
    all.push(whole(&format!("{theirs}.conv1d.weight"), &format!("{ours}.taps"), &[mixed, 1, net.taps]));
    all.push(whole(&format!("{theirs}.dt_bias"), &format!("{ours}.dt_bias"), &[heads]));
    all.push(whole(&format!("{theirs}.A_log"), &format!("{ours}.rates"), &[heads]));
    all.push(vector(&format!("{theirs}.norm"), &format!("{ours}.norm"), net.value_dim));
    all.push(matrix(&format!("{theirs}.out_proj"), &format!("{ours}.o"), hidden, values));
    all
}
