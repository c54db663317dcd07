//! How queries and keys turn with their position, between a file's keys and factors and `config.json`.

use super::config::{Reading, decimal};
use super::write::{ValueToWrite, Values, WeightToWrite};
use crate::ModelError;
use crate::config::{Rope, RopeScaling};
use moebius_kernels::formats::Format;
use serde_json::{Map, Value, json};

/// What each pair's frequency is divided by.
const FACTORS: &str = "rope_freqs.weight";
const SHORT: &str = "rope_factors_short.weight";
const LONG: &str = "rope_factors_long.weight";

/// Whether a tensor holds factors of frequencies, not weights.
pub(super) fn is_factors(name: &str) -> bool {
    [FACTORS, SHORT, LONG].contains(&name)
}

/// Reads base, number of features and scaling.
pub(super) fn read_positions(reading: &mut Reading) -> Result<(), ModelError> {
    let theta = reading.metadata.optional_f32(&reading.key("rope.freq_base"))?;
    let theta = theta.map_or(json!(10_000.0), decimal);
    let key = reading.key("rope.dimension_count");
    let head_dim = reading.head_dim();
    if !reading.is_latent() {
        let turning = reading.metadata.optional_u32(&key)?.map_or(head_dim, |turning| turning as usize);
        if turning == 0 || turning > head_dim || !turning.is_multiple_of(2) {
            let message = format!("wanted an even number up to the width of a head, {head_dim}, found {turning}");
            return Err(reading.metadata.error(&key, message));
        }
        reading.map.insert("partial_rotary_factor".into(), json!(turning as f64 / head_dim as f64));
    }
    reading.map.insert("rope_theta".into(), theta);
    let scaling = read_scaling(reading)?;
    reading.map.insert("rope_scaling".into(), scaling);
    Ok(())
}

fn read_scaling(reading: &Reading) -> Result<Value, ModelError> {
    let metadata = reading.metadata;
    let number = |suffix: &str| metadata.optional_f32(&reading.key(&format!("rope.scaling.{suffix}")));
    let key = reading.key("rope.scaling.type");
    let factor = number("factor")?.filter(|factor| *factor != 0.0 && *factor != 1.0);
    let original = metadata.optional_u32(&reading.key("rope.scaling.original_context_length"))?;
    let original = match original {
        Some(original) => original,
        None => metadata.u32(&reading.key("context_length"))?,
    };
    let magnitude = number("attn_factor")?.filter(|factor| *factor != 1.0);
    if let Some(factors) = read_factors(reading, FACTORS)? {
        if let Some(factor) = factor {
            let message = format!("wanted no factor beside the tensor {FACTORS}, found {factor}");
            return Err(metadata.error(&reading.key("rope.scaling.factor"), message));
        }
        return Ok(longrope(factors.clone(), factors, 1.0, original));
    }
    match metadata.optional_text(&key)? {
        Some("none") => Ok(json!({"rope_type": "default"})),
        Some("longrope") | None if reading.file.get(SHORT).is_some() => {
            let lists = (read_factors(reading, SHORT)?, read_factors(reading, LONG)?);
            let (Some(short), Some(long)) = lists else {
                return Err(ModelError::tensor(reading.file.name(), LONG, "missing beside the short ones"));
            };
            Ok(longrope(short, long, magnitude.unwrap_or(1.0), original))
        }
        None | Some("linear") => match factor {
            None => Ok(json!({"rope_type": "default"})),
            Some(factor) => Ok(json!({"rope_type": "linear", "factor": decimal(factor)})),
        },
        Some("yarn") => {
            let Some(factor) = factor else {
                return Err(metadata.error(&reading.key("rope.scaling.factor"), "wanted a number, found nothing"));
            };
            let yarn = serde_json::from_str(reading.architecture.yarn);
            let mut yarn: Map<String, Value> = yarn.expect("what an architecture says is a JSON object");
            yarn.insert("rope_type".into(), json!("yarn"));
            yarn.insert("factor".into(), decimal(factor));
            yarn.insert("original_max_position_embeddings".into(), json!(original));
            for (suffix, theirs) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                yarn.extend(number(suffix)?.map(|number| (theirs.to_string(), decimal(number))));
            }
            // A tenth of DeepSeek's number; llama.cpp takes the other number to be the same.
            if let Some(tenth) = number("yarn_log_multiplier")?.filter(|number| *number != 0.0) {
                yarn.insert("mscale".into(), decimal(10.0 * tenth));
                yarn.insert("mscale_all_dim".into(), decimal(10.0 * tenth));
            }
            if let Some(magnitude) = magnitude {
                let plain = 1.0 + 0.1 * f64::from(factor).ln();
                yarn.insert("attention_factor".into(), json!(plain * f64::from(magnitude)));
            }
            Ok(Value::Object(yarn))
        }
        Some(other) => {
            let message = format!("wanted none, linear, yarn, or longrope with its factors, found `{other}`");
            Err(metadata.error(&key, message))
        }
    }
}

