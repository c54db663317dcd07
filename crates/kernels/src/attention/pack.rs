//! Copies of one head's rows in the layouts that the tiles read.

use crate::simd::{LANES, Lanes, Simd, prefetch};
use std::ops::Range;

/// Keys of a block; blocks stand at multiples of this position in every call, whatever rows are asked for.
pub(super) const KEY_BLOCK: usize = 64;

/// Numbers rounded up to whole vectors.
pub(super) fn padded(n: usize) -> usize {
    n.next_multiple_of(LANES)
}

/// One head of a `[rows, width]` matrix.
#[derive(Clone, Copy)]
pub(super) struct HeadRows<'a> {
    pub(super) data: &'a [f32],
    /// Numbers of a row of all heads.
    pub(super) width: usize,
    /// Where the head begins in a row.
    pub(super) offset: usize,
    pub(super) head_dim: usize,
}

/// How many rows ahead of their use are called into the cache.
pub(super) const AHEAD: usize = 32;

impl<'a> HeadRows<'a> {
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.width + self.offset..][..self.head_dim]
    }

    /// Calls a row that will be needed soon into the cache: one head's rows are short pieces far apart, which no
    /// processor foresees.
    #[inline(always)]
    pub(super) fn prefetch(&self, row: usize) {
        prefetch::<false, _>(self.data.as_ptr().wrapping_add(row * self.width + self.offset), self.head_dim);
    }
}

/// Copies rows into `to` `[rows, padded(head_dim)]`, zeros behind each row.
#[inline(always)]
pub(super) fn copy_rows<S: Simd>(simd: S, from: HeadRows<'_>, rows: Range<usize>, to: &mut [f32]) {
    for (row, to) in rows.zip(to.chunks_exact_mut(padded(from.head_dim))) {
        from.prefetch(row + AHEAD);
        for (from, to) in from.row(row).chunks(LANES).zip(to.as_chunks_mut::<LANES>().0) {
            Lanes::load_any(simd, from, 0.0).store(to);
        }
    }
}

/// Rows rounded to bf16, in pairs of rows, into `to` `[rows / 2, padded(head_dim)]`, zeros behind each and for the row
/// that is missing at the end.
#[inline(always)]
pub(super) fn pair_rows<S: Simd>(simd: S, from: HeadRows<'_>, rows: Range<usize>, to: &mut [f32]) {
    for (row, to) in rows.clone().step_by(2).zip(to.chunks_exact_mut(padded(from.head_dim))) {
        from.prefetch(row + AHEAD);
        from.prefetch(row + AHEAD + 1);
        let low = from.row(row);
        let high = if row + 1 < rows.end { from.row(row + 1) } else { &[] };
        for (i, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let part = |x: &'_ [f32]| load(simd, &x[x.len().min(i * LANES)..x.len().min((i + 1) * LANES)]);
            simd.store(simd.narrow_pairs(part(low), part(high)), to);
        }
    }
}

#[inline(always)]
fn load<S: Simd>(simd: S, from: &[f32]) -> S::Vector {
    Lanes::load_any(simd, from, 0.0).value
}

/// Transposes up to [`KEY_BLOCK`] rows into `to` `[head_dim, KEY_BLOCK]`, zeros for the keys that are not there.
#[inline(always)]
pub(super) fn transpose_rows(from: HeadRows<'_>, rows: Range<usize>, to: &mut [f32]) {
    let count = rows.len();
    assert!(count <= KEY_BLOCK && to.len() >= from.head_dim * KEY_BLOCK);
    let fours = count / 4 * 4;
    for key in (0..fours).step_by(4) {
        (key..key + 4).for_each(|key| from.prefetch(rows.start + key + AHEAD));
        let four = std::array::from_fn(|i| from.row(rows.start + key + i));
        transpose_four(four, &mut to[key..]);
    }
    for key in fours..count {
        for (i, &x) in from.row(rows.start + key).iter().enumerate() {
            to[i * KEY_BLOCK + key] = x;
        }
    }
    if count < KEY_BLOCK {
        to.chunks_exact_mut(KEY_BLOCK).take(from.head_dim).for_each(|row| row[count..].fill(0.0));
    }
}

/// Writes four rows as four columns of a matrix of stride [`KEY_BLOCK`].
#[inline(always)]
fn transpose_four(rows: [&[f32]; 4], to: &mut [f32]) {
    let head_dim = rows[0].len();
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        assert!(rows.iter().all(|row| row.len() == head_dim));
        assert!(head_dim == 0 || to.len() >= (head_dim - 1) * KEY_BLOCK + 4);
        while done + 4 <= head_dim {
            // SAFETY: SSE is part of x86-64; the asserts cover four numbers of each row and four rows of `to`.
            unsafe {
                let [mut a, mut b, mut c, mut d] = rows.map(|row| _mm_loadu_ps(row.as_ptr().add(done)));
                _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
                for (i, column) in [a, b, c, d].into_iter().enumerate() {
                    _mm_storeu_ps(to.as_mut_ptr().add((done + i) * KEY_BLOCK), column);
                }
            }
            done += 4;
        }
    }
    for i in done..head_dim {
        for (key, row) in rows.iter().enumerate() {
            to[i * KEY_BLOCK + key] = row[i];
        }
    }
}
