//! The forward of tiled attention (Dao et al. 2022, "FlashAttention"): scores of a few rows against a block of keys,
//! an online softmax, and the values mixed in, while everything stays in the first caches.
//!
//! A row's arithmetic depends on its own query, its position and the visible keys alone: key blocks stand at fixed
//! positions, scores and mixtures are chains in a fixed order, and an invisible key takes no part in any sum. So the
//! bits are the same in a whole sequence, in any chunking of it, and row by row.

use super::AttentionShape;
use super::cache::{BlockOf, LayerCache};
use super::latent::LatentCache;
use super::pack::{AHEAD, HeadRows, KEY_BLOCK, copy_rows, padded, transpose_rows};
use super::tile::{Element, Left, Mixture, Product, Right, TILE_ROWS};
use crate::isa::Isa;
use crate::memory::Buffer;
use crate::parallel::DisjointMut;
use crate::simd::math::{exp_nonpositive, ln, tanh};
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch, prefetch};
use crate::tasks::for_each_block;
use std::ops::Range;

/// Query rows (of all heads of a group) that share one packing of a key block: whole register tiles.
const QUERY_ROWS: usize = 12 * TILE_ROWS;

/// From so many heads of all sequences on, several times as many rows share a packing: there is work for all threads.
const MANY_HEADS: usize = 64;

/// The queries of one sequence from `first_position` on, and the keys and values from position 0 on.
#[derive(Clone, Copy)]
pub(super) struct Sequence<'a> {
    pub(super) q: &'a [f32],
    pub(super) source: Source<'a>,
    pub(super) first_position: usize,
    /// The sequence's first row among the rows of `out` and `lse`.
    pub(super) first_row: usize,
}

/// Where keys and values come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// `[positions, nkv * hd]`, `[positions, nkv * vd]`.
    Rows {
        keys: &'a [f32],
        values: &'a [f32],
    },
    Cache(&'a LayerCache),
    Latents(&'a LatentCache),
}

/// Where the results go.
#[derive(Clone, Copy)]
pub(super) struct Results<'a> {
    /// `[t, nh * vd]`
    pub(super) out: &'a DisjointMut<'a, f32>,
    /// `[nh, t]`, if wanted.
    pub(super) lse: Option<&'a DisjointMut<'a, f32>>,
    /// t
    pub(super) tokens: usize,
}

/// Some rows of one sequence for the query heads of one key head.
struct Task {
    sequence: usize,
    kv_head: usize,
    rows: Range<usize>,
}

/// Runs all heads and rows of all sequences.
pub(super) fn attend(
    isa: Isa,
    shape: &AttentionShape,
    sinks: Option<&[f32]>,
    sequences: &[Sequence<'_>],
    results: Results<'_>,
) {
    assert!(sinks.is_none_or(|sinks| sinks.len() == shape.n_heads), "a sink for each query head");
    let stacked = if sequences.len() * shape.n_kv_heads < MANY_HEADS { QUERY_ROWS } else { 4 * QUERY_ROWS };
    let step = (stacked / shape.group()).max(1);
    let mut tasks = Vec::new();
    let mut work = 0;
    for (index, sequence) in sequences.iter().enumerate() {
        let rows = sequence.q.len() / shape.query_width();
        work += rows * (sequence.first_position + rows) * shape.query_width();
        for kv_head in 0..shape.n_kv_heads {
            // The last rows see most keys: the longest tasks first.
            let starts = (0..rows).step_by(step).rev();
            tasks.extend(starts.map(|start| Task { sequence: index, kv_head, rows: start..(start + step).min(rows) }));
        }
    }
    let widths = padded(shape.head_dim) + padded(shape.value_dim);
    for_each_block(tasks.len(), work / 4 / tasks.len().max(1), |some| {
        let tasks = &tasks[some];
        let rows = tasks.iter().map(|task| task.rows.len()).max().unwrap_or(0) * shape.group();
        let mut scratch = Buffer::scratch((rows + KEY_BLOCK) * widths + 2 * rows);
        for task in tasks {
            let (sequence, scratch) = (&sequences[task.sequence], &mut scratch[..]);
            dispatch(isa, ForwardTask { shape, sinks, sequence, task, results, scratch });
        }
    });
}

struct ForwardTask<'a> {
    shape: &'a AttentionShape,
    sinks: Option<&'a [f32]>,
    sequence: &'a Sequence<'a>,
    task: &'a Task,
    results: Results<'a>,
    /// For [`Block`], and a block of keys and of values.
    scratch: &'a mut [f32],
}

