//! The backward of tiled attention (Dao et al. 2022, "FlashAttention"): the probabilities are computed again from the
//! scores and the kept log-sum-exp, a block of keys against some queries at a time.
//!
//! One task has one key head of one sequence: all query heads of the group add to its key and value gradients in
//! ascending order, so the result does not depend on threads.
//!
//! In bf16 the three products that give the gradients have rounded operands. The other two are as in f32: the
//! probabilities are those that gave the answers, and their gradients lose most of their digits against the shift.

mod working;

use super::forward::{KEY_INDEX, capped};
use super::pack::{AHEAD, HeadRows, KEY_BLOCK, copy_rows, padded, pair_rows, transpose_rows};
use super::tile::{Element, Left, Pair, Product, Right, TILE_ROWS};
use super::{AttentionShape, Saved};
use crate::gemm::Precision;
use crate::isa::Isa;
use crate::memory::Buffer;
use crate::parallel::DisjointMut;
use crate::simd::math::exp_nonpositive;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch, prefetch};
use crate::tasks::for_each_task;
use std::marker::PhantomData;
use std::ops::Range;
use working::{Sizes, Working};

/// Queries taken against a block of keys at once.
const QUERY_ROWS: usize = 8 * TILE_ROWS;

/// Where the gradients go.
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
    precision: Precision,
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
            let (kv_head, rows) = (task % shape.n_kv_heads, bounds[0]..bounds[1]);
            match precision {
                Precision::F32 => dispatch(isa, BackwardTask::<f32>::new(shape, saved, dout, gradients, kv_head, rows)),
                Precision::Bf16 => {
                    dispatch(isa, BackwardTask::<Pair>::new(shape, saved, dout, gradients, kv_head, rows))
                }
            }
        }
    });
}

/// How the operands of the products are held: as numbers, or rounded to bf16 in pairs that follow each other along the
/// sum, which stand in the bits of an f32.
trait Word: Element {
    /// Numbers of a word.
    const NUMBERS: usize;

    fn all(words: &[f32]) -> &[Self];
}

impl Word for f32 {
    const NUMBERS: usize = 1;

    #[inline(always)]
    fn all(words: &[f32]) -> &[Self] {
        words
    }
}

impl Word for Pair {
    const NUMBERS: usize = 2;

    #[inline(always)]
    fn all(words: &[f32]) -> &[Self] {
        Self::of_words(words)
    }
}

/// One key head of one sequence.
struct BackwardTask<'a, W> {
    shape: &'a AttentionShape,
    saved: &'a Saved<'a>,
    dout: &'a [f32],
    gradients: Gradients<'a>,
    kv_head: usize,
    rows: Range<usize>,
    sizes: Sizes,
    word: PhantomData<W>,
}

impl<W: Word> Kernel for BackwardTask<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (shape, sizes) = (self.shape, self.sizes);
        let mut scratch = Buffer::<f32>::scratch(Working::parts(&sizes).iter().sum());
        let mut working = Working::divide(&mut scratch, &sizes);
        self.gather(simd, &mut working);
        for start in (0..sizes.length).step_by(KEY_BLOCK) {
            let keys = start..sizes.length.min(start + KEY_BLOCK);
            transpose_rows(self.keys(self.saved.k), self.shifted(&keys), working.keys_transposed);
            transpose_rows(self.values(self.saved.v), self.shifted(&keys), working.values_transposed);
            // The last query that sees the block's last key.
            let end = if shape.bidirectional { sizes.length } else { shape.last_reader(keys.end - 1, sizes.length) };
            let start = if shape.bidirectional { 0 } else { start };
            for head in 0..sizes.group {
                for first in (start..end).step_by(QUERY_ROWS) {
                    let queries = first..end.min(first + QUERY_ROWS);
                    self.block(simd, &mut working, head, queries, keys.clone());
                }
            }
        }
        self.scatter(simd, &working);
    }
}

