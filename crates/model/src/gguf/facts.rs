//! A configuration as a file's metadata, and whether the file says the same.

use super::GgufFile;
use super::architecture::{Architecture, SIGMOID, SOFTMAX};
use super::config::{KEYS, read_config};
use super::positions::position_metadata;
use super::write::{MetadataToWrite, ValueToWrite};
use crate::config::{LayerConfig, Mixer, MoeFfn, Norm, Reach, Rope};
use crate::{ModelConfig, ModelError, families};
use moebius_moe::{Normalise, Score};
use serde_json::{Map, Value};

/// llama.cpp's number of a softmax over the chosen experts.
const SOFTMAX_OF_CHOSEN: u32 = 3;

/// What files of all architectures say that have it, beside [`KEYS`] and all of positions.
const COMMON: [&str; 8] = [
    "vocab_size",
    "feed_forward_length",
    "attention.layer_norm_epsilon",
    "attention.value_length",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "attention.q_lora_rank",
    "attention.kv_lora_rank",
];
/// What is read everywhere, that what cannot be computed is refused, but written only where llama.cpp acts on it.
const WINDOW: &str = "attention.sliding_window";

/// What a file of this architecture says of a configuration.
pub(super) fn config_metadata(architecture: &Architecture, config: &ModelConfig) -> Vec<MetadataToWrite> {
    let is_common = |suffix: &str| {
        let is_key = suffix != WINDOW && KEYS.iter().any(|(known, ..)| *known == suffix);
        is_key || COMMON.contains(&suffix) || suffix.starts_with("rope.")
    };
    let said =
        facts(architecture, config).into_iter().filter(|(suffix, _)| is_common(suffix) || architecture.knows(suffix));
    said.map(|(suffix, value)| (format!("{}.{suffix}", architecture.name), value)).collect()
}

/// All that files say of a configuration, behind the architecture's name.
fn facts(architecture: &Architecture, config: &ModelConfig) -> Vec<(&'static str, ValueToWrite)> {
    let whole = |number: usize| ValueToWrite::U32(number as u32);
    let number = |number: f64| ValueToWrite::F32(number as f32);
    let mut all = vec![
        ("context_length", whole(config.max_positions)),
        ("embedding_length", whole(config.hidden)),
        ("block_count", whole(config.n_layers())),
        ("vocab_size", whole(config.vocab_size)),
    ];
    // Some architectures with layer norms look for their constant where that of others stands.
    all.push(("attention.layer_norm_rms_epsilon", number(config.norm.eps())));
    if matches!(config.norm, Norm::Layer { .. }) {
        all.push(("attention.layer_norm_epsilon", number(config.norm.eps())));
    }
    let scales = config.scales;
    let logits = if architecture.multiplies_logits { scales.logits } else { 1.0 / scales.logits };
    for (suffix, scale) in
        [("embedding_scale", scales.embedding), ("residual_scale", scales.residual), ("logit_scale", logits)]
    {
        all.push((suffix, number(scale)));
    }
    all.extend(mixer_facts(config));
    if let Some(rope) = rope(config) {
        all.extend(position_metadata(rope, config.max_positions));
    }
    let width = config.dense().map_or_else(|| config.layers[0].ffn.width(), |dense| dense.width);
    all.push(("feed_forward_length", whole(width)));
    if let Some(moe) = config.moe() {
        all.extend(expert_facts(moe));
        let sparse: Vec<usize> = (0..config.n_layers()).filter(|&at| config.layers[at].ffn.moe().is_some()).collect();
        let step = sparse.windows(2).map(|pair| pair[1] - pair[0]).next().unwrap_or(sparse[0] + 1);
        all.push(("leading_dense_block_count", whole(sparse[0])));
        all.push(("interleave_moe_layer_step", whole(step)));
    }
    all
}

fn mixer_facts(config: &ModelConfig) -> Vec<(&'static str, ValueToWrite)> {
    let whole = |number: usize| ValueToWrite::U32(number as u32);
    let number = |number: f64| ValueToWrite::F32(number as f32);
    let mut all = Vec::new();
    if let Some(attention) = config.attention() {
        all.push(("attention.head_count", whole(attention.n_heads)));
        all.push(("attention.head_count_kv", whole(attention.n_kv_heads)));
        all.push(("attention.key_length", whole(attention.head_dim)));
        all.push(("attention.value_length", whole(attention.head_dim)));
        all.push(("attention.scale", number(attention.scale)));
        all.push(("attention.output_scale", number(attention.scale)));
        all.extend(attention.soft_cap.map(|cap| ("attn_logit_softcapping", number(cap))));
        all.extend(attention.clip.map(|clip| ("attention.clamp_kqv", number(clip))));
        let window = config.layers.iter().find_map(|layer| layer.mixer.attention()?.reach.window());
        all.extend(window.map(|window| (WINDOW, whole(window))));
    }
    let latent = config.layers.iter().find_map(|layer| match &layer.mixer {
        Mixer::Latent(latent) => Some(latent),
        _ => None,
    });
    if let Some(latent) = latent {
        let key = latent.nope_dim + latent.rope_dim;
        all.push(("attention.head_count", whole(latent.n_heads)));
        // All heads attend to one: the latent and the part that turns.
        all.push(("attention.head_count_kv", whole(1)));
        all.push(("attention.key_length", whole(latent.kv_rank + latent.rope_dim)));
        all.push(("attention.value_length", whole(latent.kv_rank)));
        all.push(("attention.key_length_mla", whole(key)));
        all.push(("attention.value_length_mla", whole(latent.value_dim)));
        all.push(("attention.kv_lora_rank", whole(latent.kv_rank)));
        all.push(("attention.q_lora_rank", whole(latent.q_rank.unwrap_or(0))));
    }
    all
}

