//! Jamba (Lieber et al. 2024): mamba layers and a few of attention without positions; experts in some layers, chosen and
//! weighed by a softmax over all.

use super::hybrid::{self, extend, whole};
use super::keys::Keys;
use super::shared::{self, vector};
use super::{Family, TensorMap};
use crate::config::{AttentionConfig, LayerConfig, Mamba, Mixer, Norm, Reach};
use crate::{Ffn, ModelConfig, ModelError, QkNorm};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family =
    Family { name: "jamba", model_types: &["jamba"], architecture: "JambaForCausalLM", read, write, tensors };

/// Of every `period` layers, the one at `offset`.
fn is_at(keys: &Keys, kind: &str, [period, offset]: [usize; 2]) -> Result<impl Fn(usize) -> bool, ModelError> {
    let names = [format!("{kind}_layer_period"), format!("{kind}_layer_offset")];
    let period = keys.optional_size(&names[0])?.unwrap_or(period);
    let offset = keys.optional_size(&names[1])?.unwrap_or(offset);
    if offset >= period {
        return Err(keys.error(&names[1], format!("wanted less than {} {period}, found {offset}", names[0])));
    }
    Ok(move |layer: usize| layer % period == offset)
}

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    hybrid::refuse_other_arithmetic(keys, "hidden_act")?;
    let (hidden, head_dim) = (keys.size("hidden_size")?, hybrid::head_dim(keys)?);
    let n_heads = keys.size("num_attention_heads")?;
    let attention = Mixer::Attention(AttentionConfig {
        n_heads,
        n_kv_heads: keys.optional_size("num_key_value_heads")?.unwrap_or(if keys.has("num_key_value_heads") {
            n_heads
        } else {
            8
        }),
        head_dim,
        reach: Reach::All,
        rope: None,
        scale: (head_dim as f64).powf(-0.5),
        qk_norm: QkNorm::None,
        qkv_bias: false,
        gated: false,
        o_bias: false,
        clip: None,
        sinks: false,
        soft_cap: None,
        temperature: None,
    });
    let rank = match keys.get("mamba_dt_rank") {
        None => hidden.div_ceil(16),
        Some(auto) if auto == "auto" => hidden.div_ceil(16),
        Some(_) => keys.size("mamba_dt_rank")?,
    };
    let Some(width) = keys.optional_size("mamba_expand")?.unwrap_or(2).checked_mul(hidden) else {
        return Err(keys.error("mamba_expand", format!("wanted a size that fits {hidden}, found too large a one")));
    };
    let mamba = Mixer::Mamba(Mamba {
        width,
        states: keys.optional_size("mamba_d_state")?.unwrap_or(16),
        taps: keys.optional_size("mamba_d_conv")?.unwrap_or(4),
        rank,
        convolution_bias: keys.flag("mamba_conv_bias", true)?,
        projection_bias: keys.flag("mamba_proj_bias", false)?,
    });
    let inner = keys.size("intermediate_size")?;
    let count = if keys.has("num_experts") { "num_experts" } else { "num_local_experts" };
    let n_experts = keys.size(count)?;
    let experts = Ffn::moe_of(n_experts, keys.size("num_experts_per_tok")?, inner, false);
    let (has_attention, has_experts) = (is_at(keys, "attn", [8, 4])?, is_at(keys, "expert", [2, 1])?);
    let layers = (0..shared::layer_count(keys)?).map(|layer| LayerConfig {
        mixer: if has_attention(layer) { attention.clone() } else { mamba.clone() },
        // One expert is none: transformers makes a plain network then.
        ffn: if has_experts(layer) && n_experts > 1 { experts } else { Ffn::dense(inner) },
    });
    let norm = Norm::Rms { eps: keys.number("rms_norm_eps", 1e-6)? };
    let config = hybrid::config(keys, FAMILY.name, layers.collect(), norm, false)?;
    Ok(ModelConfig { router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.001)?, ..config })
}

