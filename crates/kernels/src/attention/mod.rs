//! Causal or bidirectional attention with grouped queries over ragged batches (Vaswani et al. 2017; Ainslie et al. 2023, "GQA").
//!
//! Legend: `t` tokens of all sequences, `nh` query heads, `nkv` key/value heads, `hd` features of a head.

mod backward;
mod cache;
mod forward;
mod pack;
mod reference;
#[cfg(test)]
mod tests;
mod tile;

use crate::isa::Isa;
use crate::parallel::DisjointMut;
use forward::{Results, Sequence, Source};

pub use cache::{CacheFormat, LayerCache};
pub use reference::{attention_backward_reference, attention_cached_reference, attention_reference};

/// What does not change between calls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads; a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Key and value heads; query head `h` reads `h / (n_heads / n_kv_heads)`.
    pub n_kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// What the scores are multiplied with, `1 / sqrt(head_dim)` as a rule.
    pub scale: f32,
    /// Sliding window: position `i` sees `j` when `j <= i` and `i - j < window`.
    pub window: Option<usize>,
    /// Whether every position sees its whole sequence, later ones too; then there is no window, and no cache.
    pub bidirectional: bool,
}

impl AttentionShape {
    /// Numbers in a row of queries (and of outputs).
    pub fn query_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Numbers in a row of keys (and of values).
    pub fn key_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Query heads that share a key head.
    pub fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// The positions that `position` sees in a sequence of `length` positions.
    pub fn visible(&self, position: usize, length: usize) -> std::ops::Range<usize> {
        if self.bidirectional {
            return 0..length;
        }
        let end = position + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    fn check(&self) {
        assert!(self.n_kv_heads > 0 && self.head_dim > 0, "empty heads: {self:?}");
        assert!(self.n_heads.is_multiple_of(self.n_kv_heads), "query heads do not share evenly: {self:?}");
        assert!(self.window != Some(0), "a window of no keys: {self:?}");
        assert!(self.window.is_none() || !self.bidirectional, "a window that looks both ways: {self:?}");
    }

    /// Checks the shapes of a ragged batch; returns t.
    fn check_batch(&self, [q, k, v]: [&[f32]; 3], sequence_starts: &[usize]) -> usize {
        self.check();
        let tokens = q.len() / self.query_width();
        assert_eq!(q.len(), tokens * self.query_width());
        assert_eq!(k.len(), tokens * self.key_width());
        assert_eq!(v.len(), tokens * self.key_width());
        let (first, last) = (sequence_starts.first().copied(), sequence_starts.last().copied());
        assert!(tokens == 0 || (first == Some(0) && last == Some(tokens)), "sequences do not cover {tokens} tokens");
        assert!(sequence_starts.is_sorted(), "sequences overlap");
        tokens
    }
}

/// Attention of whole sequences, keeping the logarithm of each softmax's sum for the backward.
///
/// # Shapes
/// `q`, `out` `[t, nh * hd]`, `k`, `v` `[t, nkv * hd]`, `sequence_starts` `[sequences + 1]` from 0 to `t`, `lse` `[nh, t]`.
pub fn attention_forward(
    shape: &AttentionShape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    sequence_starts: &[usize],
    out: &mut [f32],
    lse: &mut [f32],
) {
    attention_forward_on(Isa::current(), shape, [q, k, v], sequence_starts, out, lse);
}

fn attention_forward_on(
    isa: Isa,
    shape: &AttentionShape,
    [q, k, v]: [&[f32]; 3],
    sequence_starts: &[usize],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let tokens = shape.check_batch([q, k, v], sequence_starts);
    assert_eq!(out.len(), q.len());
    assert_eq!(lse.len(), tokens * shape.n_heads);
    let sequences: Vec<Sequence<'_>> = sequence_starts
        .windows(2)
        .map(|bounds| {
            let part = |width: usize| bounds[0] * width..bounds[1] * width;
            Sequence {
                q: &q[part(shape.query_width())],
                source: Source::Rows { keys: &k[part(shape.key_width())], values: &v[part(shape.key_width())] },
                first_position: 0,
                first_row: bounds[0],
            }
        })
        .collect();
    let (out, lse) = (DisjointMut::new(out), DisjointMut::new(lse));
    forward::attend(isa, shape, &sequences, Results { out: &out, lse: Some(&lse), tokens });
}

/// What the backward reads: the forward's inputs and outputs.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// Queries `[t, nh * hd]`.
    pub q: &'a [f32],
    /// Keys `[t, nkv * hd]`.
    pub k: &'a [f32],
    /// Values `[t, nkv * hd]`.
    pub v: &'a [f32],
    /// The forward's `[sequences + 1]`.
    pub sequence_starts: &'a [usize],
    /// The forward's output `[t, nh * hd]`.
    pub out: &'a [f32],
    /// The forward's log-sum-exp `[nh, t]`.
    pub lse: &'a [f32],
}