fn longrope(short: Vec<f64>, long: Vec<f64>, magnitude: f32, original: u32) -> Value {
    json!({
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "short_mscale": decimal(magnitude),
        "long_mscale": decimal(magnitude),
        "original_max_position_embeddings": original,
    })
}

/// The numbers of a tensor of factors, if it is there.
fn read_factors(reading: &Reading, name: &str) -> Result<Option<Vec<f64>>, ModelError> {
    let Some(tensor) = reading.file.get(name) else { return Ok(None) };
    let [count] = *tensor.shape else {
        let message = format!("wanted one dimension, found shape {:?}", tensor.shape);
        return Err(ModelError::tensor(tensor.file, tensor.name, message));
    };
    let mut factors = vec![0.0; count];
    tensor.read_f32(&mut factors);
    match factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
        None => Ok(Some(factors.into_iter().map(f64::from).collect())),
        Some(wrong) => {
            let message = format!("wanted numbers above 0, found {wrong}");
            Err(ModelError::tensor(tensor.file, tensor.name, message))
        }
    }
}

/// What [`read_positions`] reads, as keys and values behind the architecture's name.
pub(super) fn position_metadata(rope: &Rope, max_positions: usize) -> Vec<(&'static str, ValueToWrite)> {
    let number = |number: f64| ValueToWrite::F32(number as f32);
    let whole = |number: usize| ValueToWrite::U32(number as u32);
    let mut all = vec![("rope.dimension_count", whole(rope.dims)), ("rope.freq_base", number(rope.theta))];
    let kind = |kind: &str| ("rope.scaling.type", ValueToWrite::Text(kind.into()));
    match &rope.scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => all.extend([kind("linear"), ("rope.scaling.factor", number(*factor))]),
        RopeScaling::Llama3 { original_positions, .. } => {
            // How long texts may be is said apart from that, and what turns how fast by a tensor.
            if *original_positions != max_positions {
                all.push(("rope.scaling.original_context_length", whole(*original_positions)));
            }
        }
        RopeScaling::LongRope { magnitude, original_positions, .. } => all.extend([
            kind("longrope"),
            ("rope.scaling.original_context_length", whole(*original_positions)),
            ("rope.scaling.attn_factor", number(*magnitude)),
        ]),
        RopeScaling::Yarn(yarn) => {
            all.extend([
                kind("yarn"),
                ("rope.scaling.factor", number(yarn.factor)),
                ("rope.scaling.original_context_length", whole(yarn.original_positions)),
                ("rope.scaling.yarn_beta_fast", number(yarn.beta_fast)),
                ("rope.scaling.yarn_beta_slow", number(yarn.beta_slow)),
            ]);
            all.extend(yarn.mscale_all_dim.map(|scale| ("rope.scaling.yarn_log_multiplier", number(0.1 * scale))));
            all.extend(yarn.attention_factor.map(|f| ("rope.scaling.attn_factor", number(f / yarn.magnitude(1.0)))));
        }
    }
    all
}

/// The tensors of factors that a model's positions need.
pub(super) fn position_weights(rope: &Rope) -> Vec<WeightToWrite<'static>> {
    let tensor = |name: &str, factors: Vec<f64>| WeightToWrite {
        name: name.into(),
        shape: vec![factors.len()],
        format: Format::F32,
        values: values_of(factors),
    };
    match &rope.scaling {
        RopeScaling::Llama3 { .. } => {
            let plain = Rope { scaling: RopeScaling::None, ..rope.clone() }.frequencies().0;
            let factors =
                plain.iter().zip(rope.frequencies().0).map(|(plain, slow)| f64::from(*plain) / f64::from(slow));
            vec![tensor(FACTORS, factors.collect())]
        }
        RopeScaling::LongRope { short, long, .. } => vec![tensor(SHORT, short.clone()), tensor(LONG, long.clone())],
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Yarn(_) => Vec::new(),
    }
}

fn values_of(factors: Vec<f64>) -> Values<'static> {
    Box::new(move |_, out| out.iter_mut().zip(&factors).for_each(|(out, factor)| *out = *factor as f32))
}
