//! The output projection and the mean cross entropy in one operation.
//!
//! Logits of all tokens at once would be the largest array of a training step (tokens x vocab). Here a chunk of rows at
//! a time is projected, turned into its losses and into its gradient, and used for dX and dW while it is in the cache.
//! So the gradients are made in the forward pass, for a loss gradient of one, and scaled in the backward.

use super::rows_of;
use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::gemm::{Beta, Mat, Precision, grouped_matmul_weight_gradient, matmul_packed};
use moebius_kernels::memory::Buffer;
use moebius_kernels::narrow::Numbers;
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
    linear_cross_entropy_biased(g, x, weight, None, targets)
}

/// As [`linear_cross_entropy`] of x Wᵀ + b.
///
/// # Shapes
/// As [`linear_cross_entropy`]; bias `[vocab]`.
pub fn linear_cross_entropy_biased<'p>(
    g: &Graph<'p>,
    x: &Var,
    weight: &'p Param,
    bias: Option<&'p Param>,
    targets: &[u32],
) -> Result<Var, TensorError> {
    let [vocab, hidden] = weight.dims()?;
    if g.is_recording() {
        weight.check_trainable()?;
    }
    let rows = rows_of("linear_cross_entropy input", x, hidden)?;
    assert_eq!(rows, targets.len(), "a target for each token");
    let precision = g.precision();
    let counted = targets.iter().filter(|&&target| target != IGNORED).count().max(1);
    let mut made = g.is_recording().then(|| (Buffer::scratch(rows * hidden), Buffer::scratch(vocab * hidden)));
    let mut losses = vec![0.0; rows];
    let mut dbias = bias.map(|_| Buffer::zeroed(vocab));
    for first in (0..rows).step_by(CHUNK) {
        let chunk = first..rows.min(first + CHUNK);
        let x_rows = &x.data()[chunk.start * hidden..chunk.end * hidden];
        let x = Mat::new(x_rows, chunk.len(), hidden);
        let mut logits = Buffer::scratch(chunk.len() * vocab);
        weight.product(precision, x_rows, &mut logits);
        if let Some(bias) = bias {
            logits.chunks_exact_mut(vocab).for_each(|row| select::add_assign(row, bias.value().data()));
        }
        let Some((dx, dw)) = &mut made else {
            loss::cross_entropy_rows(&logits, &targets[chunk.clone()], &mut losses[chunk]);
            continue;
        };
        let scale = 1.0 / counted as f32;
        let targets = &targets[chunk.clone()];
        // Products in bf16 round what they read: rounded here, it is read faster. A bias sums what is not rounded.
        let mut rounded = (precision == Precision::Bf16 && bias.is_none()).then(|| Buffer::scratch(logits.len()));
        let room = rounded.as_deref_mut();
        loss::cross_entropy_rows_with_gradient(&mut logits, targets, &mut losses[chunk.clone()], scale, room);
        if let Some(dbias) = &mut dbias {
            logits.chunks_exact(vocab).for_each(|row| select::add_assign(dbias, row));
        }
        let dlogits = rounded.as_deref().map_or(Numbers::F32(&logits), Numbers::Bf16);
        let dlogits = Mat::of(dlogits, chunk.len(), vocab);
        let dx = &mut dx[chunk.start * hidden..chunk.end * hidden];
        matmul_packed(dlogits, &weight.packed_backward(precision)[0], dx, Beta::Overwrite);
        let beta = if first == 0 { Beta::Overwrite } else { Beta::Accumulate };
        grouped_matmul_weight_gradient(precision, dlogits, x, &[0, chunk.len()], dw, beta);
    }
    let mean = losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / counted as f64;
    let Some((mut dx, mut dw)) = made else { return Ok(Var::constant(Tensor::scalar(mean as f32))) };
    let to_x = x.place();
    Ok(g.record(Tensor::scalar(mean as f32), move |dloss, back| {
        if rows == 0 {
            return;
        }
        if dloss[0] != 1.0 {
            select::scale(&mut dx, dloss[0]);
            select::scale(&mut dw, dloss[0]);
            dbias.iter_mut().for_each(|dbias| select::scale(dbias, dloss[0]));
        }
        if let Some((bias, dbias)) = bias.zip(dbias) {
            back.give_weight(bias, dbias);
        }
        back.give(to_x, dx);
        back.give_weight(weight, dw);
    }))
}

