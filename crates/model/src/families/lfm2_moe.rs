//! LFM2-MoE (Liquid AI 2025): short convolutions and a few layers of attention; experts chosen by the logistic function of
//! their scores plus a bias, weighed without it; the first layers without experts.

use super::hybrid::{self, extend, whole};
use super::keys::Keys;
use super::shared::{self, matrix, vector};
use super::{Family, TensorMap};
use crate::config::{AttentionConfig, Gate, LayerConfig, Mixer, MoeFfn, Norm, Reach, ShortConvolution};
use crate::{Ffn, ModelConfig, ModelError, QkNorm};
use moebius_moe::{Normalise, RouterSettings, Score};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family =
    Family { name: "lfm2_moe", model_types: &["lfm2_moe"], architecture: "Lfm2MoeForCausalLM", read, write, tensors };

/// Added to the sum that renormalised weights are divided by.
const WEIGHT_EPS: f32 = 1e-6;

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    hybrid::refuse_other_arithmetic(keys, "hidden_act")?;
    let head_dim = hybrid::head_dim(keys)?;
    let attention = Mixer::Attention(AttentionConfig {
        n_heads: keys.size("num_attention_heads")?,
        n_kv_heads: keys.size("num_key_value_heads")?,
        head_dim,
        reach: Reach::All,
        rope: Some(hybrid::rope(keys, 1e6, 1.0, head_dim)?),
        scale: (head_dim as f64).powf(-0.5),
        qk_norm: QkNorm::Head,
        qkv_bias: false,
        gated: false,
        o_bias: false,
        clip: None,
        sinks: false,
        soft_cap: None,
        temperature: None,
    });
    let convolution = Mixer::ShortConvolution(ShortConvolution {
        taps: keys.optional_size("conv_L_cache")?.unwrap_or(3),
        bias: keys.flag("conv_bias", false)?,
    });
    let count = if keys.has("num_experts") { "num_experts" } else { "num_local_experts" };
    let renormalise = keys.flag("norm_topk_prob", true)?;
    let experts = Ffn::Moe(MoeFfn {
        n_experts: keys.size(count)?,
        width: keys.size("moe_intermediate_size")?,
        router: RouterSettings {
            score: Score::Sigmoid,
            selection_bias: keys.flag("use_expert_bias", true)?,
            normalise: if renormalise { Normalise::Sum { plus: WEIGHT_EPS } } else { Normalise::None },
            scale: keys.number("routed_scaling_factor", 1.0)? as f32,
            ..RouterSettings::softmax(keys.size("num_experts_per_tok")?, false)
        },
        shared: None,
        gate: Gate::Silu,
        bias: false,
        output_bias: false,
    });
    let dense = Ffn::dense(keys.size("intermediate_size")?);
    let n_dense = keys.optional_size("num_dense_layers")?.unwrap_or(2);
    let n_layers = shared::layer_count(keys)?;
    if !keys.has("layer_types") {
        return Err(keys.error("layer_types", "wanted `conv` or `full_attention` for each layer, found nothing"));
    }
    let kinds = hybrid::attention_layers(keys, n_layers, "conv", |_| false)?;
    let layers = kinds.iter().enumerate().map(|(layer, &is_attention)| LayerConfig {
        mixer: if is_attention { attention.clone() } else { convolution.clone() },
        ffn: if layer < n_dense { dense } else { experts },
    });
    let norm = Norm::Rms { eps: keys.number("norm_eps", 1e-5)? };
    // Hub files also spell it `tie_embedding`.
    let tied = keys.flag("tie_embedding", true)?;
    hybrid::config(keys, FAMILY.name, layers.collect(), norm, tied)
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = hybrid::write(config);
    let kind = |layer: &LayerConfig| match layer.mixer {
        Mixer::Attention(_) => "full_attention",
        _ => "conv",
    };
    let n_dense = config.layers.iter().take_while(|layer| layer.ffn.moe().is_none()).count();
    extend(
        &mut map,
        json!({
            "norm_eps": config.norm.eps(),
            "layer_types": config.layers.iter().map(kind).collect::<Vec<_>>(),
            "num_dense_layers": n_dense,
            "intermediate_size": config.dense().map_or(1, |dense| dense.width),
        }),
    );
    if let Some(attention) = config.attention() {
        let theta = attention.rope.as_ref().expect("read with a rotation").theta;
        extend(
            &mut map,
            json!({
                "num_attention_heads": attention.n_heads,
                "num_key_value_heads": attention.n_kv_heads,
                "head_dim": attention.head_dim,
                "rope_theta": theta,
            }),
        );
    }
    for layer in &config.layers {
        if let Mixer::ShortConvolution(convolution) = &layer.mixer {
            extend(&mut map, json!({"conv_L_cache": convolution.taps, "conv_bias": convolution.bias}));
        }
    }
    if let Some(moe) = config.moe() {
        extend(
            &mut map,
            json!({
                "num_experts": moe.n_experts,
                "num_experts_per_tok": moe.router.top_k,
                "moe_intermediate_size": moe.width,
                "use_expert_bias": moe.router.selection_bias,
                "norm_topk_prob": moe.router.normalise != Normalise::None,
                "routed_scaling_factor": moe.router.scale,
            }),
        );
    }
    map
}

fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    let hidden = config.hidden;
    hybrid::tensors(config, "model.embedding_norm", |theirs, ours, layer| {
        let mut all = vec![vector(&format!("{theirs}.operator_norm"), &format!("{ours}.attention_norm"), hidden)];
        match &layer.mixer {
            Mixer::Attention(attention) => {
                all.extend(attention_tensors(attention, hidden, &format!("{theirs}.self_attn"), ours));
            }
            Mixer::ShortConvolution(convolution) => {
                all.extend(convolution_tensors(convolution, hidden, &format!("{theirs}.conv"), ours));
            }
            other => unreachable!("read without {other:?}"),
        }
        all.push(vector(&format!("{theirs}.ffn_norm"), &format!("{ours}.ffn_norm"), hidden));
        let theirs = format!("{theirs}.feed_forward");
        match &layer.ffn {
            Ffn::Dense(network) => {
                let ours = format!("{ours}.mlp");
                all.extend(hybrid::named_network(network.width, hidden, &theirs, &ours, shared::NUMBERED));
            }
            Ffn::Moe(moe) => {
                let ours = format!("{ours}.moe");
                all.extend(shared::expert_tensors(moe, hidden, &theirs, &ours, shared::NUMBERED));
                if moe.router.selection_bias {
                    let bias = format!("{theirs}.expert_bias");
                    all.push(whole(&bias, &format!("{ours}.selection_bias"), &[moe.n_experts]));
                }
            }
        }
        all
    })
}

fn attention_tensors(attention: &AttentionConfig, hidden: usize, theirs: &str, ours: &str) -> Vec<TensorMap> {
    let (queries, keys) = (attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim);
    let ours = |name: &str| format!("{ours}.attention.{name}");
    vec![
        matrix(&format!("{theirs}.q_proj"), &ours("q"), queries, hidden),
        matrix(&format!("{theirs}.k_proj"), &ours("k"), keys, hidden),
        matrix(&format!("{theirs}.v_proj"), &ours("v"), keys, hidden),
        matrix(&format!("{theirs}.out_proj"), &ours("o"), hidden, queries),
        vector(&format!("{theirs}.q_layernorm"), &ours("q_norm"), attention.head_dim),
        vector(&format!("{theirs}.k_layernorm"), &ours("k_norm"), attention.head_dim),
    ]
}

fn convolution_tensors(convolution: &ShortConvolution, hidden: usize, theirs: &str, ours: &str) -> Vec<TensorMap> {
    let ours = |name: &str| format!("{ours}.convolution.{name}");
    let mut all = vec![
        matrix(&format!("{theirs}.in_proj"), &ours("in"), 3 * hidden, hidden),
        whole(&format!("{theirs}.conv.weight"), &ours("taps"), &[hidden, 1, convolution.taps]),
        matrix(&format!("{theirs}.out_proj"), &ours("o"), hidden, hidden),
    ];
    if convolution.bias {
        all.push(whole(&format!("{theirs}.in_proj.bias"), &ours("in_bias"), &[3 * hidden]));
        all.push(whole(&format!("{theirs}.conv.bias"), &ours("taps_bias"), &[hidden]));
        all.push(whole(&format!("{theirs}.out_proj.bias"), &ours("o_bias"), &[hidden]));
    }
    all
}
