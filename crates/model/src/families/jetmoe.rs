//! JetMoE (Shen et al. 2024): experts of attention heads as well as of networks, the best of each chosen by the scores and
//! weighed by their softmax, a bias behind each mixture.

use super::hybrid::{self, extend, whole};
use super::keys::Keys;
use super::shared::{self, matrix, vector};
use super::{Family, TensorMap};
use crate::config::{Gate, HeadMixture, LayerConfig, Mixer, MoeFfn, Norm};
use crate::{Ffn, ModelConfig, ModelError};
use moebius_moe::{RouterSettings, Score};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family =
    Family { name: "jetmoe", model_types: &["jetmoe"], architecture: "JetMoeForCausalLM", read, write, tensors };

/// What the norms inside layers add to the mean square, whatever `rms_norm_eps` says of the last one.
const LAYER_EPS: f64 = 1e-6;

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    hybrid::refuse_other_arithmetic(keys, "activation_function")?;
    let n_experts = keys.size("num_local_experts")?;
    let top_k = keys.optional_size("num_experts_per_tok")?.unwrap_or(2);
    let router = RouterSettings { score: Score::SoftmaxOfChosen, ..RouterSettings::softmax(top_k, false) };
    let n_kv_heads = keys.optional_size("num_key_value_heads")?.unwrap_or(16);
    if let Some(heads) =
        keys.optional_size("num_attention_heads")?.filter(|&heads| Some(heads) != n_kv_heads.checked_mul(top_k))
    {
        let message = format!(
            "wanted num_key_value_heads {n_kv_heads} for each of the num_experts_per_tok {top_k}, found {heads}"
        );
        return Err(keys.error("num_attention_heads", message));
    }
    let head_dim = keys.optional_size("kv_channels")?.unwrap_or(128);
    let mixer = Mixer::HeadMixture(HeadMixture {
        n_experts,
        router,
        n_kv_heads,
        head_dim,
        rope: Some(hybrid::rope(keys, 1e4, 1.0, head_dim)?),
        scale: (head_dim as f64).powf(-0.5),
    });
    let ffn = Ffn::Moe(MoeFfn {
        n_experts,
        width: keys.size("intermediate_size")?,
        router,
        shared: None,
        gate: Gate::Silu,
        bias: false,
        output_bias: true,
    });
    let layers = vec![LayerConfig { mixer, ffn }; shared::layer_count(keys)?];
    let config = hybrid::config(keys, FAMILY.name, layers, Norm::Rms { eps: LAYER_EPS }, true)?;
    Ok(ModelConfig {
        head_bias: false,
        last_norm: Some(Norm::Rms { eps: keys.number("rms_norm_eps", 1e-6)? }),
        router_aux_loss_coef: keys.number("aux_loss_coef", 0.01)?,
        ..config
    })
}

/// The attention and the networks that all layers have.
fn parts(config: &ModelConfig) -> (&HeadMixture, &MoeFfn) {
    match &config.layers[0] {
        LayerConfig { mixer: Mixer::HeadMixture(heads), ffn: Ffn::Moe(moe) } => (heads, moe),
        other => unreachable!("read without {other:?}"),
    }
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let (heads, moe) = parts(config);
    let mut map = hybrid::write(config);
    extend(
        &mut map,
        json!({
            "activation_function": "silu",
            "rms_norm_eps": config.last_norm.unwrap_or(config.norm).eps(),
            "intermediate_size": moe.width,
            "num_local_experts": moe.n_experts,
            "num_experts_per_tok": moe.router.top_k,
            "num_key_value_heads": heads.n_kv_heads,
            "num_attention_heads": heads.n_kv_heads * moe.router.top_k,
            "kv_channels": heads.head_dim,
            "rope_theta": heads.rope.as_ref().map_or(1e4, |rope| rope.theta),
            "aux_loss_coef": config.router_aux_loss_coef,
            "output_router_logits": false,
        }),
    );
    map
}

fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    let (hidden, (heads, moe)) = (config.hidden, parts(config));
    let width = heads.n_kv_heads * heads.head_dim;
    hybrid::tensors(config, "model.norm", |theirs, ours, _| {
        let attention = |name: &str| format!("{theirs}.self_attention.{name}");
        let network = |name: &str| format!("{theirs}.mlp.{name}");
        let (in_heads, in_moe) =
            (|name: &str| format!("{ours}.heads.{name}"), |name: &str| format!("{ours}.moe.{name}"));
        let experts = heads.n_experts;
        vec![
            vector(&format!("{theirs}.input_layernorm"), &format!("{ours}.attention_norm"), hidden),
            matrix(&attention("experts.router.layer"), &in_heads("router"), experts, hidden),
            whole(&attention("experts.input_linear.weight"), &in_heads("q"), &[experts, width, hidden]),
            whole(&attention("experts.output_linear.weight"), &in_heads("o"), &[experts, hidden, width]),
            matrix(&attention("kv_proj"), &in_heads("kv"), 2 * width, hidden),
            whole(&attention("experts.bias"), &in_heads("o_bias"), &[hidden]),
            vector(&format!("{theirs}.post_attention_layernorm"), &format!("{ours}.ffn_norm"), hidden),
            matrix(&network("router.layer"), &in_moe("router"), moe.n_experts, hidden),
            whole(&network("input_linear.weight"), &in_moe("gate_up"), &[moe.n_experts, 2 * moe.width, hidden]),
            whole(&network("output_linear.weight"), &in_moe("down"), &[moe.n_experts, hidden, moe.width]),
            whole(&network("bias"), &in_moe("output_bias"), &[hidden]),
        ]
    })
}
