//! What can go wrong in training, each as one line that says where, what was wanted and what was found.

use std::path::{Path, PathBuf};

/// An error of this crate. Its text is one line, fit to be shown to a person as it is.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A recipe that cannot be obeyed. `line` counts from 1; `key` is dotted, as `train.steps`.
    #[error("{file}:{line}: {key}: {message}")]
    Recipe {
        /// The recipe as the caller named it.
        file: String,
        /// The line of the key, or of its section where the key is missing.
        line: usize,
        /// The dotted key.
        key: String,
        /// What was wanted and what was found.
        message: String,
    },
    /// A recipe that is not TOML at all.
    #[error("{file}:{line}: not valid TOML: {message}")]
    Syntax {
        /// The recipe as the caller named it.
        file: String,
        /// The line, from 1.
        line: usize,
        /// The parser's word on it.
        message: String,
    },
    /// The operating system refused something.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What was being done, as a verb: `read`, `write`, `rename`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A text that is not UTF-8.
    #[error("{}: wanted UTF-8 text, found an invalid byte 0x{byte:02x} at byte offset {offset}", path.display())]
    NotUtf8 {
        /// The text file.
        path: PathBuf,
        /// Where the first invalid sequence starts.
        offset: usize,
        /// Its first byte.
        byte: u8,
    },
    /// Texts from which nothing can be trained.
    #[error("{what}: {message}")]
    Data {
        /// A file, or the part of the data concerned.
        what: String,
        /// What was wanted and what was found.
        message: String,
    },
    /// A token shard that is damaged or of another kind.
    #[error("{}: token shard: wanted {wanted}, found {found}", path.display())]
    Shard {
        /// The shard.
        path: PathBuf,
        /// What a sound shard holds.
        wanted: String,
        /// What this one holds.
        found: String,
    },
    /// The `tokenizers` crate refused.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The output folder already holds a run, and neither `--resume` nor `--force` was given.
    #[error("{}: already holds a run (at step {step}); use --resume to go on, --force to start anew", path.display())]
    RunExists {
        /// The run's folder.
        path: PathBuf,
        /// The step of its latest checkpoint; 0 if it has none.
        step: u64,
    },
    /// `--resume` where there is nothing to resume.
    #[error("{}: nothing to resume: {message}", path.display())]
    NothingToResume {
        /// The run's folder.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// `--resume` with a recipe that would not continue the same run.
    #[error("{}: cannot resume: {key} was {was}, the recipe now says {now}", path.display())]
    RecipeChanged {
        /// The checkpoint.
        path: PathBuf,
        /// The dotted key.
        key: String,
        /// Its value when the run started.
        was: String,
        /// Its value in the recipe at hand.
        now: String,
    },
    /// A checkpoint that is damaged or does not fit the recipe.
    #[error("{}: checkpoint: {message}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What was wanted and what was found.
        message: String,
    },
    /// The loss or the gradient stopped being a number.
    #[error(
        "step {step}: {what} is {value}: training diverged; lower optimizer.learning_rate or raise optimizer.warmup_steps"
    )]
    Diverged {
        /// The step, from 1.
        step: u64,
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// What it became.
        value: f64,
    },
    /// Spikes came back after every rollback that the recipe allows.
    #[error(
        "step {step}: a loss spike after {rollbacks} rollbacks; lower optimizer.learning_rate, raise optimizer.warmup_steps or spikes.rollbacks"
    )]
    Spikes {
        /// The step of the last spike, from 1.
        step: u64,
        /// Rollbacks before it.
        rollbacks: u64,
    },
    /// A sample could not be written.
    #[error("samples: prompt {prompt:?}: {message}")]
    Sample {
        /// The prompt.
        prompt: String,
        /// Why.
        message: String,
    },
    /// Recipes that cannot be compared.
    #[error("compare: {message}")]
    Compare {
        /// Why.
        message: String,
    },
    /// The plot could not be drawn.
    #[error("{}: cannot draw: {message}", path.display())]
    Plot {
        /// The SVG file.
        path: PathBuf,
        /// The drawing library's word on it.
        message: String,
    },
    /// The model crate refused: a shape, a file, a configuration.
    #[error(transparent)]
    Model(#[from] moebius_model::ModelError),
}

/// The result of whatever can fail here.
pub type Result<T, E = TrainError> = std::result::Result<T, E>;

impl TrainError {
    /// Turns an [`std::io::Error`] into one that names the file; for `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_path_buf(), source }
    }
}
