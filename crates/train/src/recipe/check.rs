//! What the types cannot say about a recipe: ranges, and values that contradict each other.

use std::fmt::Display;
use std::ops::RangeInclusive;

use super::locate::Located;
use super::{Export, Recipe, RoutedLayer, presets};

/// A rule that a recipe breaks.
pub(crate) struct Violation {
    /// The dotted key to blame.
    pub(crate) key: String,
    /// What was wanted and what was found.
    pub(crate) message: String,
}

/// Collects what is wrong, in the order of the checks.
#[derive(Default)]
pub(crate) struct Checks(Vec<Violation>);

impl Checks {
    /// The first complaint.
    pub(crate) fn first(self) -> Option<Violation> {
        self.0.into_iter().next()
    }

    /// Whether there is nothing to complain about so far.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A complaint in words of its own.
    pub(crate) fn complain(&mut self, key: &str, message: String) {
        self.0.push(Violation { key: key.to_owned(), message });
    }

    pub(crate) fn require(&mut self, holds: bool, key: &str, wanted: impl Display, found: impl Display) {
        if !holds {
            self.complain(key, format!("wanted {wanted}, found {found}"));
        }
    }

    pub(crate) fn count(&mut self, key: &str, value: usize, range: RangeInclusive<usize>) {
        self.require(range.contains(&value), key, format!("{} to {}", range.start(), range.end()), value);
    }

    /// A key without a general default that neither the file nor a preset gives.
    pub(crate) fn present(&mut self, located: &Located<'_>, key: &str, is_set: bool) {
        if !located.says(key) && !is_set {
            self.complain(key, "missing".to_owned());
        }
    }

    /// A number in `range`; NaN is in no range.
    pub(crate) fn number(&mut self, key: &str, value: f64, range: RangeInclusive<f64>) {
        self.require(range.contains(&value), key, format!("{} to {}", range.start(), range.end()), value);
    }
}

/// The first rule that `recipe` breaks, if any.
pub(super) fn first_violation(recipe: &Recipe, located: &Located<'_>) -> Option<Violation> {
    let mut checks = Checks::default();
    model(recipe, located, &mut checks);
    experts(recipe, located, &mut checks);
    super::data::check(recipe, &mut checks);
    train(recipe, &mut checks);
    super::optimizer::check(recipe, located, &mut checks);
    super::watch::check(recipe, &mut checks);
    checks.first()
}

fn model(recipe: &Recipe, located: &Located<'_>, checks: &mut Checks) {
    let model = &recipe.model;
    if let Some(name) = &model.preset {
        let names = presets::PRESETS.map(|preset| preset.name).join(", ");
        checks.require(presets::find(name).is_some(), "model.preset", format!("one of {names}"), name);
    }
    for (key, value) in [
        ("model.hidden", model.hidden),
        ("model.layers", model.layers),
        ("model.heads", model.heads),
        ("model.ffn", model.ffn),
        ("model.context", model.context),
        ("tokenizer.vocab_size", recipe.tokenizer.vocab_size),
    ] {
        checks.present(located, key, value != 0);
    }
    checks.count("model.hidden", model.hidden, 2..=65_536);
    checks.count("model.layers", model.layers, 1..=1024);
    checks.count("model.heads", model.heads, 1..=1024);
    checks.count("model.ffn", model.ffn, 1..=1 << 20);
    checks.count("model.context", model.context, 1..=1 << 24);
    checks.number("model.rope_theta", model.rope_theta, 1.0..=1e12);
    checks.number("model.norm_epsilon", model.norm_epsilon, 1e-12..=1e-1);
    if model.heads > 0 {
        let found = format!("{} for model.hidden = {}", model.heads, model.hidden);
        let wanted = "a number of heads that divides model.hidden into even parts";
        checks.require(model.hidden.is_multiple_of(2 * model.heads), "model.heads", wanted, found);
    }
    if let Some(kv_heads) = model.kv_heads {
        let divides = kv_heads > 0 && model.heads.is_multiple_of(kv_heads);
        let wanted = format!("a divisor of model.heads = {}", model.heads);
        checks.require(divides, "model.kv_heads", wanted, kv_heads);
    }
    checks.count("tokenizer.vocab_size", recipe.tokenizer.vocab_size, 257..=1 << 20);
    checks.count("tokenizer.min_frequency", recipe.tokenizer.min_frequency as usize, 1..=1 << 30);
}

