//! From files to batches: [`documents`] → [`tokenizer`] → [`shard`] → [`sampler`]; [`corpus`] ties and caches them.

pub mod corpus;
pub mod documents;
pub mod sampler;
pub mod shard;
mod tables;
pub mod text;
pub mod tokenizer;
