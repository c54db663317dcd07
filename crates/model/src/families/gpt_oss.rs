//! gpt-oss (OpenAI 2025): the best experts by logit, weighed by their own softmax; clamped gates; biases everywhere; a sink
//! for each head; every other layer behind a window. Experts in bf16 or as MXFP4 blocks.

use super::keys::Keys;
use super::rope::RopeDefaults;
use super::tensors::{ExpertTensors, Names};
use super::{Family, shared};
use crate::config::{Gate, Mixer, MoeFfn, Reach, RopeScaling, Yarn};
use crate::{Ffn, ModelConfig, ModelError};
use moebius_moe::{RouterSettings, Score};
use serde_json::{Map, Value, json};

pub(super) const FAMILY: Family = Family {
    name: "gpt_oss",
    model_types: &["gpt_oss"],
    architecture: "GptOssForCausalLM",
    read,
    write,
    tensors: |config| NAMES.tensors(config),
};

const NAMES: Names = Names {
    router: "router",
    experts: ExpertTensors::Transposed { names: ["gate_up_proj", "down_proj"], alternating: true },
    ..Names::LLAMA
};

const DEFAULTS: shared::Defaults = shared::Defaults {
    rope: RopeDefaults::halves(150_000.0),
    rms_eps: 1e-5,
    max_positions: 131_072,
    n_kv_heads: Some(8),
    head_dim: Some(64),
    understood: &["attention_bias", "quantization_config", "layer_types"],
};

/// What a file means that says nothing of its positions.
const YARN: Yarn = Yarn {
    factor: 32.0,
    original_positions: 4096,
    beta_fast: 32.0,
    beta_slow: 1.0,
    truncate: false,
    attention_factor: None,
    mscale: None,
    mscale_all_dim: None,
};

fn read(keys: &Keys) -> Result<ModelConfig, ModelError> {
    if let Some(quantised) = keys.object("quantization_config")? {
        quantised.only("quant_method", json!("mxfp4"))?;
    }
    let router = RouterSettings {
        score: Score::SoftmaxOfChosen,
        logit_bias: true,
        ..RouterSettings::softmax(keys.size(keys.spelled(&["num_experts_per_tok", "experts_per_token"]))?, false)
    };
    let gate = Gate::Clamped {
        alpha: keys.number("swiglu_alpha", 1.702)? as f32,
        limit: keys.number("swiglu_limit", 7.0)? as f32,
    };
    let (n_experts, width) = (keys.size("num_local_experts")?, keys.size("intermediate_size")?);
    let ffn = Ffn::Moe(MoeFfn { n_experts, width, gate, bias: true, router, shared: None, output_bias: false });
    let config = shared::read(keys, FAMILY.name, ffn, None, &DEFAULTS)?;
    let bias = keys.flag("attention_bias", true)?;
    let windowed = shared::read_layer_types(keys, config.n_layers(), |layer| layer % 2 == 0, "sliding_attention")?;
    let window = keys.optional_size("sliding_window")?.unwrap_or(128);
    let is_silent = !keys.has("rope_scaling") && !keys.has("rope_parameters");
    let config = ModelConfig { router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.9)?, ..config };
    Ok(shared::with_layers(config, |index, layer| {
        let Mixer::Attention(attention) = &mut layer.mixer else { return };
        (attention.qkv_bias, attention.o_bias, attention.sinks) = (bias, bias, true);
        attention.reach = if windowed[index] { Reach::Window(window) } else { Reach::All };
        if let Some(rope) = attention.rope.as_mut().filter(|_| is_silent) {
            rope.scaling = RopeScaling::Yarn(YARN);
        }
    }))
}

fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shared::write(config);
    if let Some(moe) = config.moe() {
        map.insert("num_local_experts".into(), moe.n_experts.into());
        map.insert("num_experts_per_tok".into(), moe.router.top_k.into());
        if let Gate::Clamped { alpha, limit } = moe.gate {
            map.insert("swiglu_alpha".into(), json!(shared::number(alpha)));
            map.insert("swiglu_limit".into(), json!(shared::number(limit)));
        }
    }
    shared::write_balance(config, &mut map);
    map.insert("attention_bias".into(), json!(shared::attention(config).o_bias));
    let window = config.layers.iter().find_map(|layer| layer.mixer.attention()?.reach.window());
    map.insert("sliding_window".into(), json!(window));
    map.insert("layer_types".into(), shared::layer_types(config, "sliding_attention"));
    // Absent means yarn.
    map.entry("rope_scaling").or_insert(json!({"rope_type": "default"}));
    map
}
