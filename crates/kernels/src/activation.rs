//! Pointwise and row-wise non-linearities: SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer"), softmax, exp.
//!
//! Legend: `rows` tokens or assignments, `f` the width of the feed-forward layer.

use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::math::{self, largest, sigmoid, sum_of_products};
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::{for_each_block, rows as rows_of, rows_mut};

/// `out = silu(gate) * up`, where a row of `gate_up` holds the `f` gates, then the `f` ups.
///
/// # Shapes
/// `gate_up` `[rows, 2 f]`, `out` `[rows, f]`.
pub fn swiglu(gate_up: &[f32], f: usize, out: &mut [f32]) {
    swiglu_on(Isa::current(), gate_up, f, out);
}

fn swiglu_on(isa: Isa, gate_up: &[f32], f: usize, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len());
    let rows = out.len() / f.max(1);
    assert_eq!(out.len(), rows * f);
    let out = DisjointMut::new(out);
    for_each_block(rows, 2 * f, |rows| {
        // SAFETY: blocks of rows are disjoint.
        dispatch(isa, Swiglu { gate_up: rows_of(gate_up, &rows, 2 * f), f, out: unsafe { rows_mut(&out, &rows, f) } });
    });
}

struct Swiglu<'a> {
    gate_up: &'a [f32],
    f: usize,
    out: &'a mut [f32],
}

impl Kernel for Swiglu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (gate_up, out) in self.gate_up.chunks_exact(2 * self.f).zip(self.out.chunks_exact_mut(self.f)) {
            let (gate, up) = gate_up.split_at(self.f);
            for ((gate, up), out) in gate.chunks(LANES).zip(up.chunks(LANES)).zip(out.chunks_mut(LANES)) {
                let gate = Lanes::load_any(simd, gate, 0.0);
                (gate * sigmoid(gate) * Lanes::load_any(simd, up, 0.0)).store_any(out);
            }
        }
    }
}

/// The gradient of [`swiglu`]; overwrites `dgate_up`.
///
/// # Shapes
/// `dout` `[rows, f]`, `gate_up`, `dgate_up` `[rows, 2 f]`.
pub fn swiglu_backward(dout: &[f32], gate_up: &[f32], f: usize, dgate_up: &mut [f32]) {
    swiglu_backward_on(Isa::current(), dout, gate_up, f, dgate_up);
}

fn swiglu_backward_on(isa: Isa, dout: &[f32], gate_up: &[f32], f: usize, dgate_up: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * dout.len());
    assert_eq!(gate_up.len(), dgate_up.len());
    let rows = dout.len() / f.max(1);
    assert_eq!(dout.len(), rows * f);
    let dgate_up = DisjointMut::new(dgate_up);
    for_each_block(rows, 3 * f, |rows| {
        // SAFETY: blocks of rows are disjoint.
        let dgate_up = unsafe { rows_mut(&dgate_up, &rows, 2 * f) };
        let (dout, gate_up) = (rows_of(dout, &rows, f), rows_of(gate_up, &rows, 2 * f));
        dispatch(isa, SwigluBackward { dout, gate_up, f, dgate_up });
    });
}

struct SwigluBackward<'a> {
    dout: &'a [f32],
    gate_up: &'a [f32],
    f: usize,
    dgate_up: &'a mut [f32],
}

impl Kernel for SwigluBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { dout, gate_up, f, dgate_up } = self;
        let one = Lanes::splat(simd, 1.0);
        let rows = dout.chunks_exact(f).zip(gate_up.chunks_exact(2 * f)).zip(dgate_up.chunks_exact_mut(2 * f));
        for ((dout, gate_up), dgate_up) in rows {
            let (gate, up) = gate_up.split_at(f);
            let (dgate, dup) = dgate_up.split_at_mut(f);
            let inputs = dout.chunks(LANES).zip(gate.chunks(LANES)).zip(up.chunks(LANES));
            let outputs = dgate.chunks_mut(LANES).zip(dup.chunks_mut(LANES));
            for (((dout, gate), up), (dgate, dup)) in inputs.zip(outputs) {
                let gate = Lanes::load_any(simd, gate, 0.0);
                let open = sigmoid(gate);
                let slope = Lanes::load_any(simd, dout, 0.0) * open;
                (slope * Lanes::load_any(simd, up, 0.0) * gate.fma(one - open, one)).store_any(dgate);
                (slope * gate).store_any(dup);
            }
        }
    }
}

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

/// The plain loop that [`swiglu`] is compared with.
pub fn swiglu_reference(gate_up: &[f32], f: usize, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len());
    for (gate_up, out) in gate_up.chunks_exact(2 * f).zip(out.chunks_exact_mut(f)) {
        let (gate, up) = gate_up.split_at(f);
        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + (-gate).exp()) * up;
        }
    }
}

/// The plain loop that [`swiglu_backward`] is compared with.
pub fn swiglu_backward_reference(dout: &[f32], gate_up: &[f32], f: usize, dgate_up: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * dout.len());
    assert_eq!(gate_up.len(), dgate_up.len());
    let rows = dout.chunks_exact(f).zip(gate_up.chunks_exact(2 * f)).zip(dgate_up.chunks_exact_mut(2 * f));
    for ((dout, gate_up), dgate_up) in rows {
        let (gate, up) = gate_up.split_at(f);
        let (dgate, dup) = dgate_up.split_at_mut(f);
        for i in 0..f {
            let sigmoid = 1.0 / (1.0 + (-gate[i]).exp());
            dgate[i] = dout[i] * up[i] * sigmoid * (1.0 + gate[i] * (1.0 - sigmoid));
            dup[i] = dout[i] * gate[i] * sigmoid;
        }
    }
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
    fn swiglu_is_the_reference() {
        for (rows, f) in [(0, 3), (1, 1), (3, 15), (4, 16), (9, 33), (70, 512)] {
            let (gate_up, dout) = (wide(1, 2 * rows * f), wide(2, rows * f));
            let (mut out, mut dgate_up) = (vec![0.0; rows * f], vec![0.0; 2 * rows * f]);
            swiglu_reference(&gate_up, f, &mut out);
            swiglu_backward_reference(&dout, &gate_up, f, &mut dgate_up);
            check(&[out, dgate_up], 2e-6, |isa| {
                let (mut out, mut dgate_up) = (vec![0.0; rows * f], vec![f32::NAN; 2 * rows * f]);
                swiglu_on(isa, &gate_up, f, &mut out);
                swiglu_backward_on(isa, &dout, &gate_up, f, &mut dgate_up);
                vec![out, dgate_up]
            });
        }
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
