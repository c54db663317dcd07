//! A recipe: everything that decides what a run gives, in one TOML file.
//!
//! A recipe is read whole and checked before anything starts. An unknown key, a wrong type, a value out of range or two
//! values that contradict each other give one error that names file, line and key ([`crate::TrainError::Recipe`]).
//! Paths in a recipe are relative to the recipe's own folder, so that a run does not depend on where it is started.

mod check;
mod data;
mod depths;
pub(crate) mod locate;
mod optimizer;
pub mod presets;
mod router;
mod watch;

use std::path::{Path, PathBuf};

use moebius_kernels::gemm::Precision;
use moebius_model::config::{Gate, QkNorm};
use serde::{Deserialize, Serialize};

use crate::{Result, TrainError};
pub use data::{DataSection, Documents, Source};
use locate::Located;
pub use optimizer::{Group, Groups, OptimizerKind, OptimizerSection, ScheduleKind};
pub use watch::{SampleSection, SpikeAction, SpikeSection};

pub(crate) use check::Checks;
pub use depths::{DepthsSection, RecipeSampler};
pub(crate) use optimizer::check_section as check_optimizer;
pub(crate) use router::RoutedLayer;
pub use router::RouterSection;

/// One training run, as `recipes/*.toml` writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// `[model]`: the shape of the network.
    pub model: ModelSection,
    /// `[tokenizer]`: how text becomes tokens.
    #[serde(default)]
    pub tokenizer: TokenizerSection,
    /// `[data]`: the texts.
    pub data: DataSection,
    /// `[train]`: steps, batches, validation, checkpoints.
    pub train: TrainSection,
    /// `[optimizer]`: the method and its schedule.
    #[serde(default)]
    pub optimizer: OptimizerSection,
    /// `[router]`: the routing method, in place of the softmax router of Mixtral.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router: Option<RouterSection>,
    /// `[depths]`: layers that only some tokens go through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depths: Option<DepthsSection>,
    /// `[balance]`: what keeps the experts evenly loaded.
    #[serde(default)]
    pub balance: BalanceSection,
    /// `[spikes]`: what a loss spike is, and what is done about one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub spikes: SpikeSection,
    /// `[samples]`: texts written on the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<SampleSection>,
    /// The folder that relative paths start from; not part of the file.
    #[serde(skip)]
    folder: PathBuf,
    /// The file as it was read.
    #[serde(skip)]
    text: String,
}

/// `[model]`. Without `experts` the model is dense (Llama's layout), with it sparse (Mixtral's: the router's softmax
/// over the chosen experts, weights that sum to one).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// A shape by name ([`presets::PRESETS`]); what the section itself says goes before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// Width of the residual stream.
    #[serde(default)]
    pub hidden: usize,
    /// Number of decoder layers.
    #[serde(default)]
    pub layers: usize,
    /// Number of query heads.
    #[serde(default)]
    pub heads: usize,
    /// Number of key and value heads; `heads` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// Inner width of one expert, or of the only feed-forward block of a dense model.
    #[serde(default)]
    pub ffn: usize,
    /// Number of experts a layer; absent: dense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<usize>,
    /// Number of experts that each token is given to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts_per_token: Option<usize>,
    /// Every so many layers one has experts, the last of them; the others are dense (GLaM: 2).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub experts_every: usize,
    /// Inner width of the dense layers between; `ffn` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dense_ffn: Option<usize>,
    /// The non-linearity of experts, or of a dense model's networks.
    #[serde(default, skip_serializing_if = "is_default")]
    pub activation: Activation,
    /// That of the dense layers between; `activation` if absent (GLaM: `"gelu"`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dense_activation: Option<Activation>,
    /// How queries and keys are normed.
    #[serde(default, skip_serializing_if = "is_default")]
    pub qk_norm: RecipeQkNorm,
    /// Number of positions that the model declares (`max_position_embeddings`).
    #[serde(default)]
    pub context: usize,
    /// Base of the rotary embedding.
    #[serde(default = "ten_thousand")]
    pub rope_theta: f64,
    /// Added to the mean square in RMSNorm.
    #[serde(default = "norm_epsilon")]
    pub norm_epsilon: f64,
    /// Whether the output projection is the embedding's own matrix.
    #[serde(default)]
    pub tied_embeddings: bool,
}

/// `model.qk_norm`: RMSNorm of queries and keys before they are turned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecipeQkNorm {
    /// None.
    #[default]
    None,
    /// Each head by itself (Qwen3).
    Head,
    /// All heads together (OLMoE).
    Projection,
}

impl From<RecipeQkNorm> for QkNorm {
    fn from(norm: RecipeQkNorm) -> Self {
        match norm {
            RecipeQkNorm::None => Self::None,
            RecipeQkNorm::Head => Self::Head,
            RecipeQkNorm::Projection => Self::Projection,
        }
    }
}

