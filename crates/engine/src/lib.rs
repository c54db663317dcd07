//! Prompt to text: generation, sampling, stop rules.
#![forbid(unsafe_code)]
