//! Small matrix products that stay in the first caches: `C += A B` by register tiles of eight or four rows.
//!
//! Every element of C is one chain of (fused) multiply-adds over ascending k, whatever the tile it falls in, so its bits
//! depend on its own row of A and column of B alone.

use crate::simd::{Kernel, LANES, Simd};
use std::ops::Range;

/// Rows that are best asked for at once: a multiple of every register tile.
pub(super) const TILE_ROWS: usize = 8;

/// The left operand: element `(row, k)` stands at `row * row_stride + k * k_stride`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) data: &'a [f32],
    pub(super) row_stride: usize,
    pub(super) k_stride: usize,
}

/// What the right operand is held in.
pub(super) trait Element: Copy {
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::Vector;

    /// `sum + factor * column`.
    #[inline(always)]
    fn multiply_add<S: Simd>(simd: S, factor: S::Vector, column: S::Vector, sum: S::Vector) -> S::Vector {
        simd.fma(factor, column, sum)
    }
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::Vector {
        simd.load(from)
    }
}

/// The bits of a bf16.
impl Element for u16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::Vector {
        simd.load_bf16(from)
    }
}

/// A code of [`super::CacheFormat::Q8`], without its scale.
impl Element for i8 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::Vector {
        simd.load_i8(from)
    }
}

/// Two bf16 that follow each other along k; the left operand holds such pairs too, as the bits of its numbers.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Pair(f32);

impl Pair {
    /// Numbers whose bits are pairs.
    #[inline(always)]
    pub(super) fn of_words(words: &[f32]) -> &[Self] {
        // SAFETY: a transparent wrapper.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
    }
}

impl Element for Pair {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> S::Vector {
        simd.load(&from.map(|pair| pair.0))
    }

    #[inline(always)]
    fn multiply_add<S: Simd>(simd: S, factor: S::Vector, column: S::Vector, sum: S::Vector) -> S::Vector {
        simd.fma_pairs(factor, column, sum)
    }
}

/// The right operand: row k stands at `k * stride` and holds `vectors` vectors of 16 columns.
#[derive(Clone, Copy)]
pub(super) struct Right<'a, E> {
    pub(super) data: &'a [E],
    pub(super) stride: usize,
    pub(super) vectors: usize,
}

/// `C = A B`, or `C += A B` when `accumulate`.
pub(super) struct Product<'a, E> {
    pub(super) rows: usize,
    /// Products an element.
    pub(super) depth: usize,
    pub(super) a: Left<'a>,
    pub(super) b: Right<'a, E>,
    pub(super) c: &'a mut [f32],
    pub(super) c_stride: usize,
    pub(super) accumulate: bool,
}

impl<E: Element> Kernel for Product<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { rows, depth, a, b, c, c_stride, accumulate } = self;
        if rows == 0 || b.vectors == 0 || (depth == 0 && accumulate) {
            return;
        }
        let columns = b.vectors * LANES;
        assert!(c.len() >= (rows - 1) * c_stride + columns);
        if depth > 0 {
            assert!(a.data.len() > (rows - 1) * a.row_stride + (depth - 1) * a.k_stride);
            assert!(b.data.len() >= (depth - 1) * b.stride + columns);
        }
        let mut row = 0;
        while row < rows {
            let height = match rows - row {
                8.. if S::WIDE_TILE => 8,
                4.. => 4,
                _ => 1,
            };
            let mut vector = 0;
            while vector < b.vectors {
                let tile = Tile {
                    // SAFETY: the asserts above cover every row, column and k of the whole product.
                    a: unsafe { a.data.as_ptr().add(row * a.row_stride) },
                    a_strides: [a.row_stride, a.k_stride],
                    // SAFETY: as above.
                    b: unsafe { b.data.as_ptr().add(vector * LANES) },
                    b_stride: b.stride,
                    // SAFETY: as above.
                    c: unsafe { c.as_mut_ptr().add(row * c_stride + vector * LANES) },
                    c_stride,
                    depth,
                    accumulate,
                };
                // SAFETY: as above; each call stays inside `rows`, `depth` and `columns`.
                vector += unsafe {
                    match (height, b.vectors - vector) {
                        (8, 2..) => tile.run::<S, 8, 2>(simd),
                        (8, _) => tile.run::<S, 8, 1>(simd),
                        (4, 4..) if S::WIDE_TILE => tile.run::<S, 4, 4>(simd),
                        (4, 2..) if S::WIDE_TILE => tile.run::<S, 4, 2>(simd),
                        (4, _) => tile.run::<S, 4, 1>(simd),
                        (_, 4..) => tile.run::<S, 1, 4>(simd),
                        (_, 2..) => tile.run::<S, 1, 2>(simd),
                        (_, _) => tile.run::<S, 1, 1>(simd),
                    }
                };
            }
            row += height;
        }
    }
}

/// One register tile's corner of A, B and C.
struct Tile<E> {
    a: *const f32,
    a_strides: [usize; 2],
    b: *const E,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
    depth: usize,
    accumulate: bool,
}

