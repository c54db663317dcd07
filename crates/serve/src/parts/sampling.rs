//! The fields that say how to write, which several interfaces have, and what they mean to the engine.

use std::collections::BTreeMap;

use moebius_engine::SamplingOptions;
use moebius_engine::scheduler::Generate;
use serde::Deserialize;
use serde_json::Value;

use crate::error::ApiError;
use crate::state::App;

/// Stop strings that a request may have.
const MOST_STOPS: usize = 16;
/// Bytes of a stop string.
const LONGEST_STOP: usize = 1024;
/// Texts that a request may ask for.
pub const MOST_CHOICES: usize = 64;
/// Likeliest tokens that may be asked for.
pub const MOST_TOP_SCORES: usize = 20;

/// One text or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    /// All of them.
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

/// How to write; what is absent is as the model's makers advise, or else off.
#[derive(Clone, Debug, Default)]
pub struct SamplingFields {
    /// 0 to 2.
    pub temperature: Option<f32>,
    /// 0 to 1.
    pub top_p: Option<f32>,
    /// Extension: 0 for all.
    pub top_k: Option<usize>,
    /// Extension: 0 to 1.
    pub min_p: Option<f32>,
    /// Extension: above 0.
    pub repetition_penalty: Option<f32>,
    /// -2 to 2.
    pub presence_penalty: Option<f32>,
    /// -2 to 2.
    pub frequency_penalty: Option<f32>,
    /// By token id as text, -100 to 100.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// The same seed gives the same text.
    pub seed: Option<i64>,
    /// Texts that end the answer.
    pub stop: Option<OneOrMany>,
    /// The most tokens.
    pub max_tokens: Option<usize>,
    /// Extension: write on behind end tokens.
    pub ignore_eos: Option<bool>,
}

/// Checks a number's range.
///
/// # Errors
/// 400 with the field, the range and the number.
pub fn check_range(name: &str, value: Option<f32>, low: f32, high: f32) -> Result<(), ApiError> {
    match value {
        Some(found) if !(low..=high).contains(&found) => Err(ApiError::invalid(
            name,
            format!("Invalid '{name}': wanted a number from {low} to {high}, found {found}."),
        )),
        _ => Ok(()),
    }
}

/// How many texts are asked for.
///
/// # Errors
/// 400 for none, or too many.
pub fn choices(name: &str, n: Option<usize>) -> Result<usize, ApiError> {
    match n.unwrap_or(1) {
        found @ 1..=MOST_CHOICES => Ok(found),
        found => Err(ApiError::invalid(name, format!("Invalid '{name}': wanted 1 to {MOST_CHOICES}, found {found}."))),
    }
}

/// How many of the likeliest tokens are asked for.
///
/// # Errors
/// 400 for too many.
pub fn top_scores(name: &str, top: Option<usize>) -> Result<usize, ApiError> {
    match top.unwrap_or(0) {
        found @ 0..=MOST_TOP_SCORES => Ok(found),
        found => {
            Err(ApiError::invalid(name, format!("Invalid '{name}': wanted 0 to {MOST_TOP_SCORES}, found {found}.")))
        }
    }
}

impl SamplingFields {
    /// What the engine is told for each of `n` texts: they differ in their seeds.
    ///
    /// # Errors
    /// 400 with the first field that is out of its range.
    pub fn generates(self, app: &App, n: usize) -> Result<Vec<Generate>, ApiError> {
        check_range("temperature", self.temperature, 0.0, 2.0)?;
        check_range("top_p", self.top_p, 0.0, 1.0)?;
        check_range("min_p", self.min_p, 0.0, 1.0)?;
        check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)?;
        check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        if self.max_tokens == Some(0) {
            return Err(ApiError::invalid("max_tokens", "Invalid 'max_tokens': wanted at least 1, found 0."));
        }
        let bias = self.bias(app)?;
        let stop = self.stop.map(OneOrMany::into_vec).unwrap_or_default();
        if stop.len() > MOST_STOPS || stop.iter().any(|text| text.len() > LONGEST_STOP) {
            let message = format!("Invalid 'stop': wanted at most {MOST_STOPS} texts of at most {LONGEST_STOP} bytes.");
            return Err(ApiError::invalid("stop", message));
        }
        let advised = &app.defaults;
        let seed = self.seed.map_or_else(rand::random, |seed| seed as u64);
        let sampling = SamplingOptions {
            temperature: self.temperature.or(advised.temperature).unwrap_or(1.0),
            // 0 is allowed by OpenAI's API and means the likeliest token, as the smallest number does.
            top_p: self.top_p.or(advised.top_p).unwrap_or(1.0).max(f32::MIN_POSITIVE),
            top_k: self.top_k.or(advised.top_k).unwrap_or(0),
            min_p: self.min_p.or(advised.min_p).unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.or(advised.repetition_penalty).unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            seed,
        };
        let end_tokens = if self.ignore_eos == Some(true) { Vec::new() } else { advised.end_tokens.clone() };
        let generate = |index: usize| Generate {
            sampling: SamplingOptions { seed: seed.wrapping_add(index as u64), ..sampling },
            bias: bias.clone(),
            max_tokens: self.max_tokens.unwrap_or(usize::MAX),
            stop: stop.clone(),
            end_tokens: end_tokens.clone(),
            ..Generate::default()
        };
        Ok((0..n).map(generate).collect())
    }

    fn bias(&self, app: &App) -> Result<Vec<(u32, f32)>, ApiError> {
        let wrong = |message: String| ApiError::invalid("logit_bias", format!("Invalid 'logit_bias': {message}."));
        let entry = |(token, &bias): (&String, &f32)| {
            let id = token.parse::<u32>().ok().filter(|&id| (id as usize) < app.card.vocab);
            let id = id.ok_or_else(|| wrong(format!("wanted token ids below {}, found {token:?}", app.card.vocab)))?;
            if !(-100.0..=100.0).contains(&bias) {
                return Err(wrong(format!("wanted numbers from -100 to 100, found {bias}")));
            }
            Ok((id, bias))
        };
        self.logit_bias.iter().flatten().map(entry).collect()
    }
}

/// Fields that OpenAI's API has and that change nothing here: they are about accounts, storage and billing.
pub type Ignored = Option<Value>;

/// Refuses a field that would change the answer if it were obeyed.
///
/// # Errors
/// 400 if the field is there and not null.
pub fn refuse(name: &'static str, field: &Option<Value>) -> Result<(), ApiError> {
    match field {
        None | Some(Value::Null) => Ok(()),
        Some(_) => Err(ApiError::unsupported(name, format!("Unsupported parameter: '{name}' is not supported."))),
    }
}