/// The period and offset by which some of the layers recur: none of them recur behind the last.
fn recurrence(config: &ModelConfig, is_one: impl Fn(&LayerConfig) -> bool) -> [usize; 2] {
    let layers: Vec<usize> = (0..config.n_layers()).filter(|&layer| is_one(&config.layers[layer])).collect();
    match layers[..] {
        [] => [config.n_layers() + 1, config.n_layers()],
        [only] => [config.n_layers().max(only + 1), only],
        [first, second, ..] => [second - first, first],
    }
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = hybrid::write(config);
    let attention = recurrence(config, |layer| layer.mixer.attention().is_some());
    let experts = recurrence(config, |layer| layer.ffn.moe().is_some());
    extend(
        &mut map,
        json!({
            "hidden_act": "silu",
            "rms_norm_eps": config.norm.eps(),
            "intermediate_size": config.layers[0].ffn.width(),
            "attn_layer_period": attention[0],
            "attn_layer_offset": attention[1],
            "expert_layer_period": experts[0],
            "expert_layer_offset": experts[1],
            "num_experts": config.moe().map_or(1, |moe| moe.n_experts),
            "num_experts_per_tok": config.moe().map_or(1, |moe| moe.router.top_k),
            "router_aux_loss_coef": config.router_aux_loss_coef,
            "output_router_logits": false,
        }),
    );
    let heads = config.attention().map_or([1, 1], |attention| [attention.n_heads, attention.n_kv_heads]);
    extend(&mut map, json!({"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}));
    for layer in &config.layers {
        if let Mixer::Mamba(mamba) = &layer.mixer {
            extend(
                &mut map,
                json!({
                    "mamba_expand": mamba.width / config.hidden,
                    "mamba_d_state": mamba.states,
                    "mamba_d_conv": mamba.taps,
                    "mamba_dt_rank": mamba.rank,
                    "mamba_conv_bias": mamba.convolution_bias,
                    "mamba_proj_bias": mamba.projection_bias,
                }),
            );
        }
    }
    map
}

fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    let hidden = config.hidden;
    hybrid::tensors(config, "model.final_layernorm", |theirs, ours, layer| {
        let mut all = vec![vector(&format!("{theirs}.input_layernorm"), &format!("{ours}.attention_norm"), hidden)];
        match &layer.mixer {
            Mixer::Attention(attention) => {
                let (theirs, ours) = (format!("{theirs}.self_attn"), format!("{ours}.attention"));
                all.extend(shared::attention_tensors(attention, hidden, &theirs, &ours));
            }
            Mixer::Mamba(mamba) => {
                all.extend(mamba_tensors(mamba, hidden, &format!("{theirs}.mamba"), &format!("{ours}.mamba")));
            }
            other => unreachable!("read without {other:?}"),
        }
        all.push(vector(&format!("{theirs}.pre_ff_layernorm"), &format!("{ours}.ffn_norm"), hidden));
        let theirs = format!("{theirs}.feed_forward");
        match &layer.ffn {
            Ffn::Dense(network) => {
                all.extend(shared::network_tensors(network.width, hidden, &theirs, &format!("{ours}.mlp")));
            }
            Ffn::Moe(moe) => {
                let ours = format!("{ours}.moe");
                let mut experts = shared::expert_tensors(moe, hidden, &theirs, &ours, shared::PROJECTIONS);
                experts[0].file_name = format!("{theirs}.router.weight");
                all.extend(experts);
            }
        }
        all
    })
}

fn mamba_tensors(mamba: &Mamba, hidden: usize, theirs: &str, ours: &str) -> Vec<TensorMap> {
    let Mamba { width, states, taps, rank, convolution_bias, projection_bias } = *mamba;
    let mut all = Vec::new();
    let mut add = |name: &str, part: &str, shape: &[usize]| {
        all.push(whole(&format!("{theirs}.{name}"), &format!("{ours}.{part}"), shape));
    };
    add("in_proj.weight", "in", &[2 * width, hidden]);
    add("conv1d.weight", "taps", &[width, 1, taps]);
    if convolution_bias {
        add("conv1d.bias", "taps_bias", &[width]);
    }
    add("x_proj.weight", "x", &[rank + 2 * states, width]);
    add("dt_layernorm.weight", "dt_norm", &[rank]);
    add("b_layernorm.weight", "b_norm", &[states]);
    add("c_layernorm.weight", "c_norm", &[states]);
    add("dt_proj.weight", "dt", &[width, rank]);
    add("dt_proj.bias", "dt_bias", &[width]);
    add("A_log", "rates", &[width, states]);
    add("D", "skip", &[width]);
    add("out_proj.weight", "o", &[hidden, width]);
    if projection_bias {
        add("in_proj.bias", "in_bias", &[2 * width]);
        add("out_proj.bias", "o_bias", &[hidden]);
    }
    all
}
