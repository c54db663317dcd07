//! y = x Wᵀ.

use super::rows_of;
use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::gemm::{Mat, Precision, grouped_matmul_weight_gradient, matmul_packed};
use moebius_kernels::memory::Buffer;

/// x Wᵀ in the graph's precision.
///
/// # Shapes
/// x `[tokens, in]`, weight `[out, in]`, result `[tokens, out]`.
pub fn linear<'p>(g: &Graph<'p>, x: &Var, weight: &'p Param) -> Result<Var, TensorError> {
    linear_in(g, g.precision(), x, weight)
}

/// As [`linear`], with f32 operands whatever the graph's precision: for routers.
pub fn linear_f32<'p>(g: &Graph<'p>, x: &Var, weight: &'p Param) -> Result<Var, TensorError> {
    linear_in(g, Precision::F32, x, weight)
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
        let (dw, beta) = back.weight(weight);
        grouped_matmul_weight_gradient(precision, dy, Mat::new(input.data(), rows, inner), &[0, rows], dw, beta);
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients_with_params, random};

    #[test]
    fn gradients_match_finite_differences() {
        for rows in [1, 7] {
            check_gradients_with_params(&[random(&[rows, 5], 1)], &[random(&[4, 5], 2)], |g, x, w| {
                linear(g, &x[0], &w[0]).unwrap()
            });
        }
    }

    #[test]
    fn no_rows_are_fine() {
        let weight = Param::new(0, "w", random(&[4, 5], 2));
        let y = linear(&Graph::inference(Precision::F32), &Var::constant(Tensor::zeros(&[0, 5])), &weight).unwrap();
        assert_eq!(y.shape(), [0, 4]);
    }
}
