//! Root-mean-square normalisation, forward and backward (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization").
//!
//! Legend: `rows` tokens, `width` features of a token (the length of the weight).

use crate::isa::Isa;
use crate::memory::Buffer;
use crate::parallel::DisjointMut;
use crate::simd::math::sum_of_products;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::{for_each_block, for_each_block_of, rows as rows_of, rows_mut};

/// Rows whose weight gradients are summed before they meet others': fixed, so that threads do not matter.
const GRADIENT_ROWS: usize = 64;

/// `y[r] = x[r] / sqrt(mean(x[r]²) + eps) * weight`; keeps `1 / sqrt(..)` of each row for the backward.
///
/// # Shapes
/// `x`, `y` `[rows, width]`, `weight` `[width]`, `inv_rms` `[rows]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], inv_rms: &mut [f32]) {
    rms_norm_on(Isa::current(), x, weight, eps, y, inv_rms);
}

fn rms_norm_on(isa: Isa, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], inv_rms: &mut [f32]) {
    let width = weight.len();
    assert_eq!(x.len(), y.len());
    assert_eq!(x.len(), inv_rms.len() * width);
    let rows = inv_rms.len();
    let (y, inv_rms) = (DisjointMut::new(y), DisjointMut::new(inv_rms));
    for_each_block(rows, width, |rows| {
        let x = rows_of(x, &rows, width);
        // SAFETY: blocks of rows are disjoint.
        let (y, inv_rms) = unsafe { (rows_mut(&y, &rows, width), inv_rms.range(rows)) };
        dispatch(isa, Normalise { x, weight, eps, y, inv_rms });
    });
}

struct Normalise<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
    inv_rms: &'a mut [f32],
}

impl Kernel for Normalise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        let rows = self.x.chunks_exact(width).zip(self.y.chunks_exact_mut(width)).zip(self.inv_rms);
        for ((x, y), inv_rms) in rows {
            *inv_rms = 1.0 / (sum_of_products(simd, x, x) / width as f32 + self.eps).sqrt();
            let inv = Lanes::splat(simd, *inv_rms);
            for ((x, y), weight) in x.chunks(LANES).zip(y.chunks_mut(LANES)).zip(self.weight.chunks(LANES)) {
                let x = Lanes::load_any(simd, x, 0.0);
                (x * inv * Lanes::load_any(simd, weight, 0.0)).store_any(y);
            }
        }
    }
}

/// Adds the gradients of [`rms_norm`] to `dx` and `dweight`.
///
/// # Shapes
/// `dy`, `x`, `dx` `[rows, width]`, `weight`, `dweight` `[width]`, `inv_rms` `[rows]`.
pub fn rms_norm_backward(dy: &[f32], x: &[f32], weight: &[f32], inv_rms: &[f32], dx: &mut [f32], dweight: &mut [f32]) {
    rms_norm_backward_on(Isa::current(), [dy, x, weight, inv_rms], dx, dweight);
}

fn rms_norm_backward_on(isa: Isa, [dy, x, weight, inv_rms]: [&[f32]; 4], dx: &mut [f32], dweight: &mut [f32]) {
    let (rows, width) = (inv_rms.len(), weight.len());
    assert!([dy.len(), x.len(), dx.len()].iter().all(|&len| len == rows * width));
    assert_eq!(dweight.len(), width);
    let mut partial = Buffer::<f32>::zeroed(rows.div_ceil(GRADIENT_ROWS) * width);
    {
        let (dx, partial) = (DisjointMut::new(dx), DisjointMut::new(&mut partial));
        for_each_block_of(GRADIENT_ROWS, rows, 2 * width, |rows| {
            let block = rows.start / GRADIENT_ROWS;
            // SAFETY: blocks of rows are disjoint, and each has its own partial sum.
            let (dx, dweight) =
                unsafe { (rows_mut(&dx, &rows, width), rows_mut(&partial, &(block..block + 1), width)) };
            let (dy, x, inv_rms) = (rows_of(dy, &rows, width), rows_of(x, &rows, width), &inv_rms[rows]);
            dispatch(isa, Differentiate { dy, x, weight, inv_rms, dx, dweight });
        });
    }
    for partial in partial.chunks_exact(width) {
        dweight.iter_mut().zip(partial).for_each(|(sum, part)| *sum += part);
    }
}

