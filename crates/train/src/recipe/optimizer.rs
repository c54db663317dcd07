//! `[optimizer]`: the method, its constants, its schedule, and what holds for some weights only.

use serde::{Deserialize, Serialize};

use super::check::Checks;
use super::locate::Located;
use super::{Recipe, is_default};

/// `[optimizer]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerSection {
    /// How gradients become steps.
    #[serde(default)]
    pub kind: OptimizerKind,
    /// The rate at the end of the warm-up.
    #[serde(default)]
    pub learning_rate: f64,
    /// The rate at the last step; a tenth of `learning_rate` if absent.
    #[serde(default)]
    pub minimum_learning_rate: f64,
    /// Steps of linear warm-up; a tenth of the steps, at most 100, if absent.
    #[serde(default)]
    pub warmup_steps: u64,
    /// The way from the one rate to the other.
    #[serde(default)]
    pub schedule: ScheduleKind,
    /// Steps of the descent at the end of `wsd`; a fifth of all steps if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
    /// Decay of the first moment.
    #[serde(default = "beta1")]
    pub beta1: f64,
    /// Decay of the second moment.
    #[serde(default = "beta2")]
    pub beta2: f64,
    /// Added to the root of the second moment.
    #[serde(default = "adam_epsilon")]
    pub epsilon: f64,
    /// Share of the momentum that stays, in Muon (0.95 if absent) and SGD (0.9).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// Whether the momentum looks a step ahead, in Muon (true if absent) and SGD (false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nesterov: Option<bool>,
    /// Decoupled weight decay.
    #[serde(default = "weight_decay")]
    pub weight_decay: f64,
    /// The gradient's global norm is cut to this.
    #[serde(default = "clip_norm")]
    pub clip_norm: f64,
    /// Weight decay and rate of some weights.
    #[serde(default, skip_serializing_if = "is_default")]
    pub groups: Groups,
}

/// `optimizer.kind`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW (Loshchilov & Hutter 2019).
    #[default]
    AdamW,
    /// Muon (Jordan et al. 2024) for the matrices of attention, experts and feed-forward parts, its updates scaled to the
    /// size of AdamW's (Liu et al. 2025); AdamW for the rest.
    Muon,
    /// Gradient descent with momentum.
    Sgd,
}

/// `optimizer.schedule`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Half a cosine wave.
    #[default]
    Cosine,
    /// A straight line.
    Linear,
    /// The peak, to the end.
    Constant,
    /// Warm-up, stable, decay: the peak, then a straight line over the last `decay_steps`.
    Wsd,
}

/// `[optimizer.groups]`: what differs from the section's own values, by kind of weight.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Groups {
    /// The token embedding (the head too if they are one matrix). Does not decay unless told to.
    pub embedding: Group,
    /// The output projection.
    pub head: Group,
    /// Norms and biases. Do not decay unless told to.
    pub vectors: Group,
    /// Projections of attention.
    pub attention: Group,
    /// Routers.
    pub router: Group,
    /// Experts.
    pub experts: Group,
    /// Dense feed-forward parts.
    pub feed_forward: Group,
}

/// What holds for one kind of weight.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Instead of `optimizer.weight_decay`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// The learning rate is multiplied by this.
    #[serde(default = "one")]
    pub learning_rate_factor: f64,
}

impl Default for Group {
    fn default() -> Self {
        Self { weight_decay: None, learning_rate_factor: 1.0 }
    }
}

