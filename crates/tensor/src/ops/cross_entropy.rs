//! The output projection and the mean cross entropy in one operation.
//!
//! Logits of all tokens at once would be the largest array of a training step (tokens x vocab). Here a chunk of rows at
//! a time is projected, turned into its losses and into its gradient, and used for dX and dW while it is in the cache.
//! So the gradients are made in the forward pass, for a loss gradient of one, and scaled in the backward.

use super::rows_of;
use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::gemm::{Beta, Mat, grouped_matmul_weight_gradient, matmul_packed};
use moebius_kernels::memory::Buffer;
use moebius_kernels::{loss, select};

/// Rows projected at a time: a constant, so that sums over rows have one order.
const CHUNK: usize = 512;
/// The target that counts for nothing.
pub(crate) const IGNORED: u32 = u32::MAX;

/// Mean over tokens of −log softmax(x Wᵀ)`[target]` in nats; targets of `u32::MAX` are left out (and their number from
/// the mean). Zero when none is left.
///
/// # Shapes
/// x `[tokens, hidden]`, weight `[vocab, hidden]`, targets `[tokens]`, result `[1]`.
pub fn linear_cross_entropy<'p>(
    g: &Graph<'p>,
    x: &Var,
    weight: &'p Param,
    targets: &[u32],
) -> Result<Var, TensorError> {
    let [vocab, hidden] = weight.value().dims()?;
    let rows = rows_of("linear_cross_entropy input", x, hidden)?;
    assert_eq!(rows, targets.len(), "a target for each token");
    let precision = g.precision();
    let counted = targets.iter().filter(|&&target| target != IGNORED).count().max(1);
    let mut made = g.is_recording().then(|| (Buffer::scratch(rows * hidden), Buffer::scratch(vocab * hidden)));
    let mut losses = vec![0.0; rows];
    for first in (0..rows).step_by(CHUNK) {
        let chunk = first..rows.min(first + CHUNK);
        let x = Mat::new(&x.data()[chunk.start * hidden..chunk.end * hidden], chunk.len(), hidden);
        let mut logits = Buffer::scratch(chunk.len() * vocab);
        matmul_packed(x, &weight.packed_forward(precision)[0], &mut logits, Beta::Overwrite);
        let Some((dx, dw)) = &mut made else {
            loss::cross_entropy_rows(&logits, &targets[chunk.clone()], &mut losses[chunk]);
            continue;
        };
        let scale = 1.0 / counted as f32;
        let targets = &targets[chunk.clone()];
        loss::cross_entropy_rows_with_gradient(&mut logits, targets, &mut losses[chunk.clone()], scale);
        let dlogits = Mat::new(&logits, chunk.len(), vocab);
        let dx = &mut dx[chunk.start * hidden..chunk.end * hidden];
        matmul_packed(dlogits, &weight.packed_backward(precision)[0], dx, Beta::Overwrite);
        let beta = if first == 0 { Beta::Overwrite } else { Beta::Accumulate };
        grouped_matmul_weight_gradient(precision, dlogits, x, &[0, chunk.len()], dw, beta);
    }
    let mean = losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / counted as f64;
    let Some((mut dx, mut dw)) = made else { return Ok(Var::constant(Tensor::scalar(mean as f32))) };
    let input = x.clone();
    Ok(g.record(Tensor::scalar(mean as f32), move |dloss, back| {
        if rows == 0 {
            return;
        }
        if dloss[0] != 1.0 {
            select::scale(&mut dx, dloss[0]);
            select::scale(&mut dw, dloss[0]);
        }
        back.add(&input, &dx);
        match back.weight(weight) {
            (gradient, Beta::Overwrite) => gradient.copy_from_slice(&dw),
            (gradient, Beta::Accumulate) => select::add_assign(gradient, &dw),
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients_with_params, random};
    use moebius_kernels::gemm::Precision;

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients_with_params(&[random(&[5, 4], 1)], &[random(&[7, 4], 2)], |g, x, w| {
            linear_cross_entropy(g, &x[0], &w[0], &[6, 0, IGNORED, 3, 3]).unwrap()
        });
    }

    #[test]
    fn equal_logits_cost_the_logarithm_of_the_vocabulary() {
        let weight = Param::new(0, "head", Tensor::zeros(&[8, 4]));
        let x = Var::constant(random(&[1030, 4], 1));
        let loss = linear_cross_entropy(&Graph::inference(Precision::Bf16), &x, &weight, &[5; 1030]).unwrap();
        assert!((loss.data()[0] - 8f32.ln()).abs() < 1e-6);
    }
}
