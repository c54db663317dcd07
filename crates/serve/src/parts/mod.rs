//! What several interfaces have in common: sampling fields, prompts, running a request, reading what a model wrote.

pub mod calls;
pub mod conversation;
pub mod generation;
pub mod harmony;
pub mod output;
pub mod prompt;
pub mod sampling;
pub mod tools;