/// A task's working memory. `rows` are stacked: the heads of the group at one position, then the next position.
struct Block<'a> {
    /// `[rows, head_dim]` padded
    q: &'a [f32],
    /// Unnormalised outputs, `[rows, value_dim]` padded
    mixed: &'a mut [f32],
    /// Largest score so far, `[rows]`
    largest: &'a mut [f32],
    /// Sum of exponentials so far, `[rows]`
    sums: &'a mut [f32],
    /// Positions of the sequence up to the last that the rows see.
    length: usize,
}

/// A block of keys and values at positions `start..start + KEY_BLOCK`.
pub(super) struct Keys<'a, E> {
    pub(super) start: usize,
    /// `[head_dim, KEY_BLOCK]`
    pub(super) transposed: &'a [E],
    /// `[KEY_BLOCK, value_dim]` padded
    pub(super) values: &'a [E],
}

impl Kernel for ForwardTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let scratch = std::mem::take(&mut self.scratch);
        let Self { shape, sequence, task, .. } = self;
        let (group, width, value_width) = (shape.group(), padded(shape.head_dim), padded(shape.value_dim));
        let rows = task.rows.len() * group;
        let head =
            |data, heads, head, head_dim| HeadRows { data, width: heads * head_dim, offset: head * head_dim, head_dim };

        let (q, rest) = scratch.split_at_mut(rows * width);
        let (mixed, rest) = rest.split_at_mut(rows * value_width);
        let (key_block, rest) = rest.split_at_mut(KEY_BLOCK * width);
        let (value_block, rest) = rest.split_at_mut(KEY_BLOCK * value_width);
        let (largest, rest) = rest.split_at_mut(rows);
        let sums = &mut rest[..rows];
        for (i, q) in q.chunks_exact_mut(width).enumerate() {
            let from = head(sequence.q, shape.n_heads, task.kv_head * group + i % group, shape.head_dim);
            let row = task.rows.start + i / group;
            copy_rows(simd, from, row..row + 1, q);
        }
        mixed.fill(0.0);
        largest.fill(f32::NEG_INFINITY);
        sums.fill(0.0);
        if let Some(sinks) = self.sinks {
            // The sink is the first score of its head, and brings no value.
            sums.fill(1.0);
            let sinks = &sinks[task.kv_head * group..(task.kv_head + 1) * group];
            largest.chunks_exact_mut(group).for_each(|largest| largest.copy_from_slice(sinks));
        }

        let first = sequence.first_position + task.rows.start;
        let length = sequence.first_position + sequence.q.len() / shape.query_width();
        let end = if shape.bidirectional { length } else { sequence.first_position + task.rows.end };
        let mut block = Block { q, mixed, largest, sums, length: end };
        let mut start = shape.visible(first, end).start / KEY_BLOCK * KEY_BLOCK;
        while start < end {
            match sequence.source {
                Source::Cache(cache) => match cache.block(start / KEY_BLOCK, task.kv_head) {
                    BlockOf::F32(keys) => attend_block(simd, shape, first, &mut block, &keys, None),
                    BlockOf::Bf16(keys) => attend_block(simd, shape, first, &mut block, &keys, None),
                    BlockOf::Q8(keys, scales) => attend_block(simd, shape, first, &mut block, &keys, Some(scales)),
                },
                Source::Rows { keys, values } => {
                    let present = start..end.min(start + KEY_BLOCK);
                    let keys = head(keys, shape.n_kv_heads, task.kv_head, shape.head_dim);
                    transpose_rows(keys, present.clone(), key_block);
                    copy_rows(
                        simd,
                        head(values, shape.n_kv_heads, task.kv_head, shape.value_dim),
                        present,
                        value_block,
                    );
                    let keys = Keys { start, transposed: &*key_block, values: &*value_block };
                    attend_block(simd, shape, first, &mut block, &keys, None);
                }
                Source::Latents(cache) => {
                    cache.unfold(simd, (start / KEY_BLOCK, end), shape.value_dim, key_block, value_block);
                    let keys = Keys { start, transposed: &*key_block, values: &*value_block };
                    attend_block(simd, shape, first, &mut block, &keys, None);
                }
            }
            start += KEY_BLOCK;
        }
        self.finish(simd, &block);
    }
}

