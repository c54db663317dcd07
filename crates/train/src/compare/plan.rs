//! Which runs a comparison is made of.

use std::path::{Path, PathBuf};

use crate::digest::{Digest, Hasher};
use crate::recipe::flatten;
use crate::{Recipe, Result, TrainError};

/// Keys that do not change what a run learns: a run that differs in these alone is the same run.
const INDIFFERENT: [&str; 7] = [
    "model.preset",
    "train.save_every",
    "train.keep",
    "train.export",
    "train.export_dtype",
    "train.tensorboard",
    "samples",
];

/// What recipes must have in common to see the same tokens in the same order and to be measured on the same ones.
const COMMON: [&str; 5] = ["tokenizer.", "data.", "train.sequence_length", "train.patience", "train.seed"];

/// The runs of a comparison.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The folder of the comparison.
    pub root: PathBuf,
    /// The recipes' names, in the order given; the first is what the others are measured against.
    pub names: Vec<String>,
    /// The seeds.
    pub seeds: Vec<u64>,
    /// Every recipe with every seed, all recipes of one seed together.
    pub runs: Vec<PlannedRun>,
}

/// One run.
#[derive(Clone, Debug)]
pub struct PlannedRun {
    /// Which of [`Plan::names`].
    pub recipe_idx: usize,
    /// Its seed.
    pub seed: u64,
    /// The recipe with this seed.
    pub recipe: Recipe,
    /// Where it lies.
    pub folder: PathBuf,
}

impl Plan {
    /// Reads the recipes and checks that they can be compared.
    ///
    /// # Errors
    /// A recipe that cannot be read, fewer than two of them, no seed, two of one name, or recipes that would not see the
    /// same tokens.
    pub fn new(paths: &[PathBuf], seeds: &[u64], root: &Path) -> Result<Self> {
        let refuse = |message: String| TrainError::Compare { message };
        if paths.len() < 2 || seeds.is_empty() {
            return Err(refuse(format!(
                "wanted two recipes or more and a seed, found {} and {}",
                paths.len(),
                seeds.len()
            )));
        }
        let mut named: Vec<(String, Recipe)> = Vec::new();
        for path in paths {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if named.iter().any(|(other, _)| *other == name) {
                return Err(refuse(format!("wanted recipes of different names, found {name} twice")));
            }
            named.push((name, Recipe::load(path)?));
        }
        let ((first_name, first), others) = named.split_first().expect("two or more");
        for (name, recipe) in others {
            if let Some(message) = mismatch(first, recipe) {
                return Err(refuse(format!("{first_name} and {name} cannot be compared: {message}")));
            }
        }
        if let Some(seed) = seeds.iter().enumerate().find(|(at, seed)| seeds[..*at].contains(seed)) {
            return Err(refuse(format!("wanted seeds that differ, found {} twice", seed.1)));
        }
        let mut runs = Vec::new();
        for &seed in seeds {
            for (recipe_idx, (name, recipe)) in named.iter().enumerate() {
                let recipe = recipe.with_seed(seed);
                let folder = root.join("runs").join(format!("{name}-seed{seed}-{}", key(&recipe)));
                runs.push(PlannedRun { recipe_idx, seed, recipe, folder });
            }
        }
        let names = named.into_iter().map(|(name, _)| name).collect();
        Ok(Self { root: root.to_path_buf(), names, seeds: seeds.to_vec(), runs })
    }

    /// Where all runs have their tokens.
    pub fn data(&self) -> PathBuf {
        self.root.join("data")
    }
}

/// What makes a run the run that it is.
fn key(recipe: &Recipe) -> Digest {
    let mut hasher = Hasher::default();
    for (key, value) in flatten(recipe) {
        if !INDIFFERENT.iter().any(|indifferent| key == *indifferent || key.starts_with(&format!("{indifferent}."))) {
            hasher.write_sized(key.as_bytes());
            hasher.write_sized(value.as_bytes());
        }
    }
    hasher.finish()
}

