//! The memory of a task of the backward, and how it is divided.

use super::{KEY_BLOCK, QUERY_ROWS, TILE_ROWS};

/// How much of everything a task has.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) length: usize,
    /// Rows of words along the sequence.
    pub(super) word_rows: usize,
    pub(super) group: usize,
    /// Of a row of queries and keys, in whole vectors.
    pub(super) width: usize,
    /// Of a row of values, in whole vectors.
    pub(super) value_width: usize,
    /// Of a row of dot products as pairs; 0 where they are no pairs.
    pub(super) key_pairs: usize,
}

/// The task's rows; query rows of one head stand together, heads follow each other. Words are numbers, or pairs in their
/// bits.
pub(super) struct Working<'a> {
    /// `[group, length, width]`
    pub(super) q: &'a mut [f32],
    /// The same as words along the sequence, `[group, word_rows, width]`; empty where numbers are words.
    pub(super) q_words: &'a mut [f32],
    /// `[group, length, value_width]`
    pub(super) dout: &'a mut [f32],
    /// The same as words along the sequence, `[group, word_rows, value_width]`; empty where numbers are words.
    pub(super) dout_words: &'a mut [f32],
    /// `[group, length, width]`
    pub(super) dq: &'a mut [f32],
    /// Words along the sequence, `[word_rows, width]`.
    pub(super) k: &'a mut [f32],
    /// `[length, width]`
    pub(super) dk: &'a mut [f32],
    /// `[length, value_width]`
    pub(super) dv: &'a mut [f32],
    /// `[width, KEY_BLOCK]`
    pub(super) keys_transposed: &'a mut [f32],
    /// `[value_width, KEY_BLOCK]`
    pub(super) values_transposed: &'a mut [f32],
    /// `[TILE_ROWS, KEY_BLOCK]` dot products
    pub(super) scores: &'a mut [f32],
    /// `[TILE_ROWS, KEY_BLOCK]` gradients of probabilities
    pub(super) slopes: &'a mut [f32],
    /// Words along the queries, `[QUERY_ROWS words, KEY_BLOCK]`.
    pub(super) probabilities: &'a mut [f32],
    /// Gradients of dot products as words along the queries, `[QUERY_ROWS words, KEY_BLOCK]`.
    pub(super) dscores: &'a mut [f32],
    /// The same as words along the keys, `[QUERY_ROWS, key_pairs]`; empty where numbers are words.
    pub(super) dscore_pairs: &'a mut [f32],
    /// `Σ dout * out` of each query row.
    pub(super) shift: &'a mut [f32],
}

impl<'a> Working<'a> {
    pub(super) fn parts(sizes: &Sizes) -> [usize; 16] {
        let Sizes { length, word_rows, group, width, value_width, key_pairs } = *sizes;
        let group_words = if key_pairs > 0 { group * word_rows } else { 0 };
        [
            group * length * width,
            group_words * width,
            group * length * value_width,
            group_words * value_width,
            group * length * width,
            word_rows * width,
            length * width,
            length * value_width,
            KEY_BLOCK * width,
            KEY_BLOCK * value_width,
            TILE_ROWS * KEY_BLOCK,
            TILE_ROWS * KEY_BLOCK,
            QUERY_ROWS * KEY_BLOCK,
            QUERY_ROWS * KEY_BLOCK,
            QUERY_ROWS * key_pairs,
            group * length,
        ]
    }

    #[inline(always)]
    pub(super) fn divide(memory: &'a mut [f32], sizes: &Sizes) -> Self {
        let mut rest = memory;
        let parts = Self::parts(sizes).map(|numbers| rest.split_off_mut(..numbers).expect("as many as all parts have"));
        let [q, q_words, dout, dout_words, dq, k, dk, dv, keys_transposed, rest @ ..] = parts;
        let [values_transposed, scores, slopes, probabilities, dscores, dscore_pairs, shift] = rest;
        Self {
            q,
            q_words,
            dout,
            dout_words,
            dq,
            k,
            dk,
            dv,
            keys_transposed,
            values_transposed,
            scores,
            slopes,
            probabilities,
            dscores,
            dscore_pairs,
            shift,
        }
    }
}
