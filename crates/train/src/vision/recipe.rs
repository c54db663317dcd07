//! `recipes/vision-*.toml`: a vision transformer, its images, its training; checked like a language model's recipe.

use std::path::{Path, PathBuf};

use moebius_model::vision::{Mixture, Pooling, VisionConfig};
use serde::{Deserialize, Serialize};

use super::data::Dataset;
use crate::recipe::locate::Located;
use crate::recipe::{Checks, OptimizerSection, RecipePrecision, RoutedLayer, RouterSection, check_optimizer};
use crate::{Result, TrainError};

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionRecipe {
    /// `[vision]`: the shape of the network.
    pub vision: VisionSection,
    /// `[router]`: the routing method of routed blocks; V-MoE's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router: Option<RouterSection>,
    /// `[data]`: the images.
    pub data: ImageSection,
    /// `[train]`: steps, batches, validation, checkpoints.
    pub train: VisionTrainSection,
    /// `[optimizer]`: AdamW and its schedule.
    pub optimizer: OptimizerSection,
    /// The folder that relative paths start from; not part of the file.
    #[serde(skip)]
    folder: PathBuf,
    /// The file as it was read.
    #[serde(skip)]
    text: String,
}

/// `[vision]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionSection {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Blocks.
    pub layers: usize,
    /// Heads of attention.
    pub heads: usize,
    /// Inner width of a dense block's network, and of one expert.
    pub ffn: usize,
    /// Pixels of a patch's side.
    pub patch: usize,
    /// What the class is read off.
    #[serde(default)]
    pub pooling: RecipePooling,
    /// What the last `sparse_layers` blocks are.
    #[serde(default)]
    pub block: BlockKind,
    /// How many blocks are sparse.
    #[serde(default)]
    pub sparse_layers: usize,
    /// Experts of a sparse block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<usize>,
    /// Experts a token is given to, in routed blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts_per_token: Option<usize>,
    /// Slots of each expert an image, in soft blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<usize>,
}

/// `vision.pooling`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecipePooling {
    /// The mean of all tokens.
    #[default]
    Mean,
    /// A token of its own.
    Token,
}

/// `vision.block`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockKind {
    /// No mixture anywhere.
    #[default]
    Dense,
    /// Experts behind a router.
    Routed,
    /// Soft MoE.
    Soft,
}

/// `[data]` of images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSection {
    /// What the paths name.
    pub format: Format,
    /// IDX: images to learn from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_images: Option<PathBuf>,
    /// IDX: their labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_labels: Option<PathBuf>,
    /// IDX: images held back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_images: Option<PathBuf>,
    /// IDX: their labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_labels: Option<PathBuf>,
    /// Folders: one with a folder a class, to learn from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<PathBuf>,
    /// Folders: the same, held back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid: Option<PathBuf>,
    /// Folders: pixels from top to bottom that images are brought to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub height: Option<usize>,
    /// Folders: pixels from left to right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// Folders: 1 (grey) or 3.
    #[serde(default = "three")]
    pub channels: usize,
}

/// `data.format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// IDX files, plain or gzipped.
    Idx,
    /// A folder a class, PNG or JPEG files in it.
    Folders,
}

/// `[train]` of a vision model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionTrainSection {
    /// Seed of weights, order of images, routers' noise.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Images that go through the model at once.
    pub images: usize,
    /// Micro-batches that one step averages over.
    #[serde(default = "one")]
    pub accumulation: usize,
    /// What the operands of matrix products are rounded to.
    #[serde(default)]
    pub precision: RecipePrecision,
    /// Steps between validations, each over all images held back.
    pub validate_every: u64,
    /// Steps between checkpoints.
    pub save_every: u64,
    /// Checkpoints kept.
    #[serde(default = "two")]
    pub keep: usize,
}

fn one() -> usize {
    1
}
fn two() -> usize {
    2
}
fn three() -> usize {
    3
}

/// Keys that may change between a run and its resumption.
const FREE_KEYS: [&str; 4] = ["train.steps", "train.validate_every", "train.save_every", "train.keep"];

/// Whether a recipe's text is a vision model's.
pub fn is_vision(text: &str) -> bool {
    text.lines().any(|line| line.trim() == "[vision]")
}

