//! `[spikes]` and `[samples]`: what a run looks out for, and what it writes on the way.

use serde::{Deserialize, Serialize};

use super::Recipe;
use super::check::Checks;

/// `[spikes]`: what counts as a loss spike, and what is done about one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpikeSection {
    /// What is done.
    pub action: SpikeAction,
    /// Steps that say what is usual.
    pub window: usize,
    /// A spike is this many deviations above the usual loss,
    pub deviations: f64,
    /// and this many nats.
    pub rise: f64,
    /// Rollbacks in one run before it is given up.
    pub rollbacks: u64,
}

/// `spikes.action`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SpikeAction {
    /// It is named in the log; a loss that is no number ends the run.
    #[default]
    Log,
    /// The run goes back to its last checkpoint and skips the data up to and with the spike's.
    Rollback,
}

impl Default for SpikeSection {
    fn default() -> Self {
        Self { action: SpikeAction::Log, window: 64, deviations: 8.0, rise: 0.5, rollbacks: 3 }
    }
}

/// `[samples]`: texts that the model writes while it learns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleSection {
    /// Steps between samples.
    pub every: u64,
    /// What it writes on from, one text each.
    pub prompts: Vec<String>,
    /// Tokens of each.
    #[serde(default = "forty")]
    pub tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    #[serde(default = "temperature")]
    pub temperature: f64,
    /// The same seed draws the same.
    #[serde(default)]
    pub seed: u64,
}

fn forty() -> usize {
    40
}
fn temperature() -> f64 {
    0.8
}

/// The rules of both sections.
pub(super) fn check(recipe: &Recipe, checks: &mut Checks) {
    let spikes = &recipe.spikes;
    checks.count("spikes.window", spikes.window, 8..=1 << 16);
    checks.number("spikes.deviations", spikes.deviations, 1.0..=1e6);
    checks.number("spikes.rise", spikes.rise, 0.0..=1e3);
    checks.count("spikes.rollbacks", spikes.rollbacks as usize, 0..=1000);
    if let Some(samples) = &recipe.samples {
        checks.count("samples.every", samples.every as usize, 1..=1 << 40);
        checks.count("samples.tokens", samples.tokens, 1..=1 << 16);
        checks.number("samples.temperature", samples.temperature, 0.0..=100.0);
        checks.require(samples.seed <= i64::MAX as u64, "samples.seed", "0 to 9223372036854775807", samples.seed);
        let prompts = samples.prompts.iter().all(|prompt| !prompt.is_empty());
        let wanted = "at least one text, none of them empty";
        checks.require(!samples.prompts.is_empty() && prompts, "samples.prompts", wanted, "others");
    }
}
