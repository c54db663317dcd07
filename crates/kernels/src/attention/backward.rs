//! The backward of tiled attention (Dao et al. 2022, "FlashAttention"): the probabilities are computed again from the
//! scores and the kept log-sum-exp, a block of keys against some queries at a time.
//!
//! One task has one key head of one sequence: all query heads of the group add to its key and value gradients in
//! ascending order, so the result does not depend on threads.

use super::forward::{KEY_INDEX, capped};
use super::pack::{HeadRows, KEY_BLOCK, copy_rows, padded, transpose_rows};
use super::tile::{Left, Product, Right, TILE_ROWS};
use super::{AttentionShape, Saved};
use crate::isa::Isa;
use crate::memory::Buffer;
use crate::parallel::DisjointMut;
use crate::simd::math::exp_nonpositive;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::for_each_task;
use std::ops::Range;

/// Queries taken against a block of keys at once.
const QUERY_ROWS: usize = 8 * TILE_ROWS;

/// Where the gradients are added.
#[derive(Clone, Copy)]
struct Gradients<'a> {
    dq: &'a DisjointMut<'a, f32>,
    dk: &'a DisjointMut<'a, f32>,
    dv: &'a DisjointMut<'a, f32>,
}

/// [`super::attention_backward`] on a given instruction set.
pub(super) fn differentiate(
    isa: Isa,
    shape: &AttentionShape,
    saved: &Saved<'_>,
    dout: &[f32],
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    let [dq, dk, dv] = [dq, dk, dv].map(DisjointMut::new);
    let gradients = Gradients { dq: &dq, dk: &dk, dv: &dv };
    let sequences = saved.sequence_starts.len().saturating_sub(1);
    let lengths = saved.sequence_starts.windows(2).map(|bounds| bounds[1] - bounds[0]);
    let work: usize = lengths.map(|length| length * length * shape.query_width()).sum();
    for_each_task(sequences * shape.n_kv_heads, work / 2, |task| {
        let bounds = &saved.sequence_starts[task / shape.n_kv_heads..][..2];
        if bounds[0] < bounds[1] {
            let kv_head = task % shape.n_kv_heads;
            dispatch(isa, BackwardTask { shape, saved, dout, gradients, kv_head, rows: bounds[0]..bounds[1] });
        }
    });
}

/// One key head of one sequence.
struct BackwardTask<'a> {
    shape: &'a AttentionShape,
    saved: &'a Saved<'a>,
    dout: &'a [f32],
    gradients: Gradients<'a>,
    kv_head: usize,
    rows: Range<usize>,
}

/// The task's rows, each padded to whole vectors; query rows of one head stand together, heads follow each other.
struct Working<'a> {
    q: &'a mut [f32],
    dout: &'a mut [f32],
    dq: &'a mut [f32],
    /// `Σ dout * out` of each query row.
    shift: &'a mut [f32],
    k: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    keys_transposed: &'a mut [f32],
    values_transposed: &'a mut [f32],
    /// `[QUERY_ROWS, KEY_BLOCK]` scores, then probabilities
    probabilities: &'a mut [f32],
    /// `[QUERY_ROWS, KEY_BLOCK]` gradients of probabilities, then of dot products
    dscores: &'a mut [f32],
}

impl<'a> Working<'a> {
    fn numbers(length: usize, group: usize, [width, value_width]: [usize; 2]) -> usize {
        let rows = 2 * (group + 1) * length * width + (group + 1) * length * value_width;
        rows + group * length + KEY_BLOCK * (width + value_width + 2 * QUERY_ROWS)
    }