/// `model.activation`: what becomes of a network's gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// SwiGLU (Shazeer 2020).
    #[default]
    Silu,
    /// GEGLU (Shazeer 2020), gelu by its tanh form.
    Gelu,
}

impl From<Activation> for Gate {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Silu => Self::Silu,
            Activation::Gelu => Self::GeluTanh,
        }
    }
}

/// `[tokenizer]`: a byte-level BPE, trained on the training texts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerSection {
    /// Number of tokens, the 256 bytes and `<|endoftext|>` among them.
    #[serde(default)]
    pub vocab_size: usize,
    /// A pair of symbols must occur this often to become a token.
    #[serde(default = "two")]
    pub min_frequency: u64,
}

/// `[train]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSection {
    /// Seed of the initial weights and of the order of the data.
    #[serde(default = "seed")]
    pub seed: u64,
    /// Number of optimiser steps.
    pub steps: u64,
    /// Tokens in one sequence; `model.context` if absent.
    #[serde(default)]
    pub sequence_length: usize,
    /// Sequences that go through the model at once.
    #[serde(default = "sixteen")]
    pub sequences: usize,
    /// Micro-batches of `sequences` sequences that one step averages over.
    #[serde(default = "one")]
    pub accumulation: usize,
    /// What the operands of matrix products are rounded to; accumulators, weights and optimiser state are f32 always.
    #[serde(default)]
    pub precision: RecipePrecision,
    /// The same for routers and their logits: f32 but to see what bf16 does.
    #[serde(default = "f32", skip_serializing_if = "is_f32")]
    pub router_precision: RecipePrecision,
    /// Share of the experts' inner activations that is dropped in training (Fedus et al. 2021: 0.4, fine-tuning only).
    #[serde(default, skip_serializing_if = "is_default")]
    pub expert_dropout: f64,
    /// Whether each layer is computed again in the backward pass instead of keeping its activations.
    #[serde(default)]
    pub checkpoint_activations: bool,
    /// Steps between validations; a tenth of the steps if absent.
    #[serde(default)]
    pub validate_every: u64,
    /// Number of batches of `sequences` sequences in one validation.
    #[serde(default = "sixteen")]
    pub validate_batches: usize,
    /// Steps between checkpoints; `validate_every` if absent.
    #[serde(default)]
    pub save_every: u64,
    /// Decay of a running average of the weights (Polyak & Juditsky 1992), which is validated, saved and exported beside
    /// them; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average: Option<f64>,
    /// The run ends after so many validations in a row without a new lowest loss; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience: Option<u64>,
    /// Whether TensorBoard's event files are written.
    #[serde(default = "yes")]
    pub tensorboard: bool,
    /// Number of checkpoints kept.
    #[serde(default = "two_checkpoints")]
    pub keep: usize,
    /// Which weights `out/model` gets at the end.
    #[serde(default)]
    pub export: Export,
    /// How the weights in `out/model` are stored.
    #[serde(default)]
    pub export_dtype: ExportDtype,
}

/// `train.precision`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecipePrecision {
    /// Operands as they are.
    F32,
    /// Operands rounded to bfloat16.
    #[default]
    Bf16,
}

impl From<RecipePrecision> for Precision {
    fn from(precision: RecipePrecision) -> Self {
        match precision {
            RecipePrecision::F32 => Precision::F32,
            RecipePrecision::Bf16 => Precision::Bf16,
        }
    }
}

/// `train.export`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Export {
    /// The weights after the last step.
    Last,
    /// Their running average, `train.average`.
    Average,
    /// The weights of the lowest validation loss.
    #[default]
    Best,
}

/// `train.export_dtype`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportDtype {
    /// Four bytes a weight.
    #[default]
    F32,
    /// Two bytes a weight, rounded to nearest even.
    Bf16,
}

/// `[balance]`: coefficients of the auxiliary losses (Switch Transformer 2.2; ST-MoE 3).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalanceSection {
    /// Coefficient of the load-balancing loss, a layer's own, mean over layers (about `experts_per_token` when even);
    /// 0: off.
    #[serde(default)]
    pub load_balancing: f64,
    /// Coefficient of the router's z-loss; 0: off.
    #[serde(default)]
    pub z: f64,
    /// Whose choices the load-balancing loss counts, where a step has several micro-batches.
    #[serde(default, skip_serializing_if = "is_default")]
    pub over: BalanceOver,
}

/// `balance.over`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalanceOver {
    /// The micro-batch's own.
    #[default]
    MicroBatch,
    /// Those of the step's micro-batches so far (Qiu et al. 2025).
    SoFar,
    /// The whole step's, counted beforehand by a pass without gradients.
    Step,
}