fn expert_facts(moe: &MoeFfn) -> Vec<(&'static str, ValueToWrite)> {
    let whole = |number: usize| ValueToWrite::U32(number as u32);
    let gating = match moe.router.score {
        Score::Softmax => Some(SOFTMAX),
        Score::Sigmoid => Some(SIGMOID),
        Score::SoftmaxOfChosen => Some(SOFTMAX_OF_CHOSEN),
        Score::SigmoidOfChosen | Score::SparseMixer { .. } => None,
    };
    let mut all = vec![
        ("expert_count", whole(moe.n_experts)),
        ("expert_used_count", whole(moe.router.top_k)),
        ("expert_feed_forward_length", whole(moe.width)),
        ("expert_weights_scale", ValueToWrite::F32(moe.router.scale)),
        ("expert_weights_norm", ValueToWrite::Bool(moe.router.normalise != Normalise::None)),
    ];
    all.extend(gating.map(|gating| ("expert_gating_func", ValueToWrite::U32(gating))));
    let shared = moe.shared.map_or(0, |shared| shared.width);
    all.push(("expert_shared_feed_forward_length", whole(shared)));
    all.push(("expert_shared_count", whole(shared / moe.width.max(1))));
    if let Some(groups) = moe.router.groups {
        all.push(("expert_group_count", whole(groups.count)));
        all.push(("expert_group_used_count", whole(groups.used)));
    }
    all
}

/// How the layers turn, that of the first that does.
pub(super) fn rope(config: &ModelConfig) -> Option<&Rope> {
    config.layers.iter().find_map(|layer| match &layer.mixer {
        Mixer::Attention(attention) => attention.rope.as_ref(),
        Mixer::Latent(latent) => Some(&latent.rope),
        _ => None,
    })
}

/// Whether a written file says what the model is: what it cannot say, or says by numbers of its own, is found here.
///
/// # Errors
/// The key of `config.json` that it would have otherwise.
pub(super) fn check_said(file: &GgufFile, name: &str, config: &ModelConfig) -> Result<(), ModelError> {
    let (said, architecture) = read_config(file)?;
    let wrong = |key: &str, said: String, found: String| {
        let message = format!("wanted {said}, which the architecture {} means; found {found}", architecture.name);
        Err(ModelError::config(name, key, message))
    };
    for (layer, (found, said)) in config.layers.iter().zip(&said.layers).enumerate() {
        let (found, said) = (turns(&found.mixer), turns(&said.mixer));
        let is_same = match (&found, &said) {
            (Some((a, m)), Some((b, n))) => {
                let close = |a: f32, b: f32| (a - b).abs() <= 1e-5 * a.abs().max(b.abs());
                a.len() == b.len() && close(*m, *n) && a.iter().zip(b).all(|(a, b)| close(*a, *b))
            }
            (a, b) => a.is_none() && b.is_none(),
        };
        if !is_same {
            return wrong("rope_parameters", format!("{said:?} in layer {layer}"), format!("{found:?}"));
        }
    }
    let reaches = |config: &ModelConfig| -> Vec<Reach> {
        let reach = |layer: &LayerConfig| match layer.mixer.attention().map(|attention| attention.reach) {
            // A window as long as the context is none.
            Some(Reach::Window(length) | Reach::Chunk(length)) if length >= config.max_positions => Reach::All,
            reach => reach.unwrap_or_default(),
        };
        config.layers.iter().map(reach).collect()
    };
    let (found, reach) = (reaches(config), reaches(&said));
    if found != reach {
        return wrong("sliding_window", format!("{reach:?}"), format!("{found:?}"));
    }
    let mut found = ModelConfig { family: said.family.clone(), ..config.clone() };
    found.router_aux_loss_coef = said.router_aux_loss_coef;
    let (found, said) = (as_json(&found), as_json(&said));
    let differ = |key: &&String| !COMPARED.contains(&&key[..]) && !is_alike(found.get(*key), said.get(*key));
    match found.keys().chain(said.keys()).find(differ) {
        None => Ok(()),
        Some(key) => {
            let value = |map: &Map<String, Value>| map.get(key).cloned().unwrap_or_default().to_string();
            wrong(key, value(&said), value(&found))
        }
    }
}

/// Keys of what is compared by what it makes.
const COMPARED: [&str; 8] = [
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_interleave",
    "partial_rotary_factor",
    "sliding_window",
    "layer_types",
    "attention_chunk_size",
];

/// How fast the pairs of a layer's features turn, in whatever order they stand.
fn turns(mixer: &Mixer) -> Option<(Vec<f32>, f32)> {
    match mixer {
        Mixer::Attention(attention) => attention.rope.as_ref().map(Rope::frequencies),
        Mixer::Latent(latent) => Some(latent.rope.frequencies()),
        _ => None,
    }
}

fn as_json(config: &ModelConfig) -> Map<String, Value> {
    match families::write_config(config, "") {
        Value::Object(map) => map,
        other => unreachable!("a configuration is an object, not {other}"),
    }
}

/// Whether two values are the same but for the digits that an f32 has not.
fn is_alike(a: Option<&Value>, b: Option<&Value>) -> bool {
    match (a, b) {
        (Some(Value::Number(a)), Some(Value::Number(b))) => {
            let (a, b) = (a.as_f64().unwrap_or_default(), b.as_f64().unwrap_or_default());
            (a - b).abs() <= 1e-6 * a.abs().max(b.abs())
        }
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            a.keys().chain(b.keys()).all(|key| is_alike(a.get(key), b.get(key)))
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_alike(Some(a), Some(b)))
        }
        (Some(Value::Null) | None, Some(Value::Null) | None) => true,
        (a, b) => a == b,
    }
}
