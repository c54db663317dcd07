//! Rotary positions in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

use super::keys::Keys;
use crate::ModelError;
use crate::config::{Rope, RopePairs, RopeScaling, Yarn};
use serde_json::{Map, Value, json};

/// What a family turns where keys are absent.
#[derive(Clone, Copy)]
pub(super) struct RopeDefaults {
    pub(super) theta: f64,
    /// What share of a head's features turns.
    pub(super) partial: f64,
    pub(super) pairs: RopePairs,
}

impl RopeDefaults {
    /// All features, halves apart.
    pub(super) const fn halves(theta: f64) -> Self {
        Self { theta, partial: 1.0, pairs: RopePairs::Halves }
    }

    /// All features, neighbours together.
    pub(super) const fn neighbours(theta: f64) -> Self {
        Self { theta, partial: 1.0, pairs: RopePairs::Neighbours }
    }
}

/// Reads how `head_dim` features turn.
pub(super) fn read(keys: &Keys, head_dim: usize, defaults: RopeDefaults) -> Result<Rope, ModelError> {
    let mut theta = keys.number("rope_theta", defaults.theta)?;
    let mut partial = keys.number("partial_rotary_factor", defaults.partial)?;
    let mut scaling = RopeScaling::None;
    for name in ["rope_parameters", "rope_scaling"] {
        let Some(rope) = keys.object(name)? else { continue };
        theta = rope.number("rope_theta", theta)?;
        partial = rope.number("partial_rotary_factor", partial)?;
        scaling = read_scaling(keys, &rope)?;
    }
    if !(partial > 0.0 && partial <= 1.0) {
        return Err(keys.error("partial_rotary_factor", format!("wanted more than 0 and at most 1, found {partial}")));
    }
    Ok(Rope { theta, dims: (head_dim as f64 * partial) as usize, pairs: defaults.pairs, scaling })
}

/// Keys that stand beside every kind's own.
const COMMON: [&str; 4] = ["rope_theta", "rope_type", "type", "partial_rotary_factor"];
const ORIGINAL: &str = "original_max_position_embeddings";

fn read_scaling(keys: &Keys, rope: &Keys) -> Result<RopeScaling, ModelError> {
    let kind = rope.get("rope_type").or(rope.get("type")).map_or(Ok("default"), |_| {
        let name = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
        rope.text(name)
    })?;
    if let (Some(new), Some(old)) = (rope.get("rope_type"), rope.get("type"))
        && new != old
    {
        return Err(rope.error("rope_type", format!("wanted what `type` says, {old}, found {new}")));
    }
    let original = |rope: &Keys| match rope.optional_size(ORIGINAL)? {
        Some(original) => Ok(original),
        None => keys.optional_size(ORIGINAL)?.map_or_else(|| keys.size("max_position_embeddings"), Ok),
    };
    let number = |name: &str| rope.needed_number(name);
    let (scaling, own): (RopeScaling, &[&str]) = match kind {
        "default" => (RopeScaling::None, &[]),
        "linear" => (RopeScaling::Linear { factor: number("factor")? }, &["factor"]),
        "llama3" => (
            RopeScaling::Llama3 {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original_positions: original(rope)?,
            },
            &["factor", "low_freq_factor", "high_freq_factor", ORIGINAL],
        ),
        "longrope" => (read_longrope(keys, rope, original(rope)?)?, &LONGROPE_KEYS),
        "yarn" => {
            let yarn = Yarn {
                factor: number("factor")?,
                original_positions: original(rope)?,
                beta_fast: rope.number("beta_fast", 32.0)?,
                beta_slow: rope.number("beta_slow", 1.0)?,
                truncate: rope.flag("truncate", true)?,
                attention_factor: rope.optional_number("attention_factor")?,
                mscale: rope.optional_number("mscale")?,
                mscale_all_dim: rope.optional_number("mscale_all_dim")?,
            };
            (RopeScaling::Yarn(yarn), &YARN_KEYS)
        }
        other => {
            let message = format!("wanted default, linear, llama3, longrope or yarn, found {other}");
            return Err(rope.error("rope_type", message));
        }
    };
    match rope.names().find(|name| !COMMON.contains(name) && !own.contains(name)) {
        None => Ok(scaling),
        Some(foreign) => Err(rope.error(foreign, format!("not understood for rope_type `{kind}`"))),
    }
}

const YARN_KEYS: [&str; 8] =
    ["factor", ORIGINAL, "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"];
const LONGROPE_KEYS: [&str; 7] =
    ["factor", ORIGINAL, "short_factor", "long_factor", "short_mscale", "long_mscale", "attention_factor"];

fn read_longrope(keys: &Keys, rope: &Keys, original_positions: usize) -> Result<RopeScaling, ModelError> {
    let magnitude = match (rope.optional_number("short_mscale")?, rope.optional_number("long_mscale")?) {
        (Some(short), Some(long)) if short != long => {
            let message = format!(
                "wanted what short_mscale says, {short}, found {long}: which of them turns a token would depend on how long \
                 the text becomes after it, so that a cache could not hold it"
            );
            return Err(rope.error("long_mscale", message));
        }
        (Some(given), _) | (None, Some(given)) => given,
        (None, None) => match rope.optional_number("attention_factor")? {
            Some(given) => given,
            None => {
                let longer = keys.size("max_position_embeddings")? as f64 / original_positions as f64;
                let factor = rope.number("factor", longer)?;
                let grown = 1.0 + factor.ln() / (original_positions as f64).ln();
                if factor <= 1.0 { 1.0 } else { grown.sqrt() }
            }
        },
    };
    let (short, long) = (rope.numbers("short_factor")?, rope.numbers("long_factor")?);
    // Phi-3.5-MoE turns by the short factors however long the text is; in transformers' other models a text that outgrows
    // the first context turns by the long ones from its beginning on.
    let most = keys.size("max_position_embeddings")?;
    if short != long && most > original_positions && keys.text("model_type")? != "phimoe" {
        let message = format!(
            "wanted at most original_max_position_embeddings {original_positions}, found {most}: a longer text would turn \
             by long_factor from its beginning on; with {original_positions} the model runs as published up to there"
        );
        return Err(keys.error("max_position_embeddings", message));
    }
    Ok(RopeScaling::LongRope { short, long, magnitude, original_positions })
}

/// Writes what [`read`] reads, in the spelling that both versions of transformers take.
pub(super) fn write(rope: &Rope, head_dim: usize, map: &mut Map<String, Value>) {
    map.insert("rope_theta".into(), json!(rope.theta));
    if rope.dims != head_dim {
        map.insert("partial_rotary_factor".into(), json!(rope.dims as f64 / head_dim as f64));
    }
    let scaling = match &rope.scaling {
        RopeScaling::None => return,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low, high, original_positions } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            ORIGINAL: original_positions,
        }),
        RopeScaling::LongRope { short, long, magnitude, original_positions } => json!({
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "short_mscale": magnitude,
            "long_mscale": magnitude,
            "attention_factor": magnitude,
            ORIGINAL: original_positions,
        }),
        RopeScaling::Yarn(yarn) => {
            let mut map = json!({
                "rope_type": "yarn",
                "factor": yarn.factor,
                ORIGINAL: yarn.original_positions,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "truncate": yarn.truncate,
            });
            for (key, number) in [
                ("attention_factor", yarn.attention_factor),
                ("mscale", yarn.mscale),
                ("mscale_all_dim", yarn.mscale_all_dim),
            ] {
                if let Some(number) = number {
                    map[key] = json!(number);
                }
            }
            map
        }
    };
    map.insert("rope_scaling".into(), scaling);
}
