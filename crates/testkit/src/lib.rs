//! What several crates' tests share: gradients against finite differences, bits against bits. Unpublished.
//!
//! Everything here works on slices, so that the lowest crates can use it for themselves.
#![forbid(unsafe_code)]

mod bits;
mod differences;

pub use bits::{same_bits, same_bits_on_any_threads, threads};
pub use differences::{check_gradient, compare_gradient};
