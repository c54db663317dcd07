//! Moving and summing rows of matrices by lists of row numbers.

use super::arithmetic::ScaledAdd;
use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::math::sum_of_products;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::{for_each_block, rows as rows_of, rows_mut};

/// Row `row` of a matrix of `width` columns.
#[inline(always)]
fn row_of<T>(data: &[T], row: u32, width: usize) -> &[T] {
    &data[row as usize * width..][..width]
}

/// `out[i] = source[rows[i]]`. An embedding's forward.
///
/// # Shapes
/// `source` `[n, width]`, `rows` `[m]`, `out` `[m, width]`.
pub fn gather_rows<T: Copy + Send + Sync>(source: &[T], width: usize, rows: &[u32], out: &mut [T]) {
    assert_eq!(out.len(), rows.len() * width);
    let out = DisjointMut::new(out);
    for_each_block(rows.len(), width, |block| {
        // SAFETY: blocks of rows are disjoint.
        let out = unsafe { rows_mut(&out, &block, width) };
        for (out, &row) in out.chunks_exact_mut(width).zip(&rows[block]) {
            out.copy_from_slice(row_of(source, row, width));
        }
    });
}

/// `out[i] = weights[i] * source[rows[i]]`: the gradient of [`scatter_weighted`] to its source.
///
/// # Shapes
/// `source` `[n, width]`, `rows`, `weights` `[m]`, `out` `[m, width]`.
pub fn gather_rows_weighted(source: &[f32], width: usize, rows: &[u32], weights: &[f32], out: &mut [f32]) {
    assert_eq!(out.len(), rows.len() * width);
    assert_eq!(weights.len(), rows.len());
    let out = DisjointMut::new(out);
    for_each_block(rows.len(), width, |block| {
        // SAFETY: blocks of rows are disjoint.
        let out = unsafe { rows_mut(&out, &block, width) };
        for ((out, &row), &weight) in out.chunks_exact_mut(width).zip(&rows[block.clone()]).zip(&weights[block]) {
            out.iter_mut().zip(row_of(source, row, width)).for_each(|(out, &source)| *out = weight * source);
        }
    });
}

/// `out[i] = a[rows[i]] · b[i]`: the gradient of [`scatter_weighted`] to its weights.
///
/// # Shapes
/// `a` `[n, width]`, `rows` `[m]`, `b` `[m, width]`, `out` `[m]`.
pub fn gathered_dots(a: &[f32], width: usize, rows: &[u32], b: &[f32], out: &mut [f32]) {
    gathered_dots_on(Isa::current(), [a, b], width, rows, out);
}

fn gathered_dots_on(isa: Isa, [a, b]: [&[f32]; 2], width: usize, rows: &[u32], out: &mut [f32]) {
    assert_eq!(b.len(), rows.len() * width);
    assert_eq!(out.len(), rows.len());
    let out = DisjointMut::new(out);
    for_each_block(rows.len(), width, |block| {
        let (rows, b) = (&rows[block.clone()], rows_of(b, &block, width));
        // SAFETY: blocks of rows are disjoint.
        dispatch(isa, Dots { a, rows, b, out: unsafe { out.range(block) }, width });
    });
}

struct Dots<'a> {
    a: &'a [f32],
    rows: &'a [u32],
    b: &'a [f32],
    out: &'a mut [f32],
    width: usize,
}

impl Kernel for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for ((out, &row), b) in self.out.iter_mut().zip(self.rows).zip(self.b.chunks_exact(self.width)) {
            *out = sum_of_products(simd, row_of(self.a, row, self.width), b);
        }
    }
}

/// The combine: `out[t] = Σ weights[r] * source[r]` over `r` in `rows[offsets[t]..offsets[t + 1]]`, in that order
/// (slot order); a token without rows becomes zero.
///
/// # Shapes
/// `source` `[assignments, width]`, `weights` `[assignments]`, `offsets` `[tokens + 1]`, `rows` `[offsets[tokens]]`,
/// `out` `[tokens, width]`.
pub fn scatter_weighted(
    source: &[f32],
    width: usize,
    offsets: &[usize],
    rows: &[u32],
    weights: &[f32],
    out: &mut [f32],
) {
    scatter_on(Isa::current(), source, width, offsets, rows, Some(weights), out);
}

