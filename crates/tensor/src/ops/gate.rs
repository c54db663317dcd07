//! Gates: logistic functions, and rows multiplied with a number each.

use super::rows_of;
use crate::{Graph, Tensor, TensorError, Var};
use moebius_kernels::memory::Buffer;

/// 1 / (1 + exp(−x)) of every element.
pub fn sigmoid<'p>(g: &Graph<'p>, x: &Var) -> Var {
    let output: Buffer<f32> = x.data().iter().map(|&x| 1.0 / (1.0 + (-x).exp())).collect();
    let output = Tensor::new(x.shape(), output);
    let (to_x, y) = (x.place(), output.clone());
    g.record_from(&[x], output, move |mut dy, back| {
        dy.iter_mut().zip(y.data()).for_each(|(d, y)| *d *= y * (1.0 - y));
        back.give(to_x, dy);
    })
}

/// Each row of x times its factor.
///
/// # Shapes
/// x and result `[rows, cols]`, factors `[rows, 1]`.
pub fn scale_rows<'p>(g: &Graph<'p>, x: &Var, factors: &Var) -> Result<Var, TensorError> {
    let [rows, cols] = x.dims()?;
    if rows_of("factors of rows", factors, 1)? != rows {
        let (wanted, found) = (vec![rows, 1], factors.shape().to_vec());
        return Err(TensorError::Shape { what: "factors of rows", wanted, found });
    }
    let scaled = move |x: &[f32], factors: &[f32]| -> Buffer<f32> {
        let mut out = Buffer::from_slice(x);
        for (row, factor) in out.chunks_exact_mut(cols.max(1)).zip(factors) {
            row.iter_mut().for_each(|x| *x *= factor);
        }
        out
    };
    let output = Tensor::new(x.shape(), scaled(x.data(), factors.data()));
    let (input, by) = (x.clone(), factors.clone());
    Ok(g.record_from(&[x, factors], output, move |dy, back| {
        let rows = dy.chunks_exact(cols.max(1)).zip(input.data().chunks_exact(cols.max(1)));
        let dots: Buffer<f32> = rows.map(|(d, x)| d.iter().zip(x).map(|(d, x)| d * x).sum()).collect();
        back.give(&by, dots);
        back.give(&input, scaled(&dy, by.data()));
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients, random};

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients(&[random(&[3, 4], 1), random(&[3, 1], 2)], |g, x| {
            scale_rows(g, &x[0], &sigmoid(g, &x[1])).unwrap()
        });
    }

    #[test]
    fn a_factor_for_each_row() {
        let g = Graph::inference(moebius_kernels::gemm::Precision::F32);
        let (x, factors) = (Var::constant(random(&[3, 4], 1)), Var::constant(random(&[2, 1], 2)));
        let error = scale_rows(&g, &x, &factors).unwrap_err();
        assert_eq!(error.to_string(), "factors of rows: wanted shape [3, 1], found [2, 1]");
    }
}