    #[inline(always)]
    fn divide(memory: &'a mut [f32], length: usize, group: usize, [width, value_width]: [usize; 2]) -> Self {
        let mut rest = memory;
        let mut take = |numbers: usize| rest.split_off_mut(..numbers).expect("as many as `numbers` says");
        let (queries, keys) = (group * length * width, length * width);
        let (answers, values) = (group * length * value_width, length * value_width);
        Self {
            q: take(queries),
            dout: take(answers),
            dq: take(queries),
            k: take(keys),
            dk: take(keys),
            dv: take(values),
            keys_transposed: take(KEY_BLOCK * width),
            values_transposed: take(KEY_BLOCK * value_width),
            probabilities: take(QUERY_ROWS * KEY_BLOCK),
            dscores: take(QUERY_ROWS * KEY_BLOCK),
            shift: take(group * length),
        }
    }
}

impl Kernel for BackwardTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let shape = self.shape;
        let (length, group) = (self.rows.len(), shape.group());
        let width = [padded(shape.head_dim), padded(shape.value_dim)];
        let mut scratch = Buffer::<f32>::scratch(Working::numbers(length, group, width));
        let mut working = Working::divide(&mut scratch, length, group, width);
        self.gather(simd, &mut working);
        for start in (0..length).step_by(KEY_BLOCK) {
            let keys = start..length.min(start + KEY_BLOCK);
            transpose_rows(self.keys(self.saved.k), self.shifted(&keys), working.keys_transposed);
            transpose_rows(self.values(self.saved.v), self.shifted(&keys), working.values_transposed);
            // The last query that sees the block's last key.
            let end = if shape.bidirectional { length } else { shape.last_reader(keys.end - 1, length) };
            let start = if shape.bidirectional { 0 } else { start };
            for head in 0..group {
                for first in (start..end).step_by(QUERY_ROWS) {
                    self.block(simd, &mut working, head, first..end.min(first + QUERY_ROWS), keys.clone());
                }
            }
        }
        self.scatter(simd, &working);
    }
}

