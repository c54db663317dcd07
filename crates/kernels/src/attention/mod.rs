//! Causal or bidirectional attention with grouped queries over ragged batches (Vaswani et al. 2017; Ainslie et al. 2023, "GQA").
//!
//! Legend: `t` tokens of all sequences, `nh` query heads, `nkv` key/value heads, `hd` features of a head, `vd` features
//! of its values.

mod backward;
mod cache;
mod forward;
mod latent;
mod pack;
mod reference;
#[cfg(test)]
mod tests;
mod tile;

use crate::gemm::Precision;
use crate::isa::Isa;
use crate::parallel::DisjointMut;
use forward::{Results, Sequence, Source};

pub use cache::{CacheFormat, LayerCache};
pub use latent::LatentCache;
pub use reference::{attention_backward_reference, attention_cached_reference, attention_reference};

/// What does not change between calls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads; a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Key and value heads; query head `h` reads `h / (n_heads / n_kv_heads)`.
    pub n_kv_heads: usize,
    /// Features of a head's queries and keys.
    pub head_dim: usize,
    /// Features of a head's values, and so of its answer.
    pub value_dim: usize,
    /// What the scores are multiplied with, `1 / sqrt(head_dim)` as a rule.
    pub scale: f32,
    /// Sliding window: position `i` sees `j` when `j <= i` and `i - j < window`.
    pub window: Option<usize>,
    /// Chunks: position `i` sees `j` when `j <= i` and both stand in one chunk of so many positions.
    pub chunk: Option<usize>,
    /// Scores `s` become `cap * tanh(s / cap)`, after they are scaled.
    pub soft_cap: Option<f32>,
    /// Whether every position sees its whole sequence, later ones too; then there is no window, and no cache.
    pub bidirectional: bool,
}

impl AttentionShape {
    /// Causal attention to everything before: query heads, key heads, and the features of each.
    pub const fn grouped([n_heads, n_kv_heads, head_dim]: [usize; 3], scale: f32) -> Self {
        Self {
            n_heads,
            n_kv_heads,
            head_dim,
            value_dim: head_dim,
            scale,
            window: None,
            chunk: None,
            soft_cap: None,
            bidirectional: false,
        }
    }

    /// Numbers in a row of queries.
    pub fn query_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Numbers in a row of outputs.
    pub fn out_width(&self) -> usize {
        self.n_heads * self.value_dim
    }

    /// Numbers in a row of keys.
    pub fn key_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Numbers in a row of values.
    pub fn value_width(&self) -> usize {
        self.n_kv_heads * self.value_dim
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
        let window = self.window.map_or(0, |window| end.saturating_sub(window));
        window.max(self.chunk.map_or(0, |chunk| position / chunk * chunk))..end
    }

    /// The first position that no longer sees `key`, in a sequence of `length` positions.
    fn last_reader(&self, key: usize, length: usize) -> usize {
        let window = self.window.map_or(length, |window| key.saturating_add(window));
        window.min(self.chunk.map_or(length, |chunk| (key / chunk + 1).saturating_mul(chunk))).min(length)
    }

    fn check(&self) {
        assert!(self.n_kv_heads > 0 && self.head_dim > 0 && self.value_dim > 0, "empty heads: {self:?}");
        assert!(self.n_heads.is_multiple_of(self.n_kv_heads), "query heads do not share evenly: {self:?}");
        assert!(self.window != Some(0) && self.chunk != Some(0), "a window of no keys: {self:?}");
        assert!(
            (self.window.is_none() && self.chunk.is_none()) || !self.bidirectional,
            "a window that looks both ways: {self:?}"
        );
    }

    /// Checks the shapes of a ragged batch; returns t.
    fn check_batch(&self, [q, k, v]: [&[f32]; 3], sequence_starts: &[usize]) -> usize {
        self.check();
        let tokens = q.len() / self.query_width();
        assert_eq!(q.len(), tokens * self.query_width());
        assert_eq!(k.len(), tokens * self.key_width());
        assert_eq!(v.len(), tokens * self.value_width());
        let (first, last) = (sequence_starts.first().copied(), sequence_starts.last().copied());
        assert!(tokens == 0 || (first == Some(0) && last == Some(tokens)), "sequences do not cover {tokens} tokens");
        assert!(sequence_starts.is_sorted(), "sequences overlap");
        tokens
    }
}

/// Attention of whole sequences, keeping the logarithm of each softmax's sum for the backward.
///
/// A sink is a score of each query head that takes part in the softmax and brings no value (gpt-oss).
///
/// # Shapes
/// `q` `[t, nh * hd]`, `k` `[t, nkv * hd]`, `v` `[t, nkv * vd]`, `sinks` `[nh]` if any, `sequence_starts`
/// `[sequences + 1]` from 0 to `t`, `out` `[t, nh * vd]`, `lse` `[nh, t]`.
pub fn attention_forward(
    shape: &AttentionShape,
    [q, k, v]: [&[f32]; 3],
    sinks: Option<&[f32]>,
    sequence_starts: &[usize],
    out: &mut [f32],
    lse: &mut [f32],
) {
    attention_forward_on(Isa::current(), shape, [q, k, v], sinks, sequence_starts, [out, lse]);
}