/// `out[t] += Σ source[r]` over `r` in `rows[offsets[t]..offsets[t + 1]]`, in that order: the gradient of
/// [`gather_rows`] when rows are known by token.
///
/// # Shapes
/// As [`scatter_weighted`].
pub fn scatter_add(source: &[f32], width: usize, offsets: &[usize], rows: &[u32], out: &mut [f32]) {
    scatter_on(Isa::current(), source, width, offsets, rows, None, out);
}

fn scatter_on(
    isa: Isa,
    source: &[f32],
    width: usize,
    offsets: &[usize],
    rows: &[u32],
    weights: Option<&[f32]>,
    out: &mut [f32],
) {
    let tokens = offsets.len() - 1;
    assert_eq!(out.len(), tokens * width);
    let out = DisjointMut::new(out);
    for_each_block(tokens, width * rows.len().div_ceil(tokens.max(1)), |block| {
        let offsets = &offsets[block.start..block.end + 1];
        // SAFETY: blocks of tokens are disjoint.
        let out = unsafe { rows_mut(&out, &block, width) };
        dispatch(isa, Scatter { source, width, offsets, rows, weights, out });
    });
}

struct Scatter<'a> {
    source: &'a [f32],
    width: usize,
    offsets: &'a [usize],
    rows: &'a [u32],
    /// With weights the sum overwrites, without it is added.
    weights: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl Kernel for Scatter<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (out, bounds) in self.out.chunks_exact_mut(self.width).zip(self.offsets.windows(2)) {
            let rows = &self.rows[bounds[0]..bounds[1]];
            for (vector, out) in out.chunks_mut(LANES).enumerate() {
                let mut sum = match self.weights {
                    Some(_) => Lanes::splat(simd, 0.0),
                    None => Lanes::load_any(simd, out, 0.0),
                };
                for &row in rows {
                    let weight = self.weights.map_or(1.0, |weights| weights[row as usize]);
                    let source = &row_of(self.source, row, self.width)[vector * LANES..][..out.len()];
                    sum = Lanes::load_any(simd, source, 0.0).fma(Lanes::splat(simd, weight), sum);
                }
                sum.store_any(out);
            }
        }
    }
}

/// The plain loop that [`scatter_weighted`] is compared with.
pub fn scatter_weighted_reference(
    source: &[f32],
    width: usize,
    offsets: &[usize],
    rows: &[u32],
    weights: &[f32],
    out: &mut [f32],
) {
    for (out, bounds) in out.chunks_exact_mut(width).zip(offsets.windows(2)) {
        out.fill(0.0);
        for &row in &rows[bounds[0]..bounds[1]] {
            for (out, &source) in out.iter_mut().zip(row_of(source, row, width)) {
                *out += weights[row as usize] * source;
            }
        }
    }
}

/// `dtable[ids[i]] += dy[i]`, the rows of one id in the order of `i`: an embedding's backward.
///
/// # Shapes
/// `dy` `[tokens, width]`, `ids` `[tokens]`, `dtable` `[vocab, width]`.
pub fn embedding_backward(dy: &[f32], width: usize, ids: &[u32], dtable: &mut [f32]) {
    embedding_backward_on(Isa::current(), dy, width, ids, dtable);
}

fn embedding_backward_on(isa: Isa, dy: &[f32], width: usize, ids: &[u32], dtable: &mut [f32]) {
    assert_eq!(dy.len(), ids.len() * width);
    // Tokens by id: one task adds all rows of an id, in the order of the tokens.
    let mut tokens: Vec<u32> = (0..ids.len() as u32).collect();
    tokens.sort_by_key(|&token| ids[token as usize]);
    let groups: Vec<&[u32]> = tokens.chunk_by(|&a, &b| ids[a as usize] == ids[b as usize]).collect();
    let dtable = DisjointMut::new(dtable);
    for_each_block(groups.len(), width * ids.len().div_ceil(groups.len().max(1)), |block| {
        for group in &groups[block] {
            let id = ids[group[0] as usize] as usize;
            for &token in *group {
                // SAFETY: an id stands in one group, a group in one block.
                let a = unsafe { rows_mut(&dtable, &(id..id + 1), width) };
                dispatch(isa, ScaledAdd { a, factor: 1.0, b: row_of(dy, token, width) });
            }
        }
    });
}

