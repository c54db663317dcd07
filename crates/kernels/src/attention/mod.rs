//! Causal attention with grouped queries over ragged batches (Vaswani et al. 2017; Ainslie et al. 2023, "GQA").
//!
//! Legend: `t` tokens of all sequences, `nh` query heads, `nkv` key/value heads, `hd` features of a head.

mod reference;

pub use reference::{attention_backward_reference, attention_reference};

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

    /// The positions that `position` sees.
    pub fn visible(&self, position: usize) -> std::ops::Range<usize> {
        let end = position + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    fn check(&self) {
        assert!(self.n_kv_heads > 0 && self.head_dim > 0, "empty heads: {self:?}");
        assert!(self.n_heads.is_multiple_of(self.n_kv_heads), "query heads do not share evenly: {self:?}");
        assert!(self.window != Some(0), "a window of no keys: {self:?}");
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
    shape.check();
    attention_reference(shape, q, k, v, sequence_starts, out, lse);
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
    shape.check();
    attention_backward_reference(shape, saved, dout, dq, dk, dv);
}

/// Attention of some rows of *one* sequence over its cache; the cache already holds those rows' keys and values.
///
/// Gives the bits that [`attention_forward`] gives for the same rows. Cache rows from `first_position + rows` on are
/// never read.
///
/// # Shapes
/// `q`, `out` `[rows, nh * hd]`, `keys`, `values` `[positions >= first_position + rows, nkv * hd]`.
pub fn attention_cached(
    shape: &AttentionShape,
    q: &[f32],
    first_position: usize,
    keys: &[f32],
    values: &[f32],
    out: &mut [f32],
) {
    shape.check();
    let rows = q.len() / shape.query_width();
    let mut lse = vec![0.0; rows * shape.n_heads];
    reference::attention_rows(shape, q, first_position, keys, values, out, &mut lse);
}
