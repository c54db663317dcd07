//! Prompt to text: tokenizer, sampling chain, stop rules, generation.
//!
//! Reading order: [`tokenizer`] turns text into ids and ids back into text piece by piece, [`chat`] writes a conversation as
//! one text, [`sampler`] turns a row of
//! logits into the next id, [`stop`] decides which text may be shown, [`session`] is a model in the
//! middle of a sequence, [`trace`] remembers which experts it chose, [`generator`] joins them all; [`mod@bench`] measures.
//! [`scheduler`] does the same for many sequences at once, [`grammar`] holds texts to a form.
#![forbid(unsafe_code)]

pub mod bench;
pub mod chat;
pub mod defaults;
pub mod error;
pub mod generator;
pub mod gguf;
pub mod grammar;
pub mod sampler;
pub mod scheduler;
pub mod session;
pub mod stop;
#[cfg(test)]
mod testing;
pub mod tokenizer;
pub mod trace;

pub use bench::{BenchOptions, BenchResult, Phase, Spread, measure};
pub use chat::{ChatTemplate, Conversation, Message};
pub use defaults::GenerationDefaults;
pub use error::EngineError;
pub use generator::{Event, Finish, GenerationOptions, Generator, Summary, TokenExperts};
pub use grammar::{Constraint, Grammar, GrammarCompiler};
pub use sampler::{Candidate, Sampler, SamplingOptions};
pub use scheduler::{Scheduler, SchedulerOptions};
pub use session::{Reading, Session, Wanted};
pub use stop::{StopRule, Verdict};
pub use tokenizer::{TextStream, TokenType, Tokenizer, TokenizerParts};
pub use trace::{ExpertTrace, LayerChoice};