impl<E: Element> Tile<E> {
    /// Computes R rows by V vectors; returns V.
    ///
    /// # Safety
    /// R rows of A and C, V vectors of B and C, and `depth` k must lie inside their slices.
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize, const V: usize>(self, simd: S) -> usize {
        let mut sums = [[simd.splat(0.0); V]; R];
        // SAFETY: the caller's promise covers every address below.
        unsafe {
            if self.accumulate {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = simd.load(&*self.c.add(r * self.c_stride + v * LANES).cast());
                    }
                }
            }
            let [row_stride, k_stride] = self.a_strides;
            let (mut a, mut b) = (self.a, self.b);
            for _ in 0..self.depth {
                let mut columns = [simd.splat(0.0); V];
                for (v, column) in columns.iter_mut().enumerate() {
                    *column = E::load(simd, &*b.add(v * LANES).cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let factor = simd.splat(*a.add(r * row_stride));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = E::multiply_add(simd, factor, column, *sum);
                    }
                }
                a = a.wrapping_add(k_stride);
                b = b.wrapping_add(self.b_stride);
            }
            for (r, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    simd.store(sum, &mut *self.c.add(r * self.c_stride + v * LANES).cast());
                }
            }
        }
        V
    }
}

/// `mixed[row] += Σ weights[row][k] values[k]` over the k that each row sees, for a whole tile of rows. What a row does
/// not see is neither read into its sum nor multiplied by zero, so it may be anything.
pub(super) struct Mixture<'a, E> {
    pub(super) seen: &'a [Range<usize>; TILE_ROWS],
    pub(super) weights: Left<'a>,
    pub(super) values: Right<'a, E>,
    /// Rows of whole vectors.
    pub(super) mixed: &'a mut [f32],
}

impl<E: Element> Kernel for Mixture<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { seen, weights, values, mixed } = self;
        let columns = values.vectors * LANES;
        let end = seen.iter().filter(|seen| !seen.is_empty()).map(|seen| seen.end).max().unwrap_or(0);
        if end == 0 {
            return;
        }
        assert!(mixed.len() >= TILE_ROWS * columns);
        assert!(weights.data.len() > (TILE_ROWS - 1) * weights.row_stride + (end - 1) * weights.k_stride);
        assert!(values.data.len() >= (end - 1) * values.stride + columns);
        let bounds = (seen.iter().map(|seen| seen.start).max(), seen.iter().map(|seen| seen.end).min());
        let common = match bounds {
            (Some(start), Some(end)) if start < end => start..end,
            _ => end..end,
        };
        let mut vector = 0;
        while vector < values.vectors {
            // SAFETY: the asserts above cover all rows and columns, and every k up to the last that a row sees.
            vector += unsafe {
                let tile = MixtureTile {
                    seen,
                    common: common.clone(),
                    weights: weights.data.as_ptr(),
                    weight_strides: [weights.row_stride, weights.k_stride],
                    values: values.data.as_ptr().add(vector * LANES),
                    value_stride: values.stride,
                    mixed: mixed.as_mut_ptr().add(vector * LANES),
                    mixed_stride: columns,
                };
                match values.vectors - vector {
                    2.. => tile.run::<S, 2>(simd),
                    _ => tile.run::<S, 1>(simd),
                }
            };
        }
    }
}

/// Some columns of a [`Mixture`].
struct MixtureTile<'a, E> {
    seen: &'a [Range<usize>; TILE_ROWS],
    /// What all rows see.
    common: Range<usize>,
    weights: *const f32,
    weight_strides: [usize; 2],
    values: *const E,
    value_stride: usize,
    mixed: *mut f32,
    mixed_stride: usize,
}

impl<E: Element> MixtureTile<'_, E> {
    /// Computes V vectors of columns; returns V.
    ///
    /// # Safety
    /// All rows, V vectors and the k of `around` must lie inside the slices.
    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self, simd: S) -> usize {
        // What rows do not see in common goes row by row, before and after.
        for (row, seen) in self.seen.iter().enumerate() {
            // SAFETY: handed on.
            unsafe { self.add::<S, 1, V>(simd, row, seen.start..seen.end.min(self.common.start)) };
        }
        // SAFETY: handed on.
        unsafe { self.add::<S, TILE_ROWS, V>(simd, 0, self.common.clone()) };
        for (row, seen) in self.seen.iter().enumerate() {
            // SAFETY: handed on.
            unsafe { self.add::<S, 1, V>(simd, row, seen.start.max(self.common.end)..seen.end) };
        }
        V
    }

    /// Adds the products of some k to R rows from `first` on.
    ///
    /// # Safety
    /// As [`MixtureTile::run`].
    #[inline(always)]
    unsafe fn add<S: Simd, const R: usize, const V: usize>(&self, simd: S, first: usize, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let [row_stride, k_stride] = self.weight_strides;
        // SAFETY: the caller's promise: these rows, columns and k lie inside the slices.
        unsafe {
            let tile = Tile {
                a: self.weights.add(first * row_stride + range.start * k_stride),
                a_strides: self.weight_strides,
                b: self.values.add(range.start * self.value_stride),
                b_stride: self.value_stride,
                c: self.mixed.add(first * self.mixed_stride),
                c_stride: self.mixed_stride,
                depth: range.len(),
                accumulate: true,
            };
            tile.run::<S, R, V>(simd);
        }
    }
}