/// Adds the gradients of [`attention_forward`] to `dq`, `dk`, `dv`.
///
/// # Shapes
/// `dout`, `dq` `[t, nh * hd]`, `dk`, `dv` `[t, nkv * hd]`.
pub fn attention_backward(
    shape: &AttentionShape,
    saved: &Saved<'_>,
    dout: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    attention_backward_on(Isa::current(), shape, saved, dout, [dq, dk, dv]);
}

fn attention_backward_on(
    isa: Isa,
    shape: &AttentionShape,
    saved: &Saved<'_>,
    dout: &[f32],
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    let tokens = shape.check_batch([saved.q, saved.k, saved.v], saved.sequence_starts);
    assert!([saved.out.len(), dout.len(), dq.len()].iter().all(|&len| len == saved.q.len()));
    assert!([dk.len(), dv.len()].iter().all(|&len| len == saved.k.len()));
    assert_eq!(saved.lse.len(), tokens * shape.n_heads);
    backward::differentiate(isa, shape, saved, dout, [dq, dk, dv]);
}

/// Some rows of one sequence, and the cache that already holds those rows' keys and values as its last.
#[derive(Clone, Copy, Debug)]
pub struct CachedSequence<'a> {
    /// How many rows of the queries are this sequence's.
    pub rows: usize,
    /// Keys and values of all positions up to the last row.
    pub cache: &'a LayerCache,
}

/// Attention of some rows of each sequence over its cache; the rows of `q` follow each other as the sequences do.
///
/// With caches in f32, gives the bits that [`attention_forward`] gives for the same rows; a sequence's bits do not depend
/// on the others.
///
/// # Shapes
/// `q`, `out` `[rows of all sequences, nh * hd]`.
pub fn attention_cached(shape: &AttentionShape, q: &[f32], sequences: &[CachedSequence<'_>], out: &mut [f32]) {
    attention_cached_on(Isa::current(), shape, q, sequences, out);
}

fn attention_cached_on(isa: Isa, shape: &AttentionShape, q: &[f32], cached: &[CachedSequence<'_>], out: &mut [f32]) {
    shape.check();
    assert!(!shape.bidirectional, "a cache holds earlier positions only");
    let tokens: usize = cached.iter().map(|sequence| sequence.rows).sum();
    assert_eq!(q.len(), tokens * shape.query_width(), "queries of all sequences");
    assert_eq!(out.len(), q.len());
    let mut first_row = 0;
    let sequences: Vec<Sequence<'_>> = (cached.iter())
        .map(|&CachedSequence { rows, cache }| {
            cache.check(shape);
            assert!(cache.len() >= rows, "the cache is shorter than the rows");
            let first_position = cache.len() - rows;
            let queries = first_row * shape.query_width()..(first_row + rows) * shape.query_width();
            let sequence = Sequence { q: &q[queries], source: Source::Cache(cache), first_position, first_row };
            first_row += rows;
            sequence
        })
        .collect();
    forward::attend(isa, shape, &sequences, Results { out: &DisjointMut::new(out), lse: None, tokens });
}
