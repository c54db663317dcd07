//! A run so small that it takes a second: an invented language, a two-layer model.

use std::path::{Path, PathBuf};

use moebius_train::{Recipe, Silent, Start, Trainer};

/// A folder with texts and a recipe, gone when dropped.
pub struct Workshop {
    root: tempfile::TempDir,
}

/// Words that follow each other by a rule a small model can learn.
fn invented_text(sentences: usize, mut state: u32) -> String {
    let words = ["amber", "birch", "cedar", "daisy", "elder", "fern", "grove", "hazel"];
    let mut text = String::new();
    for _ in 0..sentences {
        let mut word = (state >> 13) as usize % words.len();
        for _ in 0..6 {
            text.push_str(words[word]);
            text.push(' ');
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Two ways to go on, so that the loss has a floor above zero.
            word = (3 * word + 1 + (state >> 30) as usize % 2) % words.len();
        }
        text.push('\n');
    }
    text
}

impl Workshop {
    /// Texts for training and validation.
    pub fn new() -> Self {
        let root = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(root.path().join("train.txt"), invented_text(600, 1)).expect("a text");
        std::fs::write(root.path().join("valid.txt"), invented_text(100, 99)).expect("a text");
        std::fs::write(root.path().join("other.txt"), invented_text(80, 77)).expect("a text");
        Self { root }
    }

    /// A path in the workshop.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The tiny recipe with some of its lines replaced.
    pub fn recipe(&self, changes: &[(&str, &str)]) -> Recipe {
        let mut text = RECIPE.to_owned();
        for (from, to) in changes {
            assert!(text.contains(from), "{from}");
            text = text.replacen(from, to, 1);
        }
        Recipe::parse("workshop.toml", self.root.path(), &text).expect("a sound recipe")
    }

    /// A trainer that writes to the folder `out`.
    pub fn trainer(&self, recipe: &Recipe, out: &str, start: Start) -> Trainer {
        Trainer::prepare(recipe.clone(), &self.path(out), start, &mut Silent).expect("a trainer")
    }
}

const RECIPE: &str = "\
[model]
hidden = 32
layers = 2
heads = 4
kv_heads = 2
ffn = 24
experts = 4
experts_per_token = 2
context = 32

[tokenizer]
vocab_size = 280

[data]
train = ['train.txt']
valid = ['valid.txt']

[train]
seed = 7
steps = 12
sequence_length = 16
sequences = 4
accumulation = 1
precision = 'bf16'
checkpoint_activations = false
validate_every = 4
validate_batches = 3
save_every = 5
keep = 2

[optimizer]
learning_rate = 1e-2
minimum_learning_rate = 1e-3
warmup_steps = 3

[balance]
load_balancing = 0.01
z = 0.001
";

/// Every weight and every moment, as bits.
pub fn bits(trainer: &Trainer) -> Vec<u32> {
    let weights = trainer.model().params().into_iter().flat_map(|param| param.value().data().to_vec());
    let moments = trainer.optimizer().moments().iter();
    let moments = moments.flat_map(|moments| [moments.first.to_vec(), moments.second.to_vec()].concat());
    let average = trainer.learner().average.iter().flat_map(|average| average.weights().iter().map(|w| w.to_vec()));
    weights.chain(moments).chain(average.flatten()).map(f32::to_bits).collect()
}

/// The metrics without what a clock decides.
pub fn metrics(out: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).expect("a log");
    let without_clock = |line: &str| {
        let mut record: serde_json::Value = serde_json::from_str(line).expect("a record");
        for time in ["seconds", "optimizer_seconds"] {
            record.as_object_mut().expect("an object").remove(time);
        }
        record
    };
    text.lines().map(without_clock).collect()
}