/// Mean over rows of −log softmax(logits)`[target]` in nats, of logits that are there already; targets as in
/// [`linear_cross_entropy`], which needs less memory where the logits are a product.
///
/// # Shapes
/// logits `[rows, classes]`, targets `[rows]`, result `[1]`.
pub fn cross_entropy<'p>(g: &Graph<'p>, logits: &Var, targets: &[u32]) -> Result<Var, TensorError> {
    let [rows, _] = logits.dims()?;
    assert_eq!(rows, targets.len(), "a target for each row");
    let counted = targets.iter().filter(|&&target| target != IGNORED).count().max(1);
    let mut losses = vec![0.0; rows];
    loss::cross_entropy_rows(logits.data(), targets, &mut losses);
    let mean = losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / counted as f64;
    let (input, targets) = (logits.clone(), targets.to_vec());
    Ok(g.record_from(&[logits], Tensor::scalar(mean as f32), move |dloss, back| {
        let mut dlogits = Buffer::from_slice(input.data());
        loss::cross_entropy_rows_backward_in_place(&mut dlogits, &targets, dloss[0] / counted as f32);
        back.give(&input, dlogits);
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients, check_gradients_with_params, random};

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients_with_params(&[random(&[5, 4], 1)], &[random(&[7, 4], 2)], |g, x, w| {
            linear_cross_entropy(g, &x[0], &w[0], &[6, 0, IGNORED, 3, 3]).unwrap()
        });
    }

    #[test]
    fn gradients_with_a_bias_match_finite_differences() {
        let weights = [random(&[7, 4], 2), random(&[7], 3)];
        check_gradients_with_params(&[random(&[5, 4], 1)], &weights, |g, x, w| {
            linear_cross_entropy_biased(g, &x[0], &w[0], Some(&w[1]), &[6, 0, IGNORED, 3, 3]).unwrap()
        });
    }

    #[test]
    fn gradients_of_given_logits_match_finite_differences() {
        check_gradients(&[random(&[5, 7], 1)], |g, x| cross_entropy(g, &x[0], &[6, 0, IGNORED, 3, 3]).unwrap());
    }

    #[test]
    fn one_operation_or_two_give_the_same() {
        let (x, targets) = (Var::constant(random(&[700, 12], 1)), (0..700).map(|i| i % 9).collect::<Vec<u32>>());
        let weight = Param::new(0, "head", random(&[9, 12], 2));
        let g = Graph::inference(Precision::F32);
        let fused = linear_cross_entropy(&g, &x, &weight, &targets).unwrap();
        let logits = crate::ops::linear(&g, &x, &weight).unwrap();
        assert_eq!(cross_entropy(&g, &logits, &targets).unwrap().data(), fused.data());
        // The loss is the same bits when the gradient is made along with it.
        let g = Graph::training(Precision::F32);
        assert_eq!(linear_cross_entropy(&g, &x, &weight, &targets).unwrap().data(), fused.data());
    }

    #[test]
    fn nothing_to_predict_costs_nothing() {
        let weight = Param::new(0, "head", random(&[9, 4], 2));
        for targets in [&[][..], &[IGNORED; 3]] {
            let (g, mut gradients) = (Graph::training(Precision::F32), crate::Gradients::new());
            let x = g.variable(random(&[targets.len(), 4], 1));
            let loss = linear_cross_entropy(&g, &x, &weight, targets).unwrap();
            assert_eq!(loss.data(), [0.0]);
            let leaves = g.backward(&loss, &mut gradients);
            assert!(
                leaves
                    .get(&x)
                    .unwrap_or_default()
                    .iter()
                    .chain(gradients.get(0).unwrap_or_default())
                    .all(|&d| d == 0.0)
            );
        }
    }

    #[test]
    fn equal_logits_cost_the_logarithm_of_the_vocabulary() {
        let weight = Param::new(0, "head", Tensor::zeros(&[8, 4]));
        let x = Var::constant(random(&[1030, 4], 1));
        let loss = linear_cross_entropy(&Graph::inference(Precision::Bf16), &x, &weight, &[5; 1030]).unwrap();
        assert!((loss.data()[0] - 8f32.ln()).abs() < 1e-6);
    }
}
