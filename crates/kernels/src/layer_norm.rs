//! Layer normalisation, forward and backward (Ba, Kiros and Hinton 2016, "Layer Normalization").
//!
//! Sums are f64 in one order: no instruction set or thread matters. Legend: `rows` tokens, `width` features of a token.

use crate::parallel::DisjointMut;
use crate::tasks::{for_each_block, rows as rows_of, rows_mut};

/// `y[r] = (x[r] − mean) / sqrt(variance + eps) * weight`; keeps mean and `1 / sqrt(..)` of each row for the backward.
///
/// # Shapes
/// `x`, `y` `[rows, width]`, `weight` `[width]`, `moments` `[rows, 2]`.
pub fn layer_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], moments: &mut [f32]) {
    let (width, rows) = (weight.len(), moments.len() / 2);
    assert_eq!((x.len(), y.len()), (rows * width, rows * width));
    let (y, moments) = (DisjointMut::new(y), DisjointMut::new(moments));
    for_each_block(rows, 8 * width, |block| {
        let x = rows_of(x, &block, width);
        // SAFETY: blocks of rows are disjoint.
        let (y, moments) = unsafe { (rows_mut(&y, &block, width), rows_mut(&moments, &block, 2)) };
        let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(moments.chunks_exact_mut(2));
        for ((x, y), moments) in rows {
            let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
            let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
            let inverse = (1.0 / (variance + f64::from(eps)).sqrt()) as f32;
            let mean = mean as f32;
            for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                *y = (x - mean) * inverse * weight;
            }
            moments.copy_from_slice(&[mean, inverse]);
        }
    });
}

/// Adds the gradients of [`layer_norm`] to `dx` and `dweight`.
///
/// # Shapes
/// `dy`, `x`, `dx` `[rows, width]`, `weight`, `dweight` `[width]`, `moments` `[rows, 2]`.
pub fn layer_norm_backward(
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    moments: &[f32],
    dx: &mut [f32],
    dweight: &mut [f32],
) {
    let width = weight.len();
    assert_eq!((dy.len(), dx.len(), dweight.len()), (x.len(), x.len(), width));
    let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
    for (((dy, x), dx), moments) in rows.zip(moments.chunks_exact(2)) {
        let (mean, inverse) = (moments[0], moments[1]);
        // x̂ = (x − mean) / σ: dx = (g − mean(g) − x̂ mean(g x̂)) / σ, with g = dy * weight.
        let (mut sum, mut dot) = (0.0f64, 0.0f64);
        for ((&dy, &x), &weight) in dy.iter().zip(x).zip(weight) {
            let slope = f64::from(dy * weight);
            sum += slope;
            dot += slope * f64::from((x - mean) * inverse);
        }
        let (sum, dot) = ((sum / width as f64) as f32, (dot / width as f64) as f32);
        for i in 0..width {
            let normed = (x[i] - mean) * inverse;
            dx[i] += (dy[i] * weight[i] - sum - normed * dot) * inverse;
            dweight[i] += dy[i] * normed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, numbers};

    #[test]
    fn on_paper() {
        let (mut y, mut moments) = ([0.0; 4], [0.0; 2]);
        layer_norm(&[1.0, 3.0, 5.0, 7.0], &[1.0, 1.0, 2.0, 1.0], 0.0, &mut y, &mut moments);
        let unit = 1.0 / 5f32.sqrt();
        assert_close("y", &y, &[-3.0 * unit, -unit, 2.0 * unit, 3.0 * unit], 1e-6);
        assert_close("moments", &moments, &[4.0, unit], 1e-6);
    }

    #[test]
    fn gradients_are_the_slopes() {
        let (x, weight, dy) = (numbers(1, 15), numbers(2, 5), numbers(3, 15));
        let value = |x: &[f32], weight: &[f32]| -> f64 {
            let (mut y, mut moments) = (vec![0.0; 15], vec![0.0; 6]);
            layer_norm(x, weight, 1e-3, &mut y, &mut moments);
            y.iter().zip(&dy).map(|(&y, &d)| f64::from(y) * f64::from(d)).sum()
        };
        let (mut y, mut moments) = (vec![0.0; 15], vec![0.0; 6]);
        layer_norm(&x, &weight, 1e-3, &mut y, &mut moments);
        let (mut dx, mut dweight) = (vec![1.0; 15], vec![1.0; 5]);
        layer_norm_backward(&dy, &x, &weight, &moments, &mut dx, &mut dweight);
        let step = 1.0 / 128.0;
        let slope = |up: f64, down: f64| ((up - down) / (2.0 * f64::from(step)) + 1.0) as f32;
        for i in 0..15 {
            let moved = |by: f32| {
                let mut x = x.clone();
                x[i] += by;
                value(&x, &weight)
            };
            assert!((slope(moved(step), moved(-step)) - dx[i]).abs() < 5e-3, "x[{i}]");
        }
        for i in 0..5 {
            let moved = |by: f32| {
                let mut weight = weight.clone();
                weight[i] += by;
                value(&x, &weight)
            };
            assert!((slope(moved(step), moved(-step)) - dweight[i]).abs() < 5e-3, "weight[{i}]");
        }
    }
}