impl Groups {
    fn named(&self) -> [(&'static str, &Group); 7] {
        [
            ("embedding", &self.embedding),
            ("head", &self.head),
            ("vectors", &self.vectors),
            ("attention", &self.attention),
            ("router", &self.router),
            ("experts", &self.experts),
            ("feed_forward", &self.feed_forward),
        ]
    }
}

impl Default for OptimizerSection {
    fn default() -> Self {
        toml::from_str("").expect("every key has a default")
    }
}

fn one() -> f64 {
    1.0
}
fn beta1() -> f64 {
    0.9
}
fn beta2() -> f64 {
    0.95
}
fn adam_epsilon() -> f64 {
    1e-8
}
fn weight_decay() -> f64 {
    0.1
}
fn clip_norm() -> f64 {
    1.0
}

impl OptimizerSection {
    /// Share of the momentum that stays.
    pub fn momentum(&self) -> f64 {
        self.momentum.unwrap_or(if self.kind == OptimizerKind::Muon { 0.95 } else { 0.9 })
    }

    /// Whether the momentum looks a step ahead.
    pub fn nesterov(&self) -> bool {
        self.nesterov.unwrap_or(self.kind == OptimizerKind::Muon)
    }
}

/// The rules of the section.
pub(super) fn check(recipe: &Recipe, located: &Located<'_>, checks: &mut Checks) {
    check_section(&recipe.optimizer, recipe.train.steps, located, checks);
}

/// The rules of the section in a run of `steps` steps.
pub(crate) fn check_section(optimizer: &OptimizerSection, steps: u64, located: &Located<'_>, checks: &mut Checks) {
    checks.present(located, "optimizer.learning_rate", optimizer.learning_rate != 0.0);
    checks.number("optimizer.learning_rate", optimizer.learning_rate, 1e-12..=10.0);
    checks.number("optimizer.minimum_learning_rate", optimizer.minimum_learning_rate, 0.0..=10.0);
    checks.number("optimizer.beta1", optimizer.beta1, 0.0..=0.99999);
    checks.number("optimizer.beta2", optimizer.beta2, 0.0..=0.99999999);
    checks.number("optimizer.epsilon", optimizer.epsilon, 1e-20..=1.0);
    checks.number("optimizer.momentum", optimizer.momentum(), 0.0..=0.99999);
    checks.number("optimizer.weight_decay", optimizer.weight_decay, 0.0..=10.0);
    checks.number("optimizer.clip_norm", optimizer.clip_norm, 1e-9..=1e9);
    for (name, group) in optimizer.groups.named() {
        let key = |part: &str| format!("optimizer.groups.{name}.{part}");
        checks.number(&key("weight_decay"), group.weight_decay.unwrap_or(0.0), 0.0..=10.0);
        checks.number(&key("learning_rate_factor"), group.learning_rate_factor, 0.0..=1000.0);
    }
    checks.require(
        optimizer.minimum_learning_rate <= optimizer.learning_rate,
        "optimizer.minimum_learning_rate",
        format!("at most optimizer.learning_rate = {}", optimizer.learning_rate),
        optimizer.minimum_learning_rate,
    );
    checks.require(
        optimizer.warmup_steps < steps,
        "optimizer.warmup_steps",
        format!("fewer than train.steps = {steps}"),
        optimizer.warmup_steps,
    );
    let decay = optimizer.decay_steps.unwrap_or(1);
    let wanted = format!("1 to train.steps = {steps}");
    checks.require((1..=steps).contains(&decay), "optimizer.decay_steps", wanted, decay);
    let foreign = |holds: bool, key: &str, wanted: &str, checks: &mut Checks| {
        checks.require(holds || !located.says(key), key, wanted, "one");
    };
    let with_momentum = optimizer.kind != OptimizerKind::AdamW;
    foreign(with_momentum, "optimizer.momentum", "no such key with kind = \"adamw\" (it has beta1)", checks);
    foreign(with_momentum, "optimizer.nesterov", "no such key with kind = \"adamw\"", checks);
    let is_wsd = optimizer.schedule == ScheduleKind::Wsd;
    foreign(is_wsd, "optimizer.decay_steps", "no such key without schedule = \"wsd\"", checks);
    let adam = optimizer.kind != OptimizerKind::Sgd;
    for key in ["optimizer.beta1", "optimizer.beta2", "optimizer.epsilon"] {
        foreign(adam, key, "no such key with kind = \"sgd\"", checks);
    }
}
