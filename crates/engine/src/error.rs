//! What can go wrong between a prompt and its text.

use std::path::PathBuf;

/// An error of the engine: each text names what was wanted and what was found.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The tokenizer file cannot be read.
    #[error("{}: cannot read the tokenizer: {source}", path.display())]
    TokenizerFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The bytes are no tokenizer.
    #[error("{name}: not a tokenizer.json: {reason}")]
    TokenizerFormat {
        /// The file, or the name given to the bytes.
        name: String,
        /// What the parser says.
        reason: String,
    },
    /// A folder has no tokenizer.
    #[error(
        "{}: no tokenizer: looked for tokenizer.json, tokenizer.model, tekken.json, tiktoken.model, qwen.tiktoken and \
         vocab.tiktoken",
        folder.display()
    )]
    TokenizerMissing {
        /// The folder.
        folder: PathBuf,
    },
    /// A tokenizer in another form is damaged, or of a kind that is not known.
    #[error("{name}: unusable tokenizer: {reason}")]
    TokenizerSource {
        /// The file.
        name: String,
        /// What was wanted and what was found.
        reason: String,
    },
    /// A chat template is damaged, refuses a conversation, or asks for too much.
    #[error("{name}{}: chat template: {reason}", line.map(|line| format!(", line {line} of the template")).unwrap_or_default())]
    Template {
        /// The file.
        name: String,
        /// The template's line.
        line: Option<usize>,
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer refused a text or a row of ids.
    #[error("{name}: the tokenizer cannot {action}: {reason}")]
    Tokenize {
        /// The tokenizer's file.
        name: String,
        /// "encode the text" or "decode the tokens".
        action: &'static str,
        /// What it says.
        reason: String,
    },
    /// A sampling option is out of its range.
    #[error("{option} must be {wanted}, found {found}")]
    Sampling {
        /// The option's name.
        option: &'static str,
        /// The range.
        wanted: &'static str,
        /// The value.
        found: f64,
    },
    /// A form that a text shall have is none, or asks for too much.
    #[error("grammar: {reason}")]
    Grammar {
        /// What is wrong with it.
        reason: String,
    },
    /// The logits are unusable.
    #[error("the logits hold {found} for token {token}: the weights are damaged or have overflowed")]
    Logits {
        /// The first token whose logit is not a number or infinite.
        token: usize,
        /// That logit.
        found: f32,
    },
    /// No token may be chosen.
    #[error("the logits of all {0} tokens are -inf: there is nothing to choose")]
    NoCandidate(usize),
    /// The prompt has no token.
    #[error("the prompt is empty: give at least one character")]
    EmptyPrompt,
    /// The prompt leaves no room.
    #[error("the prompt has {found} tokens, but the model's context holds {context}: shorten it to {} or fewer", context - 1)]
    PromptTooLong {
        /// Tokens of the prompt.
        found: usize,
        /// Positions the model has.
        context: usize,
    },
    /// A sequence needs more memory for keys and values than there is.
    #[error(
        "keys and values of {tokens} tokens need {needed} bytes, the cache has {budget}: shorten the prompt or raise the \
         memory of the cache"
    )]
    CacheTooSmall {
        /// Tokens of the sequence.
        tokens: usize,
        /// Bytes that they need.
        needed: usize,
        /// Bytes that there are.
        budget: usize,
    },
    /// A generation_config.json or config.json is wrong.
    #[error("{file}: `{key}` must be {wanted}, found {found}")]
    GenerationConfig {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// What it should hold.
        wanted: &'static str,
        /// What it holds.
        found: String,
    },
    /// The computation failed in a way that no request should be able to cause.
    #[error("internal failure: {0}")]
    Internal(String),
    /// The model refused: a token that it lacks, a sequence longer than its context.
    #[error(transparent)]
    Model(#[from] moebius_model::ModelError),
    /// A shape that does not fit.
    #[error(transparent)]
    Shape(#[from] moebius_tensor::TensorError),
}
