//! y = x Wᵀ.

use super::rows_of;
use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::gemm::{Mat, Precision, matmul_packed};
use moebius_kernels::memory::Buffer;

/// x Wᵀ in the graph's precision.
///
/// # Shapes
/// x `[tokens, in]`, weight `[out, in]`, result `[tokens, out]`.
pub fn linear<'p>(g: &Graph<'p>, x: &Var, weight: &'p Param) -> Result<Var, TensorError> {
    linear_in(g, g.precision(), x, weight)
}

/// As [`linear`], with f32 operands whatever the graph's precision.
pub fn linear_f32<'p>(g: &Graph<'p>, x: &Var, weight: &'p Param) -> Result<Var, TensorError> {
    linear_in(g, Precision::F32, x, weight)
}

/// A router's scores: as [`linear_f32`], unless the graph has its routers in bf16; then operands and scores are rounded,
/// and the gradient passes the rounding as if it were not there.
pub fn router_logits<'p>(g: &Graph<'p>, x: &Var, weight: &'p Param) -> Result<Var, TensorError> {
    let precision = g.router_precision();
    let logits = linear_in(g, precision, x, weight)?;
    if precision == Precision::F32 {
        return Ok(logits);
    }
    let mut rounded = Buffer::from_slice(logits.data());
    precision.round(&mut rounded);
    let place = logits.place();
    Ok(g.record_from(&[&logits], Tensor::new(logits.shape(), rounded), move |dy, back| back.give(place, dy)))
}

fn linear_in<'p>(g: &Graph<'p>, precision: Precision, x: &Var, weight: &'p Param) -> Result<Var, TensorError> {
    let [out, inner] = weight.dims()?;
    let rows = rows_of("linear input", x, inner)?;
    let mut y = Buffer::scratch(rows * out);
    weight.product(precision, x.data(), &mut y);
    if !g.is_recording() {
        return Ok(Var::constant(Tensor::new(&[rows, out], y)));
    }
    weight.check_trainable()?;
    let input = x.clone();
    Ok(g.record(Tensor::new(&[rows, out], y), move |dy, back| {
        let dy = Mat::new(&dy, rows, out);
        if let Some((dx, beta)) = back.of(&input) {
            matmul_packed(dy, &weight.packed_backward(precision)[0], dx, beta);
        }
        let packed = back.packed(precision, input.value(), [rows, inner]);
        let (dw, beta) = back.weight(weight);
        matmul_packed(dy.t(), &packed, dw, beta);
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gradients;
    use crate::ops::testing::{check_gradients_with_params, random};

    #[test]
    fn gradients_match_finite_differences() {
        for rows in [1, 7] {
            check_gradients_with_params(&[random(&[rows, 5], 1)], &[random(&[4, 5], 2)], |g, x, w| {
                linear(g, &x[0], &w[0]).unwrap()
            });
        }
    }

    /// Of two scores nearer than a bf16 can tell, f32 keeps the difference. Gradients are those of
    /// rounded operands.
    #[test]
    fn routers_are_f32_unless_a_comparison_wants_them_rounded() {
        let weight = Param::new(0, "router", Tensor::new(&[2, 2], vec![1.0, 0.0, 1.0, 0.001]));
        let x = Var::constant(Tensor::new(&[1, 2], vec![1.0, 0.501]));
        let f32 = Graph::inference(Precision::Bf16);
        assert_eq!(router_logits(&f32, &x, &weight).unwrap().data(), [1.0, 0.501_f32.mul_add(0.001, 1.0)]);
        let rounding = Graph::inference(Precision::F32).with_routers_in(Precision::Bf16);
        assert_eq!(router_logits(&rounding, &x, &weight).unwrap().data(), [1.0, 1.0]);
        // What comes back is as if the score itself were used: d (l₀ + 2 l₁) / d w = (x, 2 x).
        let (g, mut gradients) = (Graph::training(Precision::F32).with_routers_in(Precision::Bf16), Gradients::new());
        let logits = router_logits(&g, &x, &weight).unwrap();
        g.backward_from(&[(&logits, &[1.0, 2.0])], &mut gradients);
        assert_eq!(gradients.get(0).unwrap(), [1.0, 0.5, 2.0, 1.0]);
    }

    #[test]
    fn no_rows_are_fine() {
        let weight = Param::new(0, "w", random(&[4, 5], 2));
        let y = linear(&Graph::inference(Precision::F32), &Var::constant(Tensor::zeros(&[0, 5])), &weight).unwrap();
        assert_eq!(y.shape(), [0, 4]);
    }
}