/// Why two recipes cannot be compared.
fn mismatch(first: &Recipe, other: &Recipe) -> Option<String> {
    let (mine, theirs) = (flatten(first), flatten(other));
    let resolved = |recipe: &Recipe, key: &str, value: &String| {
        // Recipes of different folders may name the same texts by different paths.
        if key.starts_with("data.") {
            format!("{value} in {}", recipe.resolve(Path::new("")).display())
        } else {
            value.clone()
        }
    };
    let keys = mine.keys().chain(theirs.keys()).filter(|key| COMMON.iter().any(|common| key.starts_with(common)));
    for key in keys.filter(|key| *key != "train.seed") {
        let show = |recipe: &Recipe, values: &std::collections::BTreeMap<String, String>| {
            values.get(key).map_or("absent".to_owned(), |value| resolved(recipe, key, value))
        };
        let (was, is) = (show(first, &mine), show(other, &theirs));
        if was != is {
            return Some(format!("{key} is {was} in the one, {is} in the other"));
        }
    }
    let amounts = |recipe: &Recipe| {
        let train = &recipe.train;
        [
            ("tokens a step", recipe.tokens_per_step()),
            ("sequences in a validation", train.sequences * train.validate_batches),
        ]
    };
    let pairs = amounts(first).into_iter().zip(amounts(other));
    let mut differing = pairs.filter(|(was, is)| was != is);
    differing.next().map(|((what, was), (_, is))| format!("{was} {what} in the one, {is} in the other"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(format!("{name}.toml"));
        std::fs::write(&path, text).unwrap();
        path
    }

    const DENSE: &str = "[model]\npreset = 'dense-nano'\n[data]\ntrain = ['a']\nvalid = ['b']\n[train]\nsteps = 9\n";

    #[test]
    fn runs_are_known_by_content_and_seed() {
        let root = tempfile::tempdir().unwrap();
        let dense = recipe(root.path(), "dense", DENSE);
        let sparse = recipe(root.path(), "sparse", &DENSE.replace("dense-nano", "moe-nano"));
        let plan = Plan::new(&[dense.clone(), sparse.clone()], &[1, 2], root.path()).unwrap();
        assert_eq!(plan.names, ["dense", "sparse"]);
        let order = plan.runs.iter().map(|run| (run.seed, run.recipe_idx)).collect::<Vec<_>>();
        assert_eq!(order, [(1, 0), (1, 1), (2, 0), (2, 1)]);
        let folders = |plan: &Plan| plan.runs.iter().map(|run| run.folder.clone()).collect::<Vec<_>>();
        let mut all = folders(&plan);
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 4);
        // Comments, spelled-out defaults and what is kept change nothing; a rate does.
        let same = format!(
            "# a comment\n{DENSE}keep = 7\nseed = 5\n[optimizer]\nbeta1 = 0.9\n[samples]\nevery = 1\nprompts = ['x']\n"
        );
        recipe(root.path(), "dense", &same);
        let again = Plan::new(&[dense.clone(), sparse.clone()], &[1, 2], root.path()).unwrap();
        assert_eq!(folders(&again), folders(&plan));
        recipe(root.path(), "dense", &format!("{DENSE}[optimizer]\nbeta1 = 0.8\n"));
        let other = Plan::new(&[dense, sparse], &[1, 2], root.path()).unwrap();
        assert_ne!(folders(&other)[0], folders(&plan)[0]);
        assert_eq!(folders(&other)[1], folders(&plan)[1]);
        assert_eq!(plan.runs[2].recipe.train.seed, 2);
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let dense = recipe(root.path(), "dense", DENSE);
        let with = |from: &str, to: &str| {
            let other = recipe(root.path(), "other", &DENSE.replacen(from, to, 1));
            Plan::new(&[dense.clone(), other], &[1], root.path()).expect_err(to).to_string()
        };
        for (from, to, wanted) in [
            ("['a']", "['c']", "dense and other cannot be compared: data.train is "),
            ("steps = 9", "steps = 9\nsequences = 4", "2048 tokens a step in the one, 512 in the other"),
            (
                "steps = 9",
                "steps = 9\nvalidate_batches = 4",
                "256 sequences in a validation in the one, 64 in the other",
            ),
            (
                "steps = 9",
                "steps = 9\nsequence_length = 64",
                "train.sequence_length is 128 in the one, 64 in the other",
            ),
            (
                "[data]",
                "[tokenizer]\nvocab_size = 600\n[data]",
                "tokenizer.vocab_size is 512 in the one, 600 in the other",
            ),
        ] {
            let error = with(from, to);
            assert!(error.contains(wanted), "{error}");
        }
        let error = Plan::new(std::slice::from_ref(&dense), &[1], root.path()).unwrap_err().to_string();
        assert_eq!(error, "compare: wanted two recipes or more and a seed, found 1 and 1");
        let error = Plan::new(&[dense.clone(), dense], &[1], root.path()).unwrap_err().to_string();
        assert!(error.ends_with("found dense twice"), "{error}");
    }
}
