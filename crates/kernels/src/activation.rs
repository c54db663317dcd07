//! Pointwise and row-wise non-linearities: softmax, exp.

use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::math::{self, largest, sum_of_products};
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::{for_each_block, rows as rows_of, rows_mut};

/// Softmax of each row of `cols` numbers, in place. A row of `-inf` alone becomes NaN.
///
/// # Shapes
/// `x` `[rows, cols]`.
pub fn softmax_rows(x: &mut [f32], cols: usize) {
    softmax_rows_on(Isa::current(), x, cols);
}

fn softmax_rows_on(isa: Isa, x: &mut [f32], cols: usize) {
    let rows = x.len() / cols.max(1);
    assert_eq!(x.len(), rows * cols);
    let x = DisjointMut::new(x);
    for_each_block(rows, 2 * cols + 16, |rows| {
        // SAFETY: blocks of rows are disjoint.
        dispatch(isa, Softmax { x: unsafe { rows_mut(&x, &rows, cols) }, cols });
    });
}

struct Softmax<'a> {
    x: &'a mut [f32],
    cols: usize,
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for row in self.x.chunks_exact_mut(self.cols) {
            let top = Lanes::splat(simd, largest(simd, row));
            let mut sum = Lanes::splat(simd, 0.0);
            for x in row.chunks_mut(LANES) {
                let e = math::exp_nonpositive(Lanes::load_any(simd, x, f32::NEG_INFINITY) - top);
                e.store_any(x);
                sum = sum + e;
            }
            let sum = Lanes::splat(simd, sum.sum());
            for x in row.chunks_mut(LANES) {
                (Lanes::load_any(simd, x, 0.0) / sum).store_any(x);
            }
        }
    }
}

/// The gradient of [`softmax_rows`]: `dx = p * (dp - Σ p dp)`; overwrites `dx`.
///
/// # Shapes
/// `dp`, `p` (the softmax's output), `dx` `[rows, cols]`.
pub fn softmax_rows_backward(dp: &[f32], p: &[f32], cols: usize, dx: &mut [f32]) {
    softmax_rows_backward_on(Isa::current(), dp, p, cols, dx);
}

fn softmax_rows_backward_on(isa: Isa, dp: &[f32], p: &[f32], cols: usize, dx: &mut [f32]) {
    let rows = dx.len() / cols.max(1);
    assert!([dp.len(), p.len(), dx.len()].iter().all(|&len| len == rows * cols));
    let dx = DisjointMut::new(dx);
    for_each_block(rows, 2 * cols, |rows| {
        // SAFETY: blocks of rows are disjoint.
        let dx = unsafe { rows_mut(&dx, &rows, cols) };
        dispatch(isa, SoftmaxBackward { dp: rows_of(dp, &rows, cols), p: rows_of(p, &rows, cols), cols, dx });
    });
}

struct SoftmaxBackward<'a> {
    dp: &'a [f32],
    p: &'a [f32],
    cols: usize,
    dx: &'a mut [f32],
}

impl Kernel for SoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let rows = self.dp.chunks_exact(self.cols).zip(self.p.chunks_exact(self.cols));
        for ((dp, p), dx) in rows.zip(self.dx.chunks_exact_mut(self.cols)) {
            let mean = Lanes::splat(simd, sum_of_products(simd, dp, p));
            for ((dp, p), dx) in dp.chunks(LANES).zip(p.chunks(LANES)).zip(dx.chunks_mut(LANES)) {
                let (dp, p) = (Lanes::load_any(simd, dp, 0.0), Lanes::load_any(simd, p, 0.0));
                (p * (dp - mean)).store_any(dx);
            }
        }
    }
}

/// `x = exp(x)` in place: relative error at most 1.2e-7, subnormal results and infinity where they belong.
pub fn exp(x: &mut [f32]) {
    exp_on(Isa::current(), x);
}

fn exp_on(isa: Isa, x: &mut [f32]) {
    let len = x.len();
    let x = DisjointMut::new(x);
    // SAFETY: blocks are disjoint.
    for_each_block(len, 1, |block| dispatch(isa, Exp(unsafe { x.range(block) })));
}

struct Exp<'a>(&'a mut [f32]);

impl Kernel for Exp<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for x in self.0.chunks_mut(LANES) {
            math::exp(Lanes::load_any(simd, x, 0.0)).store_any(x);
        }
    }
}

/// The plain loop that [`exp`] is compared with.
pub fn exp_reference(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = v.exp());
}

/// The plain loop that [`softmax_rows`] is compared with.
pub fn softmax_rows_reference(x: &mut [f32], cols: usize) {
    for row in x.chunks_exact_mut(cols) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|v| *v = (*v - max).exp());
        let sum: f64 = row.iter().map(|&v| f64::from(v)).sum();
        row.iter_mut().for_each(|v| *v /= sum as f32);
    }
}

/// The plain loop that [`softmax_rows_backward`] is compared with.
pub fn softmax_rows_backward_reference(dp: &[f32], p: &[f32], cols: usize, dx: &mut [f32]) {
    assert_eq!(dp.len(), p.len());
    assert_eq!(dp.len(), dx.len());
    for ((dp, p), dx) in dp.chunks_exact(cols).zip(p.chunks_exact(cols)).zip(dx.chunks_exact_mut(cols)) {
        let dot: f64 = dp.iter().zip(p).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        for i in 0..cols {
            dx[i] = p[i] * (dp[i] - dot as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, numbers};

    fn wide(seed: u64, count: usize) -> Vec<f32> {
        // A view that begins one number late is not aligned.
        numbers(seed, count + 1)[1..].iter().map(|x| 12.0 * x).collect()
    }

    #[test]
    fn softmax_is_the_reference() {
        for (rows, cols) in [(0, 3), (5, 1), (7, 8), (4, 17), (3, 100), (300, 64)] {
            let (x, dp) = (wide(1, rows * cols), wide(2, rows * cols));
            let (mut p, mut dx) = (x.clone(), vec![0.0; rows * cols]);
            softmax_rows_reference(&mut p, cols);
            softmax_rows_backward_reference(&dp, &p, cols, &mut dx);
            check(&[p, dx], 3e-6, |isa| {
                let (mut p, mut dx) = (x.clone(), vec![f32::NAN; rows * cols]);
                softmax_rows_on(isa, &mut p, cols);
                softmax_rows_backward_on(isa, &dp, &p, cols, &mut dx);
                vec![p, dx]
            });
        }
    }

    #[test]
    fn softmax_of_minus_infinity_is_zero_and_of_nothing_else_is_nan() {
        for isa in Isa::available() {
            let mut x = [f32::NEG_INFINITY, 1.0, 1.0];
            softmax_rows_on(isa, &mut x, 3);
            assert_eq!(x, [0.0, 0.5, 0.5]);
            let mut x = [f32::NEG_INFINITY; 2];
            softmax_rows_on(isa, &mut x, 2);
            assert!(x.iter().all(|x| x.is_nan()));
        }
    }

    #[test]
    fn exp_is_the_reference() {
        for len in [0, 1, 15, 16, 17, 1000, 40_001] {
            let x = wide(1, len);
            let mut reference = x.clone();
            exp_reference(&mut reference);
            check(&[reference], 2e-7, |isa| {
                let mut x = x.clone();
                exp_on(isa, &mut x);
                vec![x]
            });
        }
    }
}
