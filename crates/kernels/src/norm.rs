//! Root-mean-square normalisation, forward and backward (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization").
//!
//! Legend: `rows` tokens, `width` features of a token (the length of the weight).

/// `y[r] = x[r] / sqrt(mean(x[r]²) + eps) * weight`; keeps `1 / sqrt(..)` of each row for the backward.
///
/// # Shapes
/// `x`, `y` `[rows, width]`, `weight` `[width]`, `inv_rms` `[rows]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], inv_rms: &mut [f32]) {
    rms_norm_reference(x, weight, eps, y, inv_rms);
}

/// Adds the gradients of [`rms_norm`] to `dx` and `dweight`.
///
/// # Shapes
/// `dy`, `x`, `dx` `[rows, width]`, `weight`, `dweight` `[width]`, `inv_rms` `[rows]`.
pub fn rms_norm_backward(dy: &[f32], x: &[f32], weight: &[f32], inv_rms: &[f32], dx: &mut [f32], dweight: &mut [f32]) {
    rms_norm_backward_reference(dy, x, weight, inv_rms, dx, dweight);
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
