//! `[depths]`: Mixture-of-Depths, layers that only some tokens go through.

use moebius_model::config::{DepthSampler, DepthsConfig};
use serde::{Deserialize, Serialize};

use super::check::Checks;

/// `[depths]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DepthsSection {
    /// Share of a sequence's tokens that go through.
    pub share: f64,
    /// One layer of so many is routed around, the last of them.
    #[serde(default = "two")]
    pub every: usize,
    /// What decides when tokens come one by one.
    #[serde(default)]
    pub sampler: RecipeSampler,
    /// Inner width of the predictor.
    #[serde(default = "sixty_four")]
    pub predictor_width: usize,
    /// Weight of the sampler's loss.
    #[serde(default = "hundredth")]
    pub sampler_loss: f64,
}

/// `depths.sampler`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecipeSampler {
    /// The router's own score.
    #[default]
    Threshold,
    /// A small network.
    Predictor,
    /// A lot, in training too: for comparison.
    Random,
}

fn two() -> usize {
    2
}
fn sixty_four() -> usize {
    64
}
fn hundredth() -> f64 {
    0.01
}

impl DepthsSection {
    /// As the model has it.
    pub(crate) fn config(&self) -> DepthsConfig {
        let sampler = match self.sampler {
            RecipeSampler::Threshold => DepthSampler::Threshold,
            RecipeSampler::Predictor => DepthSampler::Predictor { width: self.predictor_width },
            RecipeSampler::Random => DepthSampler::Random,
        };
        DepthsConfig { share: self.share, every: self.every, sampler, sampler_loss: self.sampler_loss }
    }

    pub(super) fn check(&self, layers: usize, sequence_length: usize, checks: &mut Checks) {
        checks.number("depths.share", self.share, 1e-6..=1.0);
        checks.count("depths.every", self.every, 1..=layers.max(1));
        checks.count("depths.predictor_width", self.predictor_width, 1..=65_536);
        checks.number("depths.sampler_loss", self.sampler_loss, 0.0..=10.0);
        let tokens = self.share * sequence_length as f64;
        let wanted = "at least one token of a sequence (share * train.sequence_length)";
        checks.require(tokens >= 1.0, "depths.share", wanted, tokens);
    }
}
