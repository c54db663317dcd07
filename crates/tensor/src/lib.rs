//! Tensors, the tape, and operations with forward and backward side by side.
//!
//! Shapes in this crate: `tokens` rows of all sequences of a ragged batch, one below the other; `hidden` the width of
//! the model; `in` and `out` the columns and rows of a weight; `experts` stacked matrices of one weight.
#![forbid(unsafe_code)]

mod backprop;
mod graph;
pub mod ops;
mod param;
mod random;
mod recompute;
mod tensor;

pub use backprop::{Backprop, LeafGradients};
pub use graph::{Graph, Place, Var};
pub use param::{Frozen, Gradients, LentPacks, Param};
pub use random::Rng;
pub use tensor::{Tensor, TensorError};