/// A scale for each key of a block, and one for each value.
pub(super) type Scales<'a> = [&'a [f32; KEY_BLOCK]; 2];

/// Takes one block of keys into all stacked rows.
#[inline(always)]
fn attend_block<S: Simd, E: Element>(
    simd: S,
    shape: &AttentionShape,
    first_position: usize,
    block: &mut Block<'_>,
    keys: &Keys<'_, E>,
    scales: Option<Scales<'_>>,
) {
    let rows = block.sums.len();
    for row in (0..rows).step_by(TILE_ROWS) {
        attend_tile(simd, shape, row..(row + TILE_ROWS).min(rows), first_position, block, keys, scales);
    }
}

/// Takes one block of keys into up to [`TILE_ROWS`] stacked rows.
#[inline(always)]
fn attend_tile<S: Simd, E: Element>(
    simd: S,
    shape: &AttentionShape,
    rows: Range<usize>,
    first_position: usize,
    block: &mut Block<'_>,
    keys: &Keys<'_, E>,
    scales: Option<Scales<'_>>,
) {
    let (width, value_width) = (padded(shape.head_dim), padded(shape.value_dim));
    let mut visible: [Range<usize>; TILE_ROWS] = Default::default();
    // One division a tile: the rows follow each other.
    let (mut position, mut head) = (first_position + rows.start / shape.group(), rows.start % shape.group());
    for visible in &mut visible[..rows.len()] {
        let seen = shape.visible(position, block.length);
        let inside = |position: usize| position.saturating_sub(keys.start).min(KEY_BLOCK);
        *visible = inside(seen.start)..inside(seen.end);
        head += 1;
        if head == shape.group() {
            (position, head) = (position + 1, 0);
        }
    }
    let visible = &visible[..rows.len()];
    let reach = visible.iter().filter(|v| !v.is_empty()).map(|v| v.end).max().unwrap_or(0);
    if reach == 0 {
        return;
    }

    let mut scores = [0.0; TILE_ROWS * KEY_BLOCK];
    let q = Left { data: &block.q[rows.start * width..], row_stride: width, k_stride: 1 };
    let transposed = Right { data: keys.transposed, stride: KEY_BLOCK, vectors: reach.div_ceil(LANES) };
    simd.call(Product {
        rows: rows.len(),
        depth: shape.head_dim,
        a: q,
        b: transposed,
        c: &mut scores,
        c_stride: KEY_BLOCK,
        accumulate: false,
    });

    let (scores, _) = scores.as_chunks_mut::<KEY_BLOCK>();
    if let Some([of_keys, _]) = scales {
        scale_keys(simd, &mut scores[..rows.len()], of_keys);
    }
    let mut rescale = [0.0; LANES];
    let largest = &mut block.largest[rows.clone()];
    let added = match visible.iter().all(|seen| *seen == (0..KEY_BLOCK)) {
        true => exponentiate::<S, true>(simd, scores, visible, shape, largest, &mut rescale),
        false => exponentiate::<S, false>(simd, scores, visible, shape, largest, &mut rescale),
    };
    // Rows that see nothing here keep the difference 0, and so the factor 1.
    exp_nonpositive(Lanes::load(simd, &rescale)).store(&mut rescale);
    for (i, row) in rows.clone().enumerate() {
        block.sums[row] = block.sums[row].mul_add(rescale[i], added[i]);
        let factor = Lanes::splat(simd, rescale[i]);
        for lanes in block.mixed[row * value_width..][..value_width].as_chunks_mut::<LANES>().0 {
            (Lanes::load(simd, lanes) * factor).store(lanes);
        }
    }
    if let Some([_, of_values]) = scales {
        scale_keys(simd, &mut scores[..rows.len()], of_values);
    }
    let mixed = &mut block.mixed[rows.start * value_width..];
    mix_values(simd, visible, scores.as_flattened(), keys.values, value_width, mixed);
}