/// Keys that say nothing in a dense model.
const DENSE_LACKS: [&str; 8] = [
    "balance.load_balancing",
    "balance.z",
    "balance.over",
    "router",
    "model.experts_every",
    "model.dense_ffn",
    "model.dense_activation",
    "train.expert_dropout",
];

/// Sparse or dense, and what goes with each.
fn experts(recipe: &Recipe, located: &Located<'_>, checks: &mut Checks) {
    let model = &recipe.model;
    match (model.experts, model.experts_per_token) {
        (Some(experts), chosen) => {
            checks.count("model.experts", experts, 2..=4096);
            // With one expert a token its weight is 1 whatever the router says: the router would never learn. A routing
            // method says by itself what it refuses.
            let (least, why) = match recipe.router {
                None => (2, " (with 1, weights that sum to one teach the router nothing)"),
                Some(_) => (1, ""),
            };
            let wanted = format!("{least} to model.experts = {experts}{why}");
            let found = chosen.map_or("nothing".to_owned(), |k| k.to_string());
            let fits = chosen.is_some_and(|k| (least..=experts).contains(&k));
            checks.require(fits, "model.experts_per_token", wanted, found);
            checks.count("model.experts_every", model.experts_every, 1..=model.layers.max(1));
            if let Some(width) = model.dense_ffn {
                checks.count("model.dense_ffn", width, 1..=1 << 20);
                let between = "no such key without dense layers (model.experts_every above 1)";
                checks.require(model.experts_every > 1, "model.dense_ffn", between, width);
            }
            if model.dense_activation.is_some() {
                let between = "no such key without dense layers (model.experts_every above 1)";
                checks.require(model.experts_every > 1, "model.dense_activation", between, "one");
            }
            if let (Some(router), Some(top_k), true) = (&recipe.router, chosen, checks.is_empty()) {
                let (vocabulary, top_k_key) = (recipe.tokenizer.vocab_size, "model.experts_per_token");
                let share = recipe.depths.as_ref().map_or(1.0, |depths| depths.share);
                let tokens = Some((share * (recipe.train.sequences * recipe.train.sequence_length) as f64) as usize);
                router.check(&RoutedLayer { experts, top_k, vocabulary, causal: true, tokens, top_k_key }, checks);
            }
        }
        (None, Some(chosen)) => {
            checks.require(false, "model.experts_per_token", "no such key in a dense model (no model.experts)", chosen);
        }
        (None, None) => {
            for key in DENSE_LACKS {
                checks.require(!located.says(key), key, "no such key in a dense model (no model.experts)", "one");
            }
        }
    }
    if let Some(depths) = &recipe.depths {
        depths.check(model.layers, recipe.train.sequence_length, checks);
    }
    checks.number("balance.load_balancing", recipe.balance.load_balancing, 0.0..=10.0);
    checks.number("balance.z", recipe.balance.z, 0.0..=10.0);
    checks.number("train.expert_dropout", recipe.train.expert_dropout, 0.0..=0.99);
}

fn train(recipe: &Recipe, checks: &mut Checks) {
    let train = &recipe.train;
    // JSON and TOML carry integers as i64: a larger seed would not survive a checkpoint.
    checks.require(train.seed <= i64::MAX as u64, "train.seed", "0 to 9223372036854775807", train.seed);
    checks.count("train.steps", train.steps as usize, 1..=1 << 40);
    checks.count("train.sequence_length", train.sequence_length, 1..=1 << 20);
    checks.count("train.sequences", train.sequences, 1..=1 << 16);
    checks.count("train.accumulation", train.accumulation, 1..=1 << 16);
    checks.count("train.validate_every", train.validate_every as usize, 1..=1 << 40);
    checks.count("train.validate_batches", train.validate_batches, 1..=1 << 16);
    checks.count("train.save_every", train.save_every as usize, 1..=1 << 40);
    checks.count("train.keep", train.keep, 1..=1 << 16);
    checks.number("train.average", train.average.unwrap_or(0.5), 0.0..=0.999999);
    checks.count("train.patience", train.patience.unwrap_or(1) as usize, 1..=1 << 40);
    let averages = train.average.is_some() || train.export != Export::Average;
    checks.require(averages, "train.export", "\"average\" only with train.average", "none");
    let wanted = format!("at most model.context = {}", recipe.model.context);
    checks.require(
        train.sequence_length <= recipe.model.context,
        "train.sequence_length",
        wanted,
        train.sequence_length,
    );
}
