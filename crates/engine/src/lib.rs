//! Prompt to text: tokenizer, sampling chain, stop rules, generation.
//!
//! Reading order: [`tokenizer`] turns text into ids and ids back into text piece by piece, [`sampler`] turns a row of
//! logits into the next id, [`stop`] decides which text may be shown, [`generator`] joins them around a model.
#![forbid(unsafe_code)]

pub mod error;
pub mod sampler;
pub mod stop;
pub mod tokenizer;

pub use error::EngineError;
pub use sampler::{Candidate, Sampler, SamplingOptions};
pub use stop::{StopRule, Verdict};
pub use tokenizer::{TextStream, Tokenizer};