impl VisionRecipe {
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
    /// As [`VisionRecipe::load`].
    pub fn parse(name: &str, folder: &Path, text: &str) -> Result<Self> {
        let located = Located::parse(name, text)?;
        let mut recipe: Self = toml::from_str(text).map_err(|error| located.explain(&error))?;
        recipe.folder = folder.to_path_buf();
        recipe.text = text.to_owned();
        let mut checks = Checks::default();
        recipe.check_model(&mut checks);
        recipe.check_data(&mut checks);
        recipe.check_train(&mut checks);
        check_optimizer(&recipe.optimizer, recipe.train.steps, &located, &mut checks);
        recipe.check_router(&mut checks);
        match checks.first() {
            None => Ok(recipe),
            Some(violation) => Err(located.error(&violation.key, violation.message)),
        }
    }

    /// The file as it was read.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// `path` as the recipe means it.
    pub fn resolve(&self, path: &Path) -> PathBuf {
        self.folder.join(path)
    }

    /// The first key that makes `self` and `other` different runs, with both values.
    pub fn difference(&self, other: &Self) -> Option<(String, String, String)> {
        crate::recipe::first_difference(self, other, &FREE_KEYS)
    }

    /// The model for a dataset.
    pub fn model(&self, dataset: &Dataset) -> VisionConfig {
        let (vision, shape) = (&self.vision, dataset.train.shape);
        VisionConfig {
            channels: shape.channels,
            height: shape.height,
            width: shape.width,
            patch: vision.patch,
            hidden: vision.hidden,
            layers: vision.layers,
            heads: vision.heads,
            ffn: vision.ffn,
            classes: dataset.classes.len(),
            pooling: match vision.pooling {
                RecipePooling::Mean => Pooling::Mean,
                RecipePooling::Token => Pooling::Token,
            },
            sparse_layers: vision.sparse_layers,
            mixture: self.mixture(),
        }
    }

    /// V-MoE's router if the recipe names none.
    fn router_section(&self) -> RouterSection {
        self.router.clone().unwrap_or_else(|| RouterSection::named("vision"))
    }

    fn mixture(&self) -> Option<Mixture> {
        let vision = &self.vision;
        let experts = vision.experts.unwrap_or_default();
        match vision.block {
            BlockKind::Dense => None,
            BlockKind::Soft => Some(Mixture::Soft { experts, slots: vision.slots.unwrap_or_default() }),
            BlockKind::Routed => Some(Mixture::Routed {
                method: self.router_section().method(),
                experts,
                top_k: vision.experts_per_token.unwrap_or_default(),
            }),
        }
    }

    fn check_model(&self, checks: &mut Checks) {
        let vision = &self.vision;
        checks.count("vision.hidden", vision.hidden, 1..=65_536);
        checks.count("vision.layers", vision.layers, 1..=1024);
        checks.count("vision.heads", vision.heads, 1..=1024);
        checks.count("vision.ffn", vision.ffn, 1..=65_536);
        checks.count("vision.patch", vision.patch, 1..=1024);
        let divides = vision.heads > 0 && vision.hidden.is_multiple_of(vision.heads);
        checks.require(
            divides,
            "vision.heads",
            format!("a divisor of vision.hidden = {}", vision.hidden),
            vision.heads,
        );
        let sparse = vision.block != BlockKind::Dense;
        let most = if sparse { 1..=vision.layers } else { 0..=0 };
        checks.count("vision.sparse_layers", vision.sparse_layers, most);
        let wanted = [
            ("vision.experts", sparse, vision.experts),
            ("vision.experts_per_token", vision.block == BlockKind::Routed, vision.experts_per_token),
            ("vision.slots", vision.block == BlockKind::Soft, vision.slots),
        ];
        for (key, wanted, found) in wanted {
            match found {
                Some(found) if wanted => checks.count(key, found, 1..=4096),
                Some(found) => checks.require(false, key, "no such key with this vision.block", found),
                None => checks.require(!wanted, key, "a number with this vision.block", "nothing"),
            }
        }
    }

    fn check_data(&self, checks: &mut Checks) {
        let data = &self.data;
        let idx = data.format == Format::Idx;
        let paths = [
            ("data.train_images", idx, &data.train_images),
            ("data.train_labels", idx, &data.train_labels),
            ("data.valid_images", idx, &data.valid_images),
            ("data.valid_labels", idx, &data.valid_labels),
            ("data.train", !idx, &data.train),
            ("data.valid", !idx, &data.valid),
        ];
        for (key, wanted, found) in paths {
            let what = if wanted { "a path with this data.format" } else { "no such key with this data.format" };
            let found_text = found.as_ref().map_or("nothing".to_owned(), |path| path.display().to_string());
            checks.require(found.is_some() == wanted, key, what, found_text);
        }
        for (key, side) in [("data.height", data.height), ("data.width", data.width)] {
            let found = side.map_or("nothing".to_owned(), |side| side.to_string());
            let what = if idx { "no such key: IDX files say it" } else { "1 to 4096 pixels" };
            let fits = if idx { side.is_none() } else { side.is_some_and(|side| (1..=4096).contains(&side)) };
            checks.require(fits, key, what, found);
        }
        checks.require([1, 3].contains(&data.channels), "data.channels", "1 or 3", data.channels);
    }

