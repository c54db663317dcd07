//! What is asked of the scheduler, and what it tells while it answers.

use std::ops::ControlFlow;
use std::time::Duration;

use crate::grammar::Constraint;
use crate::{EngineError, Finish, SamplingOptions, TokenExperts};

/// One sequence to be written, scored or embedded.
pub struct Request {
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// What is to be done with it.
    pub task: Task,
    /// Whose it is: sequences of one client wait for each other, and clients share the machine evenly.
    pub client: u64,
    /// Who may share what was read: prefixes are found among those of the same tenant only.
    pub tenant: u64,
    /// Hears what happens.
    pub receiver: Box<dyn Receiver>,
}

/// What is to be done with a prompt.
pub enum Task {
    /// Write on.
    Generate(Box<Generate>),
    /// Give the hidden states after the final norm, brought to one vector.
    Embed(Pooling),
}

/// How to write.
pub struct Generate {
    /// The sampling chain.
    pub sampling: SamplingOptions,
    /// Numbers added to logits.
    pub bias: Vec<(u32, f32)>,
    /// The most tokens to write; 0 is allowed and reads the prompt only.
    pub max_tokens: usize,
    /// Texts that end the generation and are not shown.
    pub stop: Vec<String>,
    /// Tokens that end the generation.
    pub end_tokens: Vec<u32>,
    /// Whether special tokens are part of the text.
    pub show_special: bool,
    /// With each token its logarithmic probability, and those of so many of the likeliest.
    pub scores: Option<usize>,
    /// The same for each token of the prompt but the first. The prompt is read anew then, whatever is known of it.
    pub prompt_scores: Option<usize>,
    /// The experts of each token. The prompt is read anew then.
    pub trace_experts: bool,
    /// What the text must be.
    pub constraint: Option<Constraint>,
}

impl Default for Generate {
    fn default() -> Self {
        Self {
            sampling: SamplingOptions::greedy(),
            bias: Vec::new(),
            max_tokens: 16,
            stop: Vec::new(),
            end_tokens: Vec::new(),
            show_special: false,
            scores: None,
            prompt_scores: None,
            trace_experts: false,
            constraint: None,
        }
    }
}

/// How the hidden states of a text become one vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    #[default]
    Mean,
    /// The last one.
    Last,
}

/// Hears what happens to a request. Called by the thread that computes, so it must not wait.
pub trait Receiver: Send {
    /// Takes news; break: nobody listens any more, and the request ends.
    fn news(&mut self, news: News) -> ControlFlow<()>;

    /// Whether somebody still listens.
    fn is_listening(&self) -> bool;
}

/// What happens to a request.
#[derive(Debug)]
pub enum News {
    /// It is no longer waiting.
    Begun {
        /// Tokens of the prompt that need not be read: their keys and values are known.
        cached_tokens: usize,
    },
    /// More text.
    Text(Piece),
    /// The scores of the prompt's tokens from the second on.
    PromptScores(Vec<TokenScore>),
    /// The model has read a token: of the prompt, or one that it wrote.
    Experts(TokenExperts),
    /// The vector that was asked for, `[hidden]`.
    Embedding(Vec<f32>),
    /// It is done.
    Finished(Outcome),
    /// It failed. Nothing follows.
    Failed(EngineError),
    /// It waited too long, or the server ends. Nothing follows.
    Dropped(Dropped),
}

/// Why a request was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// It waited longer than is allowed.
    WaitedTooLong,
    /// The server ends.
    ShuttingDown,
}

/// Text that became certain, with how many tokens made it, and these if their scores were asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// Never half a character, never part of a stop string; may be empty where scores are given.
    pub text: String,
    /// The tokens.
    pub scores: Vec<TokenScore>,
    /// Tokens that were written for it.
    pub tokens: usize,
}

/// A token's logarithmic probability among all tokens, before any sampling option.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenScore {
    /// The token.
    pub token: u32,
    /// Its own.
    pub log_probability: f32,
    /// The likeliest tokens' in its place.
    pub top: Vec<(u32, f32)>,
}

/// How a request ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Why.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were not read anew.
    pub cached_tokens: usize,
    /// Tokens written, an end token included.
    pub generated_tokens: usize,
    /// The sum of their logarithmic probabilities, where scores were asked for.
    pub log_probability: f64,
    /// Time until it was no longer waiting.
    pub waited: Duration,
    /// Time from there until the prompt was read.
    pub prompt_time: Duration,
    /// Time from there to the end.
    pub generation_time: Duration,
}
