//! Pointwise and row-wise non-linearities: SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer"), softmax, exp.
//!
//! Legend: `rows` tokens or assignments, `f` the width of the feed-forward layer.

/// `out = silu(gate) * up`, where a row of `gate_up` holds the `f` gates, then the `f` ups.
///
/// # Shapes
/// `gate_up` `[rows, 2 f]`, `out` `[rows, f]`.
pub fn swiglu(gate_up: &[f32], f: usize, out: &mut [f32]) {
    swiglu_reference(gate_up, f, out);
}

/// The gradient of [`swiglu`]; overwrites `dgate_up`.
///
/// # Shapes
/// `dout` `[rows, f]`, `gate_up`, `dgate_up` `[rows, 2 f]`.
pub fn swiglu_backward(dout: &[f32], gate_up: &[f32], f: usize, dgate_up: &mut [f32]) {
    swiglu_backward_reference(dout, gate_up, f, dgate_up);
}

/// Softmax of each row of `cols` numbers, in place. A row of `-inf` alone becomes NaN.
///
/// # Shapes
/// `x` `[rows, cols]`.
pub fn softmax_rows(x: &mut [f32], cols: usize) {
    softmax_rows_reference(x, cols);
}

/// The gradient of [`softmax_rows`]: `dx = p * (dp - Σ p dp)`; overwrites `dx`.
///
/// # Shapes
/// `dp`, `p` (the softmax's output), `dx` `[rows, cols]`.
pub fn softmax_rows_backward(dp: &[f32], p: &[f32], cols: usize, dx: &mut [f32]) {
    softmax_rows_backward_reference(dp, p, cols, dx);
}

/// `x = exp(x)` in place.
pub fn exp(x: &mut [f32]) {
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
