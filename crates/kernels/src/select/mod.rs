//! Choosing, moving and summing rows: top-k, gathers, weighted scatters, embedding, and small vector arithmetic.
//!
//! Legend: `tokens` tokens, `assignments` (token, expert) pairs, `width` features of a row.

mod arithmetic;
mod rows;
mod top_k;

pub use arithmetic::{add_assign, scale, scaled_add, sum_squares};
pub use rows::{
    embedding_backward, embedding_backward_reference, gather_rows, gather_rows_weighted, gathered_dots, scatter_add,
    scatter_weighted, scatter_weighted_reference,
};
pub use top_k::{argmax, top_k, top_k_rows};