struct Differentiate<'a> {
    dy: &'a [f32],
    x: &'a [f32],
    weight: &'a [f32],
    inv_rms: &'a [f32],
    dx: &'a mut [f32],
    dweight: &'a mut [f32],
}

impl Kernel for Differentiate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        let load = |from: &[f32]| Lanes::load_any(simd, from, 0.0);
        let rows = self.dy.chunks_exact(width).zip(self.x.chunks_exact(width)).zip(self.dx.chunks_exact_mut(width));
        for (((dy, x), dx), &inv_rms) in rows.zip(self.inv_rms) {
            let inv = Lanes::splat(simd, inv_rms);
            let mut dot = Lanes::splat(simd, 0.0);
            let vectors = dy.chunks(LANES).zip(x.chunks(LANES)).zip(self.weight.chunks(LANES));
            for (((dy, x), weight), dweight) in vectors.zip(self.dweight.chunks_mut(LANES)) {
                let product = load(dy) * load(x);
                dot = product.fma(load(weight), dot);
                product.fma(inv, load(dweight)).store_any(dweight);
            }
            let shrink = Lanes::splat(simd, dot.sum() / width as f32 * inv_rms * inv_rms);
            let vectors = dy.chunks(LANES).zip(x.chunks(LANES)).zip(self.weight.chunks(LANES));
            for (((dy, x), weight), dx) in vectors.zip(dx.chunks_mut(LANES)) {
                let change = load(dy) * load(weight) - load(x) * shrink;
                change.fma(inv, load(dx)).store_any(dx);
            }
        }
    }
}

/// The plain loop that [`rms_norm`] is compared with.
pub fn rms_norm_reference(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], inv_rms: &mut [f32]) {
    let width = weight.len();
    assert_eq!(x.len(), y.len());
    assert_eq!(x.len(), inv_rms.len() * width);
    for ((x, y), inv) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(inv_rms) {
        let squares: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        *inv = (1.0 / (squares / width as f64 + f64::from(eps)).sqrt()) as f32;
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * *inv * w;
        }
    }
}

/// The plain loop that [`rms_norm_backward`] is compared with.
pub fn rms_norm_backward_reference(
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    inv_rms: &[f32],
    dx: &mut [f32],
    dweight: &mut [f32],
) {
    let width = weight.len();
    assert_eq!(dy.len(), x.len());
    assert_eq!(dx.len(), x.len());
    assert_eq!(x.len(), inv_rms.len() * width);
    let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width)).zip(inv_rms);
    for (((dy, x), dx), &inv) in rows {
        let dot: f64 = (0..width).map(|i| f64::from(dy[i] * weight[i]) * f64::from(x[i])).sum();
        let shrink = (dot / width as f64) as f32 * inv * inv;
        for i in 0..width {
            dx[i] += inv * (dy[i] * weight[i] - x[i] * shrink);
            dweight[i] += dy[i] * x[i] * inv;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, numbers};

    #[test]
    fn forward_and_backward_are_the_reference() {
        for (rows, width) in [(0, 5), (1, 1), (3, 7), (65, 16), (130, 33), (70, 256), (5, 1000)] {
            // Views that begin one number late are not aligned.
            let x = &numbers(1, rows * width + 1)[1..];
            let dy = &numbers(2, rows * width + 1)[1..];
            let weight = &numbers(3, width + 1)[1..];
            let (mut y, mut inv) = (vec![0.0; rows * width], vec![0.0; rows]);
            let (mut dx, mut dweight) = (numbers(4, rows * width), numbers(5, width));
            rms_norm_reference(x, weight, 1e-5, &mut y, &mut inv);
            rms_norm_backward_reference(dy, x, weight, &inv, &mut dx, &mut dweight);
            check(&[y.clone(), inv.clone()], 3e-6, |isa| {
                let (mut y, mut inv) = (vec![0.0; rows * width], vec![0.0; rows]);
                rms_norm_on(isa, x, weight, 1e-5, &mut y, &mut inv);
                vec![y, inv]
            });
            check(&[dx, dweight], 1e-5, |isa| {
                let (mut dx, mut dweight) = (numbers(4, rows * width), numbers(5, width));
                rms_norm_backward_on(isa, [dy, x, weight, &inv], &mut dx, &mut dweight);
                vec![dx, dweight]
            });
        }
    }
}
