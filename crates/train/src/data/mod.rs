//! From text files to batches: [`text`] → [`tokenizer`] → [`shard`] → [`sampler`]; [`corpus`] ties and caches them.

pub mod corpus;
pub mod sampler;
pub mod shard;
pub mod text;
pub mod tokenizer;