/// Multiplies each row's numbers by those of their keys.
#[inline(always)]
fn scale_keys<S: Simd>(simd: S, rows: &mut [[f32; KEY_BLOCK]], scales: &[f32; KEY_BLOCK]) {
    for row in rows {
        for (lanes, scales) in row.as_chunks_mut::<LANES>().0.iter_mut().zip(scales.as_chunks::<LANES>().0) {
            (Lanes::load(simd, lanes) * Lanes::load(simd, scales)).store(lanes);
        }
    }
}

/// The place of each key in its block, to compare with.
pub(super) const KEY_INDEX: [f32; KEY_BLOCK] = {
    let mut index = [0.0; KEY_BLOCK];
    let mut i = 0;
    while i < KEY_BLOCK {
        index[i] = i as f32;
        i += 1;
    }
    index
};

/// Replaces scores (dot products) by `exp(score * scale - largest)`, zero for invisible keys; raises each row's
/// `largest`, leaves how far in `raise` (as what to add, so at most zero), and returns the sums.
///
/// It goes over all rows in each of four steps, because a row alone would wait for every step's result. `ALL` says that
/// every row sees the whole block.
#[inline(always)]
fn exponentiate<S: Simd, const ALL: bool>(
    simd: S,
    scores: &mut [[f32; KEY_BLOCK]],
    visible: &[Range<usize>],
    shape: &AttentionShape,
    largest: &mut [f32],
    raise: &mut [f32; LANES],
) -> [f32; TILE_ROWS] {
    let splat = |value| Lanes::splat(simd, value);
    let (nothing, scale) = (splat(f32::NEG_INFINITY), splat(shape.scale));
    let mut partial = [[0.0; LANES]; TILE_ROWS];
    for ((scores, visible), partial) in scores.iter_mut().zip(visible).zip(&mut partial) {
        let mut top = nothing;
        for (v, scores) in scores.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            if ALL || v * LANES < visible.end {
                let mut scaled = Lanes::load(simd, scores) * scale;
                if let Some(cap) = shape.soft_cap {
                    scaled = capped(scaled, splat(cap));
                }
                if !ALL && *visible != (0..KEY_BLOCK) {
                    let index = Lanes::load(simd, &KEY_INDEX.as_chunks::<LANES>().0[v]);
                    scaled = index.select_less(splat(visible.end as f32), scaled, nothing);
                    scaled = index.select_less(splat(visible.start as f32), nothing, scaled);
                }
                scaled.store(scores);
                top = top.max(scaled);
            }
        }
        top.store(partial);
    }
    for (((largest, visible), partial), raise) in largest.iter_mut().zip(visible).zip(&partial).zip(raise) {
        if ALL || !visible.is_empty() {
            let found = Lanes::load(simd, partial).largest();
            let before = *largest;
            *largest = if found > before { found } else { before };
            *raise = before - *largest;
        }
    }
    for (((scores, visible), partial), largest) in scores.iter_mut().zip(visible).zip(&mut partial).zip(&*largest) {
        let largest = splat(*largest);
        let mut sums = [splat(0.0); KEY_BLOCK / LANES];
        for ((v, scores), sum) in scores.as_chunks_mut::<LANES>().0.iter_mut().enumerate().zip(&mut sums) {
            if ALL || v * LANES < visible.end {
                *sum = exp_nonpositive(Lanes::load(simd, scores) - largest);
                sum.store(scores);
            }
        }
        ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(partial);
    }
    let mut added = [0.0; TILE_ROWS];
    for ((added, visible), partial) in added.iter_mut().zip(visible).zip(&partial) {
        if ALL || !visible.is_empty() {
            *added = Lanes::load(simd, partial).sum();
        }
    }
    added
}