fn attention_forward_on(
    isa: Isa,
    shape: &AttentionShape,
    [q, k, v]: [&[f32]; 3],
    sinks: Option<&[f32]>,
    sequence_starts: &[usize],
    [out, lse]: [&mut [f32]; 2],
) {
    let tokens = shape.check_batch([q, k, v], sequence_starts);
    assert_eq!(out.len(), tokens * shape.out_width());
    assert_eq!(lse.len(), tokens * shape.n_heads);
    let sequences: Vec<Sequence<'_>> = sequence_starts
        .windows(2)
        .map(|bounds| {
            let part = |width: usize| bounds[0] * width..bounds[1] * width;
            Sequence {
                q: &q[part(shape.query_width())],
                source: Source::Rows { keys: &k[part(shape.key_width())], values: &v[part(shape.value_width())] },
                first_position: 0,
                first_row: bounds[0],
            }
        })
        .collect();
    let (out, lse) = (DisjointMut::new(out), DisjointMut::new(lse));
    forward::attend(isa, shape, sinks, &sequences, Results { out: &out, lse: Some(&lse), tokens });
}

/// What the backward reads: the forward's inputs and outputs.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// Queries `[t, nh * hd]`.
    pub q: &'a [f32],
    /// Keys `[t, nkv * hd]`.
    pub k: &'a [f32],
    /// Values `[t, nkv * vd]`.
    pub v: &'a [f32],
    /// The forward's `[sequences + 1]`.
    pub sequence_starts: &'a [usize],
    /// The forward's output `[t, nh * vd]`.
    pub out: &'a [f32],
    /// The forward's log-sum-exp `[nh, t]`.
    pub lse: &'a [f32],
}

/// The gradients of [`attention_forward`]; overwrites `dq`, `dk`, `dv`.
///
/// In bf16 operands are rounded where the processor multiplies bf16 (AVX-512 BF16); elsewhere that would only take
/// longer, and they stay as they are. The scores are computed as in the forward.
///
/// # Shapes
/// `dout` `[t, nh * vd]`, `dq`, `dk`, `dv` as `q`, `k`, `v`.
pub fn attention_backward(
    shape: &AttentionShape,
    saved: &Saved<'_>,
    precision: Precision,
    dout: &[f32],
    gradients: [&mut [f32]; 3],
) {
    let isa = Isa::current();
    let precision = if isa >= Isa::Avx512 { precision } else { Precision::F32 };
    attention_backward_on(isa, shape, saved, precision, dout, gradients);
}

fn attention_backward_on(
    isa: Isa,
    shape: &AttentionShape,
    saved: &Saved<'_>,
    precision: Precision,
    dout: &[f32],
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    let tokens = shape.check_batch([saved.q, saved.k, saved.v], saved.sequence_starts);
    assert_eq!(dq.len(), saved.q.len());
    assert!([saved.out.len(), dout.len()].iter().all(|&len| len == tokens * shape.out_width()));
    assert_eq!((dk.len(), dv.len()), (saved.k.len(), saved.v.len()));
    assert_eq!(saved.lse.len(), tokens * shape.n_heads);
    backward::differentiate(isa, shape, saved, precision, dout, [dq, dk, dv]);
}

/// What a sequence has read before, and these rows with it.
#[derive(Clone, Copy, Debug)]
pub enum Cached<'a> {
    /// Keys and values.
    KeysValues(&'a LayerCache),
    /// Latents, which are keys and, their first features, values.
    Latents(&'a LatentCache),
}

impl<'a> Cached<'a> {
    fn len(self) -> usize {
        match self {
            Self::KeysValues(cache) => cache.len(),
            Self::Latents(cache) => cache.len(),
        }
    }

    fn check(self, shape: &AttentionShape) -> Source<'a> {
        match self {
            Self::KeysValues(cache) => {
                assert_eq!(shape.value_dim, shape.head_dim, "values of the cache");
                cache.check(shape);
                Source::Cache(cache)
            }
            Self::Latents(cache) => {
                cache.check(shape);
                Source::Latents(cache)
            }
        }
    }
}

/// Some rows of one sequence, and the cache that already holds those rows' keys and values as its last.
#[derive(Clone, Copy, Debug)]
pub struct CachedSequence<'a> {
    /// How many rows of the queries are this sequence's.
    pub rows: usize,
    /// Keys and values of all positions up to the last row.
    pub cache: Cached<'a>,
}

/// Attention of some rows of each sequence over its cache; the rows of `q` follow each other as the sequences do.
///
/// With caches in f32, gives the bits that [`attention_forward`] gives for the same rows; a sequence's bits do not depend
/// on the others.
///
/// # Shapes
/// `q` `[rows of all sequences, nh * hd]`, `sinks` `[nh]` if any, `out` `[rows of all sequences, nh * vd]`.
pub fn attention_cached(
    shape: &AttentionShape,
    q: &[f32],
    sinks: Option<&[f32]>,
    sequences: &[CachedSequence<'_>],
    out: &mut [f32],
) {
    attention_cached_on(Isa::current(), shape, q, sinks, sequences, out);
}

fn attention_cached_on(
    isa: Isa,
    shape: &AttentionShape,
    q: &[f32],
    sinks: Option<&[f32]>,
    cached: &[CachedSequence<'_>],
    out: &mut [f32],
) {
    shape.check();
    assert!(!shape.bidirectional, "a cache holds earlier positions only");
    let tokens: usize = cached.iter().map(|sequence| sequence.rows).sum();
    assert_eq!(q.len(), tokens * shape.query_width(), "queries of all sequences");
    assert_eq!(out.len(), tokens * shape.out_width());
    let mut first_row = 0;
    let sequences: Vec<Sequence<'_>> = (cached.iter())
        .map(|&CachedSequence { rows, cache }| {
            let source = cache.check(shape);
            assert!(cache.len() >= rows, "the cache is shorter than the rows");
            let first_position = cache.len() - rows;
            let queries = first_row * shape.query_width()..(first_row + rows) * shape.query_width();
            let sequence = Sequence { q: &q[queries], source, first_position, first_row };
            first_row += rows;
            sequence
        })
        .collect();
    forward::attend(isa, shape, sinks, &sequences, Results { out: &DisjointMut::new(out), lse: None, tokens });
}