impl<'a, W: Word> BackwardTask<'a, W> {
    fn new(
        shape: &'a AttentionShape,
        saved: &'a Saved<'a>,
        dout: &'a [f32],
        gradients: Gradients<'a>,
        kv_head: usize,
        rows: Range<usize>,
    ) -> Self {
        let length = rows.len();
        let sizes = Sizes {
            length,
            word_rows: length.div_ceil(W::NUMBERS),
            group: shape.group(),
            width: padded(shape.head_dim),
            value_width: padded(shape.value_dim),
            key_pairs: if W::NUMBERS > 1 { KEY_BLOCK / 2 } else { 0 },
        };
        Self { shape, saved, dout, gradients, kv_head, rows, sizes, word: PhantomData }
    }

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
        let Sizes { length, word_rows, group, width, value_width, .. } = self.sizes;
        let rows = || self.rows.clone();
        let of_head = |head: usize, rows: usize, width: usize| head * rows * width..(head + 1) * rows * width;
        for head in 0..group {
            let (q, dout, out) =
                (self.queries(self.saved.q, head), self.answers(self.dout, head), self.answers(self.saved.out, head));
            copy_rows(simd, q, rows(), &mut working.q[of_head(head, length, width)]);
            copy_rows(simd, dout, rows(), &mut working.dout[of_head(head, length, value_width)]);
            if W::NUMBERS > 1 {
                pair_rows(simd, q, rows(), &mut working.q_words[of_head(head, word_rows, width)]);
                pair_rows(simd, dout, rows(), &mut working.dout_words[of_head(head, word_rows, value_width)]);
            }
            for (row, shift) in rows().zip(&mut working.shift[head * length..][..length]) {
                out.prefetch(row + AHEAD);
                let mut sum = Lanes::splat(simd, 0.0);
                for (a, b) in dout.row(row).chunks(LANES).zip(out.row(row).chunks(LANES)) {
                    sum = Lanes::load_any(simd, a, 0.0).fma(Lanes::load_any(simd, b, 0.0), sum);
                }
                *shift = sum.sum();
            }
        }
        match W::NUMBERS {
            1 => copy_rows(simd, self.keys(self.saved.k), rows(), working.k),
            _ => pair_rows(simd, self.keys(self.saved.k), rows(), working.k),
        }
        for gradient in [&mut *working.dq, &mut *working.dk, &mut *working.dv] {
            gradient.fill(0.0);
        }
    }

    /// Takes some queries of one head against one block of keys (rows of the sequence both). The queries begin at a
    /// whole word.
    #[inline(always)]
    fn block<S: Simd>(
        &self,
        simd: S,
        working: &mut Working<'_>,
        head: usize,
        queries: Range<usize>,
        keys: Range<usize>,
    ) {
        let Sizes { length, word_rows, width, value_width, key_pairs, .. } = self.sizes;
        for first in queries.clone().step_by(TILE_ROWS) {
            let rows = first..queries.end.min(first + TILE_ROWS);
            let reach = if self.shape.bidirectional { keys.len() } else { keys.len().min(rows.end - keys.start) };
            self.products(simd, working, head, &rows, reach);
            self.score_gradients(simd, working, head, &rows, first - queries.start, keys.start);
            let (data, row_stride) = match W::NUMBERS {
                1 => (&working.dscores[(first - queries.start) * KEY_BLOCK..], KEY_BLOCK),
                _ => (&working.dscore_pairs[(first - queries.start) * key_pairs..], key_pairs),
            };
            let k = W::all(&working.k[keys.start / W::NUMBERS * width..]);
            simd.call(Product {
                rows: rows.len(),
                depth: reach.div_ceil(W::NUMBERS),
                a: Left { data, row_stride, k_stride: 1 },
                b: Right { data: k, stride: width, vectors: width / LANES },
                c: &mut working.dq[(head * length + first) * width..],
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
            let here = (from - queries.start) / W::NUMBERS * KEY_BLOCK + first - keys.start;
            let word = head * word_rows + from / W::NUMBERS;
            let (dout, q) = match W::NUMBERS {
                1 => (&*working.dout, &*working.q),
                _ => (&*working.dout_words, &*working.q_words),
            };
            for (weights, right, width, gradient) in [
                (&*working.probabilities, &dout[word * value_width..], value_width, &mut *working.dv),
                (&*working.dscores, &q[word * width..], width, &mut *working.dk),
            ] {
                simd.call(Product {
                    rows: TILE_ROWS.min(keys.end - first),
                    depth: (queries.end - from).div_ceil(W::NUMBERS),
                    a: Left { data: &weights[here..], row_stride: 1, k_stride: KEY_BLOCK },
                    b: Right { data: W::all(right), stride: width, vectors: width / LANES },
                    c: &mut gradient[first * width..],
                    c_stride: width,
                    accumulate: true,
                });
            }
        }
    }

    /// Dot products of some rows' queries with a block's keys, and of their answers' gradients with its values.
    #[inline(always)]
    fn products<S: Simd>(&self, simd: S, working: &mut Working<'_>, head: usize, rows: &Range<usize>, reach: usize) {
        let (shape, sizes, first) = (self.shape, self.sizes, head * self.sizes.length + rows.start);
        for (left, row_stride, depth, transposed, products) in [
            (
                &working.q[first * sizes.width..],
                sizes.width,
                shape.head_dim,
                &*working.keys_transposed,
                &mut *working.scores,
            ),
            (
                &working.dout[first * sizes.value_width..],
                sizes.value_width,
                shape.value_dim,
                &*working.values_transposed,
                &mut *working.slopes,
            ),
        ] {
            simd.call(Product {
                rows: rows.len(),
                depth,
                a: Left { data: left, row_stride, k_stride: 1 },
                b: Right { data: transposed, stride: KEY_BLOCK, vectors: reach.div_ceil(LANES) },
                c: products,
                c_stride: KEY_BLOCK,
                accumulate: false,
            });
        }
    }

    /// Turns the dot products of some rows into probabilities, and the gradients of probabilities into those of dot
    /// products; zero for keys that a row does not see. `place` is that of the first row among the queries.
    #[inline(always)]
    fn score_gradients<S: Simd>(
        &self,
        simd: S,
        working: &mut Working<'_>,
        head: usize,
        rows: &Range<usize>,
        place: usize,
        first_key: usize,
    ) {
        const VECTORS: usize = KEY_BLOCK / LANES;
        let zero = Lanes::splat(simd, 0.0);
        for (i, row) in rows.clone().enumerate().step_by(W::NUMBERS) {
            let mut results = [[[zero; VECTORS]; 2]; 2];
            for (i, row) in (i..).zip(row..rows.end.min(row + W::NUMBERS)) {
                let kept = [self.log_sum(head, row), working.shift[head * self.sizes.length + row]];
                let seen = self.shape.visible(row, self.sizes.length);
                let inside = |position: usize| position.saturating_sub(first_key).min(KEY_BLOCK);
                let seen = inside(seen.start)..inside(seen.end);
                let part = i * KEY_BLOCK..(i + 1) * KEY_BLOCK;
                let products = [&working.scores[part.clone()], &working.slopes[part]];
                results[i % W::NUMBERS] = score_gradients(simd, self.shape, seen, kept, products);
            }
            let words = (place + i) / W::NUMBERS * KEY_BLOCK;
            let probabilities = working.probabilities[words..][..KEY_BLOCK].as_chunks_mut::<LANES>().0;
            let dscores = working.dscores[words..][..KEY_BLOCK].as_chunks_mut::<LANES>().0;
            let [[p, d], [p_next, d_next]] = results;
            for v in 0..VECTORS {
                if W::NUMBERS == 1 {
                    p[v].store(&mut probabilities[v]);
                    d[v].store(&mut dscores[v]);
                } else {
                    simd.store(simd.narrow_pairs(p[v].value, p_next[v].value), &mut probabilities[v]);
                    simd.store(simd.narrow_pairs(d[v].value, d_next[v].value), &mut dscores[v]);
                }
            }
            if W::NUMBERS > 1 {
                let pairs = &mut working.dscore_pairs[(place + i) * self.sizes.key_pairs..][..2 * self.sizes.key_pairs];
                let pairs = pairs.as_chunks_mut::<LANES>().0.iter_mut();
                for (d, to) in [d, d_next].as_flattened().chunks_exact(2).zip(pairs) {
                    simd.store(simd.narrow_two(d[0].value, d[1].value), to);
                }
            }
        }
    }

    fn log_sum(&self, head: usize, row: usize) -> f32 {
        let tokens = self.saved.q.len() / self.shape.query_width();
        self.saved.lse[(self.kv_head * self.shape.group() + head) * tokens + self.rows.start + row]
    }

    /// Writes the finished gradients.
    #[inline(always)]
    fn scatter<S: Simd>(&self, simd: S, working: &Working<'_>) {
        let rows = &self.rows;
        write_rows(simd, working.dk, rows, self.gradients.dk, self.keys(self.saved.k));
        write_rows(simd, working.dv, rows, self.gradients.dv, self.values(self.saved.v));
        for (head, dq) in working.dq.chunks_exact(self.sizes.length * self.sizes.width).enumerate() {
            write_rows(simd, dq, rows, self.gradients.dq, self.queries(self.saved.q, head));
        }
    }
}

/// Writes padded rows to the rows of one head, which must be this task's alone.
#[inline(always)]
fn write_rows<S: Simd>(simd: S, from: &[f32], rows: &Range<usize>, to: &DisjointMut<'_, f32>, layout: HeadRows<'_>) {
    for (row, from) in rows.clone().zip(from.chunks_exact(padded(layout.head_dim))) {
        let at = row * layout.width + layout.offset;
        prefetch::<true, _>(to.at(at).wrapping_add(AHEAD * layout.width), layout.head_dim);
        // SAFETY: a task has its rows of its heads to itself.
        let to = unsafe { to.range(at..at + layout.head_dim) };
        for (to, from) in to.chunks_mut(LANES).zip(from.as_chunks::<LANES>().0) {
            Lanes::load(simd, from).store_any(to);
        }
    }
}

/// A row's probabilities from its dot products, and the gradients of dot products from those of probabilities; zero for
/// what the row does not see: all but the keys `seen` of the block.
#[inline(always)]
fn score_gradients<S: Simd>(
    simd: S,
    shape: &AttentionShape,
    seen: Range<usize>,
    [log_sum, shift]: [f32; 2],
    [products, slopes]: [&[f32]; 2],
) -> [[Lanes<S>; KEY_BLOCK / LANES]; 2] {
    let splat = |value| Lanes::splat(simd, value);
    let Range { start, end } = seen;
    let (zero, scale) = (splat(0.0), splat(shape.scale));
    let mut results = [[zero; KEY_BLOCK / LANES]; 2];
    for (v, (products, slopes)) in products.as_chunks().0.iter().zip(slopes.as_chunks().0).enumerate() {
        if v * LANES >= end {
            break;
        }
        let products = Lanes::load(simd, products);
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
        let (mut p, mut d) = (p, p * (Lanes::load(simd, slopes) - splat(shift)) * slope);
        if start > 0 || end < KEY_BLOCK {
            let index = Lanes::load(simd, &KEY_INDEX.as_chunks::<LANES>().0[v]);
            let mask = |x: Lanes<S>| {
                let x = index.select_less(splat(end as f32), x, zero);
                index.select_less(splat(start as f32), zero, x)
            };
            (p, d) = (mask(p), mask(d));
        }
        [results[0][v], results[1][v]] = [p, d];
    }
    results
}
