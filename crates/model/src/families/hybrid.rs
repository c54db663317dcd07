//! What families whose layers mix tokens in several ways have in common.

use super::keys::Keys;
use super::shared::{matrix, vector};
use super::{TensorMap, shared};
use crate::config::{LayerConfig, Norm, NormPlace, Rope, Scales};
use crate::{ModelConfig, ModelError};
use serde_json::{Map, Value, json};

/// Keys that would change what is computed, and that none of these families understands.
pub(super) fn refuse_other_arithmetic(keys: &Keys, activation: &str) -> Result<(), ModelError> {
    keys.only(activation, json!("silu"))?;
    for key in ["attention_bias", "mlp_bias", "use_sliding_window"] {
        keys.only(key, json!(false))?;
    }
    for key in ["quantization_config", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"] {
        keys.only(key, Value::Null)?;
    }
    Ok(())
}

/// The rotation in the spelling of transformers 4 (`rope_theta`, `rope_scaling`, `partial_rotary_factor`) or 5
/// (`rope_parameters`). Sections for pictures (`mrope_section`) mean nothing where there is text alone: a token's three
/// positions are the same then.
pub(super) fn rope(keys: &Keys, theta: f64, share: f64, head_dim: usize) -> Result<Rope, ModelError> {
    let mut theta = keys.number("rope_theta", theta)?;
    let mut share = keys.number("partial_rotary_factor", share)?;
    for name in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = keys.object(name)? else { continue };
        rope.only("rope_type", json!("default"))?;
        rope.only("type", json!("default"))?;
        (theta, share) = (rope.number("rope_theta", theta)?, rope.number("partial_rotary_factor", share)?);
    }
    if !(share > 0.0 && share <= 1.0) {
        return Err(keys.error("partial_rotary_factor", format!("wanted more than 0 and at most 1, found {share}")));
    }
    Ok(Rope { dims: (head_dim as f64 * share) as usize, ..Rope::plain(theta, head_dim) })
}

/// The width of a head: said, or the other sizes' quotient.
pub(super) fn head_dim(keys: &Keys) -> Result<usize, ModelError> {
    let (hidden, heads) = (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
    match keys.optional_size("head_dim")? {
        Some(head_dim) => Ok(head_dim),
        None if heads > 0 && hidden.is_multiple_of(heads) => Ok(hidden / heads),
        None => {
            let message = format!("wanted a divisor of hidden_size {hidden}, found {heads}");
            Err(keys.error("num_attention_heads", message))
        }
    }
}

/// Which layers have full attention, as `layer_types` says, or `absent` of each layer's number.
pub(super) fn attention_layers(
    keys: &Keys,
    n_layers: usize,
    other: &str,
    absent: impl Fn(usize) -> bool,
) -> Result<Vec<bool>, ModelError> {
    let Some(kinds) = keys.get("layer_types") else { return Ok((0..n_layers).map(absent).collect()) };
    let is_attention = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(true),
        Some(found) if found == other => Ok(false),
        _ => Err(keys.error("layer_types", format!("wanted `full_attention` or `{other}`, found {kind}"))),
    };
    match kinds.as_array() {
        Some(kinds) if kinds.len() == n_layers => kinds.iter().map(is_attention).collect(),
        _ => Err(keys.error("layer_types", format!("wanted a list of the {n_layers} layers, found {kinds}"))),
    }
}

/// A configuration of these layers, its other parts in the keys that all families share.
pub(super) fn config(
    keys: &Keys,
    family: &str,
    layers: Vec<LayerConfig>,
    norm: Norm,
    tied: bool,
) -> Result<ModelConfig, ModelError> {
    Ok(ModelConfig {
        head_bias: false,
        family: family.into(),
        vocab_size: keys.size("vocab_size")?,
        hidden: keys.size("hidden_size")?,
        layers,
        max_positions: keys.size("max_position_embeddings")?,
        norm,
        last_norm: None,
        norm_place: NormPlace::Before,
        scales: Scales::default(),
        routing: None,
        depths: None,
        tie_embeddings: keys.flag("tie_word_embeddings", tied)?,
        router_aux_loss_coef: 0.0,
        bos_token: keys.token_ids("bos_token_id")?.first().copied(),
        eos_tokens: keys.token_ids("eos_token_id")?,
    })
}

/// Writes what [`config`] reads.
pub(super) fn write(config: &ModelConfig) -> Map<String, Value> {
    let Value::Object(map) = json!({
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.n_layers(),
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token,
        "eos_token_id": match config.eos_tokens[..] {
            [] => Value::Null,
            [one] => one.into(),
            ref several => several.to_vec().into(),
        },
        "initializer_range": 0.02,
        "use_cache": true,
    }) else {
        unreachable!("the literal is an object")
    };
    map
}

/// Adds keys to what is written.
pub(super) fn extend(map: &mut Map<String, Value>, more: Value) {
    let Value::Object(more) = more else { unreachable!("callers pass an object") };
    map.extend(more);
}

/// The tensors of a decoder, `layer` giving those of each layer: its own and our name before the parts, its parts.
pub(super) fn tensors(
    config: &ModelConfig,
    last_norm: &str,
    mut layer: impl FnMut(&str, &str, &LayerConfig) -> Vec<TensorMap>,
) -> Vec<TensorMap> {
    let mut all = vec![matrix("model.embed_tokens", "embedding", config.vocab_size, config.hidden)];
    for (index, parts) in config.layers.iter().enumerate() {
        all.extend(layer(&format!("model.layers.{index}"), &format!("layers.{index}"), parts));
    }
    all.push(vector(last_norm, "final_norm", config.hidden));
    if !config.tie_embeddings {
        all.push(matrix("lm_head", "head", config.vocab_size, config.hidden));
    }
    all
}

/// A whole tensor of any name and shape.
pub(super) fn whole(theirs: &str, ours: &str, shape: &[usize]) -> TensorMap {
    let rows = if shape.len() < 2 { 1 } else { shape[..shape.len() - 1].iter().product() };
    TensorMap::whole(theirs, shape, ours, 0..rows)
}

/// The tensors of a network of the shared kind, in these names.
pub(super) fn named_network(
    width: usize,
    hidden: usize,
    theirs: &str,
    ours: &str,
    [gate, up, down]: shared::ExpertNames,
) -> Vec<TensorMap> {
    let gate_up = format!("{ours}.gate_up");
    vec![
        shared::part(&format!("{theirs}.{gate}"), &gate_up, 0, width, hidden),
        shared::part(&format!("{theirs}.{up}"), &gate_up, width, width, hidden),
        matrix(&format!("{theirs}.{down}"), &format!("{ours}.down"), hidden, width),
    ]
}