impl<'a> BackwardTask<'a> {
    fn keys(&self, data: &'a [f32]) -> HeadRows<'a> {
        let head_dim = self.shape.head_dim;
        HeadRows { data, width: self.shape.key_width(), offset: self.kv_head * head_dim, head_dim }
    }

    fn values(&self, data: &'a [f32]) -> HeadRows<'a> {
        let head_dim = self.shape.value_dim;
        HeadRows { data, width: self.shape.value_width(), offset: self.kv_head * head_dim, head_dim }
    }

    fn answers(&self, data: &'a [f32], head: usize) -> HeadRows<'a> {
        let head_dim = self.shape.value_dim;
        let head = self.kv_head * self.shape.group() + head;
        HeadRows { data, width: self.shape.out_width(), offset: head * head_dim, head_dim }
    }

    fn queries(&self, data: &'a [f32], head: usize) -> HeadRows<'a> {
        let head_dim = self.shape.head_dim;
        let head = self.kv_head * self.shape.group() + head;
        HeadRows { data, width: self.shape.query_width(), offset: head * head_dim, head_dim }
    }

    /// Rows of the sequence as rows of the batch.
    fn shifted(&self, rows: &Range<usize>) -> Range<usize> {
        self.rows.start + rows.start..self.rows.start + rows.end
    }

    /// Copies the task's rows and clears the gradients.
    #[inline(always)]
    fn gather<S: Simd>(&self, simd: S, working: &mut Working<'_>) {
        let (length, width) = (self.rows.len(), padded(self.shape.head_dim));
        let value_width = padded(self.shape.value_dim);
        for head in 0..self.shape.group() {
            let part = |width: usize| head * length * width..(head + 1) * length * width;
            let (dout, out) = (self.answers(self.dout, head), self.answers(self.saved.out, head));
            copy_rows(self.queries(self.saved.q, head), self.rows.clone(), &mut working.q[part(width)]);
            copy_rows(dout, self.rows.clone(), &mut working.dout[part(value_width)]);
            for (row, shift) in self.rows.clone().zip(&mut working.shift[head * length..][..length]) {
                let mut sum = Lanes::splat(simd, 0.0);
                for (a, b) in dout.row(row).chunks(LANES).zip(out.row(row).chunks(LANES)) {
                    sum = Lanes::load_any(simd, a, 0.0).fma(Lanes::load_any(simd, b, 0.0), sum);
                }
                *shift = sum.sum();
            }
        }
        copy_rows(self.keys(self.saved.k), self.rows.clone(), working.k);
        for gradient in [&mut *working.dq, &mut *working.dk, &mut *working.dv] {
            gradient.fill(0.0);
        }
    }

    /// Takes some queries of one head against one block of keys (rows of the sequence both).
    #[inline(always)]
    fn block<S: Simd>(
        &self,
        simd: S,
        working: &mut Working<'_>,
        head: usize,
        queries: Range<usize>,
        keys: Range<usize>,
    ) {
        let shape = self.shape;
        let (length, width, value_width) = (self.rows.len(), padded(shape.head_dim), padded(shape.value_dim));
        let at = |row: usize| (head * length + row) * width;
        let answer_at = |row: usize| (head * length + row) * value_width;
        for first in queries.clone().step_by(TILE_ROWS) {
            let rows = first..queries.end.min(first + TILE_ROWS);
            let here = (first - queries.start) * KEY_BLOCK;
            let reach = if self.shape.bidirectional { keys.len() } else { keys.len().min(rows.end - keys.start) };
            self.products(simd, working, head, &rows, here, reach);
            for row in rows.clone() {
                let here = (row - queries.start) * KEY_BLOCK..(row - queries.start + 1) * KEY_BLOCK;
                let kept = [self.log_sum(head, row), working.shift[head * length + row]];
                let seen = self.shape.visible(row, length);
                let inside = |position: usize| position.saturating_sub(keys.start).min(KEY_BLOCK);
                let seen = inside(seen.start)..inside(seen.end);
                let probabilities = &mut working.probabilities[here.clone()];
                score_gradients(simd, shape, seen, kept, probabilities, &mut working.dscores[here]);
            }
            simd.call(Product {
                rows: rows.len(),
                depth: reach,
                a: Left { data: &working.dscores[here..], row_stride: KEY_BLOCK, k_stride: 1 },
                b: Right { data: &working.k[keys.start * width..], stride: width, vectors: width / LANES },
                c: &mut working.dq[at(first)..],
                c_stride: width,
                accumulate: true,
            });
        }
        for first in keys.clone().step_by(TILE_ROWS) {
            // Earlier queries do not see these keys.
            let from = if self.shape.bidirectional { queries.start } else { queries.start.max(first) };
            if from >= queries.end {
                break;
            }
            let here = (from - queries.start) * KEY_BLOCK + first - keys.start;
            for (weights, right, width, gradient) in [
                (&*working.probabilities, &working.dout[answer_at(from)..], value_width, &mut *working.dv),
                (&*working.dscores, &working.q[at(from)..], width, &mut *working.dk),
            ] {
                simd.call(Product {
                    rows: TILE_ROWS.min(keys.end - first),
                    depth: queries.end - from,
                    a: Left { data: &weights[here..], row_stride: 1, k_stride: KEY_BLOCK },
                    b: Right { data: right, stride: width, vectors: width / LANES },
                    c: &mut gradient[first * width..],
                    c_stride: width,
                    accumulate: true,
                });
            }
        }
    }

    /// Dot products of some rows' queries with a block's keys, and of their answers' gradients with its values.
    #[inline(always)]
    fn products<S: Simd>(
        &self,
        simd: S,
        working: &mut Working<'_>,
        head: usize,
        rows: &Range<usize>,
        here: usize,
        reach: usize,
    ) {
        let (shape, first) = (self.shape, head * self.rows.len() + rows.start);
        let (width, value_width) = (padded(shape.head_dim), padded(shape.value_dim));
        for (left, row_stride, depth, transposed, scores) in [
            (
                &working.q[first * width..],
                width,
                shape.head_dim,
                &*working.keys_transposed,
                &mut *working.probabilities,
            ),
            (
                &working.dout[first * value_width..],
                value_width,
                shape.value_dim,
                &*working.values_transposed,
                &mut *working.dscores,
            ),
        ] {
            simd.call(Product {
                rows: rows.len(),
                depth,
                a: Left { data: left, row_stride, k_stride: 1 },
                b: Right { data: transposed, stride: KEY_BLOCK, vectors: reach.div_ceil(LANES) },
                c: &mut scores[here..],
                c_stride: KEY_BLOCK,
                accumulate: false,
            });
        }
    }

    fn log_sum(&self, head: usize, row: usize) -> f32 {
        let tokens = self.saved.q.len() / self.shape.query_width();
        self.saved.lse[(self.kv_head * self.shape.group() + head) * tokens + self.rows.start + row]
    }

    /// Adds the finished gradients to the results.
    #[inline(always)]
    fn scatter<S: Simd>(&self, simd: S, working: &Working<'_>) {
        let (length, width) = (self.rows.len(), padded(self.shape.head_dim));
        let rows = &self.rows;
        add_rows(simd, working.dk, rows, self.gradients.dk, self.keys(self.saved.k));
        add_rows(simd, working.dv, rows, self.gradients.dv, self.values(self.saved.v));
        for (head, dq) in working.dq.chunks_exact(length * width).enumerate() {
            add_rows(simd, dq, rows, self.gradients.dq, self.queries(self.saved.q, head));
        }
    }
}

/// Adds padded rows to the rows of one head, which must be this task's alone.
#[inline(always)]
fn add_rows<S: Simd>(simd: S, from: &[f32], rows: &Range<usize>, to: &DisjointMut<'_, f32>, layout: HeadRows<'_>) {
    for (row, from) in rows.clone().zip(from.chunks_exact(padded(layout.head_dim))) {
        let at = row * layout.width + layout.offset;
        // SAFETY: a task has its rows of its heads to itself.
        let to = unsafe { to.range(at..at + layout.head_dim) };
        for (to, from) in to.chunks_mut(LANES).zip(from.as_chunks::<LANES>().0) {
            (Lanes::load_any(simd, to, 0.0) + Lanes::load(simd, from)).store_any(to);
        }
    }
}

/// Turns one row's dot products into probabilities and its gradients of probabilities into gradients of dot products;
/// zero for what the row does not see: all but the keys `seen` of the block.
#[inline(always)]
fn score_gradients<S: Simd>(
    simd: S,
    shape: &AttentionShape,
    seen: Range<usize>,
    [log_sum, shift]: [f32; 2],
    probabilities: &mut [f32],
    dscores: &mut [f32],
) {
    let splat = |value| Lanes::splat(simd, value);
    let Range { start, end } = seen;
    let (zero, scale) = (splat(0.0), splat(shape.scale));
    let (probabilities, _) = probabilities.as_chunks_mut::<LANES>();
    let (dscores, _) = dscores.as_chunks_mut::<LANES>();
    for (v, (probabilities, dscores)) in probabilities.iter_mut().zip(dscores).enumerate() {
        if v * LANES >= end {
            zero.store(probabilities);
            zero.store(dscores);
            continue;
        }
        let products = Lanes::load(simd, probabilities);
        let (p, slope) = match shape.soft_cap {
            None => (exp_nonpositive(products.fma(scale, splat(-log_sum))), scale),
            Some(cap) => {
                // The slope of a capped score: 1 − tanh².
                let (one, cap) = (splat(1.0), splat(cap));
                let score = capped(products * scale, cap);
                let share = score / cap;
                (exp_nonpositive(score - splat(log_sum)), (one - share * share) * scale)
            }
        };
        let (mut p, mut d) = (p, p * (Lanes::load(simd, dscores) - splat(shift)) * slope);
        if start > 0 || end < KEY_BLOCK {
            let index = Lanes::load(simd, &KEY_INDEX.as_chunks::<LANES>().0[v]);
            let mask = |x: Lanes<S>| {
                let x = index.select_less(splat(end as f32), x, zero);
                index.select_less(splat(start as f32), zero, x)
            };
            (p, d) = (mask(p), mask(d));
        }
        p.store(probabilities);
        d.store(dscores);
    }
}