    fn check_train(&self, checks: &mut Checks) {
        let train = &self.train;
        checks.require(train.seed <= i64::MAX as u64, "train.seed", "0 to 9223372036854775807", train.seed);
        checks.count("train.steps", train.steps as usize, 1..=1 << 40);
        checks.count("train.images", train.images, 1..=1 << 20);
        checks.count("train.accumulation", train.accumulation, 1..=1 << 16);
        checks.count("train.validate_every", train.validate_every as usize, 1..=1 << 40);
        checks.count("train.save_every", train.save_every as usize, 1..=1 << 40);
        checks.count("train.keep", train.keep, 1..=1 << 16);
    }

    /// Builds the router once, so that what it refuses is refused here.
    fn check_router(&self, checks: &mut Checks) {
        let routed = self.vision.block == BlockKind::Routed;
        if let Some(router) = &self.router {
            checks.require(routed, "router.name", "no router without vision.block = \"routed\"", router.name());
        }
        if !checks.is_empty() || !routed {
            return;
        }
        let (experts, top_k) = (self.vision.experts.unwrap_or(1), self.vision.experts_per_token.unwrap_or(1));
        let top_k_key = "vision.experts_per_token";
        self.router_section()
            .check(&RoutedLayer { experts, top_k, vocabulary: 0, causal: false, tokens: None, top_k_key }, checks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
[vision]
hidden = 32
layers = 2
heads = 4
ffn = 48
patch = 4
block = 'routed'
sparse_layers = 1
experts = 4
experts_per_token = 2

[router]
name = 'vision'
capacity_factor = 0.5
batch_priority = true

[data]
format = 'idx'
train_images = 'a'
train_labels = 'b'
valid_images = 'c'
valid_labels = 'd'

[train]
seed = 1
steps = 10
images = 16
validate_every = 5
save_every = 5

[optimizer]
learning_rate = 1e-3
minimum_learning_rate = 1e-4
warmup_steps = 2
";

    fn parse(text: &str) -> Result<VisionRecipe> {
        VisionRecipe::parse("v.toml", Path::new("recipes"), text)
    }

    #[test]
    fn a_good_recipe() {
        let recipe = parse(GOOD).unwrap();
        assert!(is_vision(GOOD));
        let Some(Mixture::Routed { method, experts: 4, top_k: 2 }) = recipe.mixture() else { panic!() };
        assert_eq!((&method.name[..], method.options.len()), ("vision", 2));
        let json = serde_json::to_string(&recipe).unwrap();
        let back: VisionRecipe = serde_json::from_str(&json).unwrap();
        assert_eq!(recipe.difference(&back), None);
    }

    #[test]
    fn bad_recipes_name_the_line() {
        let cases = [
            ("hidden = 32", "hidden = 30", "4: vision.heads: wanted a divisor of vision.hidden = 30, found 4"),
            ("experts = 4\n", "", "1: vision.experts: wanted a number with this vision.block, found nothing"),
            ("patch = 4", "slots = 4\npatch = 4", "6: vision.slots: wanted no such key with this vision.block"),
            ("sparse_layers = 1", "sparse_layers = 3", "8: vision.sparse_layers: wanted 1 to 2, found 3"),
            ("name = 'vision'", "name = 'visoin'", "13: router.name: wanted one of top_k"),
            ("capacity_factor = 0.5", "capacity_factor = -1", "14: router.capacity_factor: wanted 0.001 to"),
            ("batch_priority = true", "priority = true", "15: router.priority: wanted an option that this router has"),
            ("batch_priority = true", "batch_priority = [1]", "router"),
            ("experts_per_token = 2", "experts_per_token = 5", "10: vision.experts_per_token: "),
            ("valid_labels = 'd'\n", "", "17: data.valid_labels: wanted a path with this data.format, found nothing"),
            ("format = 'idx'", "format = 'png'", "18: data.format: wanted `idx` or `folders`, found"),
            ("images = 16", "images = 0", "27: train.images: wanted 1 to 1048576, found 0"),
        ];
        for (from, to, wanted) in cases {
            assert!(GOOD.contains(from), "{from}");
            let error = parse(&GOOD.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.starts_with("v.toml:") && error.contains(wanted) && !error.contains('\n'), "{error}");
        }
    }
}