impl Default for TokenizerSection {
    fn default() -> Self {
        Self { vocab_size: 0, min_frequency: two() }
    }
}

fn yes() -> bool {
    true
}
fn one() -> usize {
    1
}
fn is_one(value: &usize) -> bool {
    *value == 1
}
fn two() -> u64 {
    2
}
fn two_checkpoints() -> usize {
    2
}
fn ten_thousand() -> f64 {
    1e4
}
fn norm_epsilon() -> f64 {
    1e-5
}
fn seed() -> u64 {
    1
}
fn f32() -> RecipePrecision {
    RecipePrecision::F32
}
fn is_f32(precision: &RecipePrecision) -> bool {
    *precision == RecipePrecision::F32
}
fn sixteen() -> usize {
    16
}

/// Whether a section says nothing that its default does not: then a checkpoint need not carry it.
fn is_default<T: Default + PartialEq>(section: &T) -> bool {
    *section == T::default()
}

/// Keys that may change between a run and its resumption: how long, how often, what is kept. A longer or shorter run
/// stretches the cosine schedule from the resumed step on; every other key would make it another run.
const FREE_KEYS: [&str; 9] = [
    "model.preset",
    "train.steps",
    "train.validate_every",
    "train.save_every",
    "train.keep",
    "train.export",
    "train.export_dtype",
    "train.patience",
    "train.tensorboard",
];

impl Recipe {
    /// Reads and checks a recipe.
    ///
    /// # Errors
    /// The first thing wrong with it, with file, line and key.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(TrainError::io("read", path))?;
        let text = crate::data::text::utf8(path, bytes)?;
        Self::parse(&path.display().to_string(), path.parent().unwrap_or(Path::new("")), &text)
    }

    /// Checks the text of a recipe that calls itself `name` and stands in `folder`.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn parse(name: &str, folder: &Path, text: &str) -> Result<Self> {
        let located = Located::parse(name, text)?;
        let mut recipe: Self = toml::from_str(text).map_err(|error| located.explain(&error))?;
        recipe.folder = folder.to_path_buf();
        recipe.text = text.to_owned();
        presets::fill(&mut recipe, &located);
        match check::first_violation(&recipe, &located) {
            None => Ok(recipe),
            Some(violation) => Err(located.error(&violation.key, violation.message)),
        }
    }

    /// The file as it was read, comments and all.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// `path` as the recipe means it: relative to the recipe's folder.
    pub fn resolve(&self, path: &Path) -> PathBuf {
        self.folder.join(path)
    }

    /// The same recipe with another seed; its text says so in its first line.
    #[must_use]
    pub fn with_seed(&self, seed: u64) -> Self {
        let mut recipe = self.clone();
        recipe.train.seed = seed;
        recipe.text = format!("# train.seed = {seed}, whatever stands below\n{}", self.text);
        recipe
    }

    /// Tokens that one optimiser step sees.
    pub fn tokens_per_step(&self) -> usize {
        self.train.sequence_length * self.train.sequences * self.train.accumulation
    }

    /// The first key, in alphabetical order of sections and keys, that makes `self` and `other` different runs, with both
    /// values; `None` if `other` may continue what `self` began.
    pub fn difference(&self, other: &Self) -> Option<(String, String, String)> {
        first_difference(self, other, &FREE_KEYS)
    }
}

/// The first key, in alphabetical order of sections and keys, in which two recipes differ, with both values; `free` keys
/// may.
pub(crate) fn first_difference<R: Serialize>(mine: &R, theirs: &R, free: &[&str]) -> Option<(String, String, String)> {
    let (mine, theirs) = (flatten(mine), flatten(theirs));
    let keys = mine.keys().chain(theirs.keys()).collect::<std::collections::BTreeSet<_>>();
    let show = |value: Option<&String>| value.cloned().unwrap_or_else(|| "absent".to_owned());
    keys.into_iter()
        .filter(|key| !free.contains(&key.as_str()))
        .find(|key| mine.get(*key) != theirs.get(*key))
        .map(|key| (key.clone(), show(mine.get(key)), show(theirs.get(key))))
}

/// Every key with its value as JSON writes it, defaults included.
pub(crate) fn flatten(recipe: &impl Serialize) -> std::collections::BTreeMap<String, String> {
    let json = serde_json::to_value(recipe).expect("a recipe is plain data");
    let sections = json.as_object().into_iter().flatten();
    let pairs = sections.flat_map(|(section, keys)| {
        keys.as_object().into_iter().flatten().map(move |(key, value)| (format!("{section}.{key}"), value.to_string()))
    });
    pairs.collect()
}

#[cfg(test)]
mod tests;