/// The plain loop that [`embedding_backward`] is compared with.
pub fn embedding_backward_reference(dy: &[f32], width: usize, ids: &[u32], dtable: &mut [f32]) {
    for (dy, &id) in dy.chunks_exact(width).zip(ids) {
        dtable[id as usize * width..][..width].iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bits, check, numbers};

    /// Assignments of `tokens` tokens with 0 to 3 rows each, rows in a scrambled order.
    fn assignments(tokens: usize) -> (Vec<usize>, Vec<u32>) {
        let mut offsets = vec![0];
        (0..tokens).for_each(|token| offsets.push(offsets[token] + token * 7 % 4));
        let count = offsets[tokens];
        let rows = (0..count).map(|i| (count - 1 - i) as u32).collect();
        (offsets, rows)
    }

    #[test]
    fn combine_is_the_reference_and_its_gradients_are_adjoint() {
        for (tokens, width) in [(0, 4), (1, 1), (9, 7), (50, 33), (200, 256)] {
            let (offsets, rows) = assignments(tokens);
            let (source, weights) = (&numbers(1, rows.len() * width + 1)[1..], numbers(2, rows.len()));
            let mut reference = vec![f32::NAN; tokens * width];
            scatter_weighted_reference(source, width, &offsets, &rows, &weights, &mut reference);
            check(&[reference.clone()], 1e-6, |isa| {
                let mut out = vec![f32::NAN; tokens * width];
                scatter_on(isa, source, width, &offsets, &rows, Some(&weights), &mut out);
                vec![out]
            });

            let mut token_of_row = vec![0; rows.len()];
            for token in 0..tokens {
                rows[offsets[token]..offsets[token + 1]].iter().for_each(|&r| token_of_row[r as usize] = token as u32);
            }
            let dout = numbers(3, tokens * width);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a * b)).sum::<f64>();
            let mut dsource = vec![f32::NAN; rows.len() * width];
            gather_rows_weighted(&dout, width, &token_of_row, &weights, &mut dsource);
            let mut dweights = vec![f32::NAN; rows.len()];
            gathered_dots(&dout, width, &token_of_row, source, &mut dweights);
            let value = dot(&dout, &reference);
            assert!((dot(&dsource, source) - value).abs() < 1e-3);
            assert!((dot(&dweights, &weights) - value).abs() < 1e-3);
            let exact: Vec<f32> = (0..rows.len())
                .map(|i| dot(row_of(&dout, token_of_row[i], width), row_of(source, i as u32, width)) as f32)
                .collect();
            check(&[exact], 1e-5, |isa| {
                let mut out = vec![f32::NAN; rows.len()];
                gathered_dots_on(isa, [&dout, source], width, &token_of_row, &mut out);
                vec![out]
            });
        }
    }

    #[test]
    fn gather_then_scatter_adds_each_row_as_often_as_it_went_out() {
        let (offsets, rows) = assignments(30);
        let mut token_of_row = vec![0; rows.len()];
        for token in 0..30 {
            rows[offsets[token]..offsets[token + 1]].iter().for_each(|&r| token_of_row[r as usize] = token as u32);
        }
        let x = numbers(1, 30 * 19);
        let mut gathered = vec![0.0; rows.len() * 19];
        gather_rows(&x, 19, &token_of_row, &mut gathered);
        let mut sum = vec![1.0; x.len()];
        scatter_add(&gathered, 19, &offsets, &rows, &mut sum);
        for (i, (&sum, &x)) in sum.iter().zip(&x).enumerate() {
            let times = (i / 19 * 7 % 4) as f32;
            assert!((sum - (1.0 + times * x)).abs() < 1e-6);
        }
    }

    #[test]
    fn embedding_gradients_add_in_token_order() {
        for (tokens, width, vocab) in [(0, 3, 2), (1, 1, 1), (40, 5, 3), (500, 65, 50)] {
            let ids: Vec<u32> = (0..tokens).map(|i| (i * i * 31 % vocab) as u32).collect();
            let dy = &numbers(1, tokens * width + 1)[1..];
            let mut reference = numbers(2, vocab * width);
            embedding_backward_reference(dy, width, &ids, &mut reference);
            check(&[reference.clone()], 0.0, |isa| {
                let mut dtable = numbers(2, vocab * width);
                embedding_backward_on(isa, dy, width, &ids, &mut dtable);
                vec![dtable]
            });
            let mut again = numbers(2, vocab * width);
            embedding_backward(dy, width, &ids, &mut again);
            assert_eq!(bits(&again), bits(&reference));
        }
    }
}