/// `cap * tanh(x / cap)`.
#[inline(always)]
pub(super) fn capped<S: Simd>(x: Lanes<S>, cap: Lanes<S>) -> Lanes<S> {
    cap * tanh(x / cap)
}

/// `mixed[row] += Σ weights[row][key] * values[key]` over the keys that the row sees, in ascending order.
#[inline(always)]
fn mix_values<S: Simd, E: Element>(
    simd: S,
    visible: &[Range<usize>],
    weights: &[f32],
    values: &[E],
    width: usize,
    mixed: &mut [f32],
) {
    if let (true, Ok(seen)) = (S::WIDE_TILE, visible.try_into()) {
        let weights = Left { data: weights, row_stride: KEY_BLOCK, k_stride: 1 };
        let values = Right { data: values, stride: width, vectors: width / LANES };
        return simd.call(Mixture { seen, weights, values, mixed });
    }
    let mut mix = |row: usize, rows: usize, keys: Range<usize>| {
        if keys.is_empty() {
            return;
        }
        let weights = Left { data: &weights[row * KEY_BLOCK + keys.start..], row_stride: KEY_BLOCK, k_stride: 1 };
        let values = Right { data: &values[keys.start * width..], stride: width, vectors: width / LANES };
        simd.call(Product {
            rows,
            depth: keys.len(),
            a: weights,
            b: values,
            c: &mut mixed[row * width..],
            c_stride: width,
            accumulate: true,
        });
    };
    // What rows see in common goes through a tile (of all rows if they see alike, else of four); the ragged ends, row
    // by row. Whole tiles have taken the short way.
    let alike = visible.iter().all(|v| *v == visible[0]);
    let height = if alike { TILE_ROWS } else { 4 };
    for (i, visible) in visible.chunks(height).enumerate() {
        let first = i * height;
        let start = visible.iter().map(|v| v.start).max().unwrap_or(0);
        let end = visible.iter().map(|v| v.end).min().unwrap_or(0);
        let common = start..end.max(start);
        for (row, visible) in visible.iter().enumerate() {
            mix(first + row, 1, visible.start..visible.end.min(common.start));
        }
        mix(first, visible.len(), common.clone());
        for (row, visible) in visible.iter().enumerate() {
            mix(first + row, 1, visible.start.max(common.end)..visible.end);
        }
    }
}

impl ForwardTask<'_> {
    /// Divides by the sums and writes the results.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, block: &Block<'_>) {
        let shape = self.shape;
        let (group, value_dim) = (shape.group(), shape.value_dim);
        for (i, mixed) in block.mixed.chunks_exact(padded(value_dim)).enumerate() {
            let row = self.sequence.first_row + self.task.rows.start + i / group;
            let head = self.task.kv_head * group + i % group;
            let at = row * shape.out_width() + head * value_dim;
            prefetch::<true, _>(self.results.out.at(at).wrapping_add(AHEAD / group * shape.out_width()), value_dim);
            // SAFETY: this task alone writes these rows of these heads.
            let out = unsafe { self.results.out.range(at..at + value_dim) };
            let sum = Lanes::splat(simd, block.sums[i]);
            for (mixed, out) in mixed.as_chunks::<LANES>().0.iter().zip(out.chunks_mut(LANES)) {
                (Lanes::load(simd, mixed) / sum).store_any(out);
            }
        }
        let Some(lse) = &self.results.lse else { return };
        for (first, (largest, sums)) in block.largest.chunks(LANES).zip(block.sums.chunks(LANES)).enumerate() {
            let mut of_rows = [0.0; LANES];
            (Lanes::load_any(simd, largest, 0.0) + ln(Lanes::load_any(simd, sums, 1.0))).store(&mut of_rows);
            for (i, of_row) in (first * LANES..).zip(&of_rows[..sums.len()]) {
                let row = self.sequence.first_row + self.task.rows.start + i / group;
                let at = (self.task.kv_head * group + i % group) * self.results.tokens + row;
                // SAFETY: this task alone writes these rows of these heads.
                let lse = unsafe { lse.range(at..at + 1) };
                lse[0] = *of_row;
            }
        }
    }
}
