//! Mixers that carry a state from token to token: causal convolution, selective scan, gated delta rule.
//!
//! Each is computed token by token, from the state that the tokens before left. So a sequence gives the same bits read
//! at once, in pieces or one by one, and what a piece leaves behind is all that the next one needs.
//!
//! Legend: `t` tokens of all sequences of a ragged batch, `sequence_starts` `[sequences + 1]` their first rows and the end.

pub mod convolution;
pub mod delta_rule;
pub mod selective_scan;

use crate::parallel::DisjointMut;
use std::ops::Range;

/// Checks that the sequences cover `tokens` rows.
fn check_starts(sequence_starts: &[usize], tokens: usize) {
    let (first, last) = (sequence_starts.first().copied(), sequence_starts.last().copied());
    assert!(tokens == 0 || (first == Some(0) && last == Some(tokens)), "sequences do not cover {tokens} tokens");
    assert!(sequence_starts.is_sorted(), "sequences overlap");
}

/// The sequence that has a row. There may be empty ones.
fn sequence_of(sequence_starts: &[usize], row: usize) -> usize {
    sequence_starts.partition_point(|&start| start <= row) - 1
}

/// The states of all sequences, to be changed in parts that do not overlap.
type States<'s> = Vec<DisjointMut<'s, f32>>;

fn shared<'s>(states: &'s mut [&mut [f32]]) -> States<'s> {
    states.iter_mut().map(|state| DisjointMut::new(state)).collect()
}

/// The parts of `width` columns of a matrix with `columns`.
fn column_blocks(columns: usize, width: usize) -> impl Fn(usize) -> Range<usize> {
    move |block| block * width..columns.min((block + 1) * width)
}
