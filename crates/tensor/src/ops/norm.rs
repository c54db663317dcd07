//! RMSNorm (Zhang and Sennrich 2019).

use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::memory::Buffer;
use moebius_kernels::norm;

/// x / sqrt(mean(x²) + eps) * weight, row by row; rows longer than the weight are normed in parts of its length, as
/// heads are.
///
/// # Shapes
/// x `[tokens, parts * hidden]`, weight `[hidden]`, result as x.
pub fn rms_norm<'p>(g: &Graph<'p>, x: &Var, weight: &'p Param, eps: f32) -> Result<Var, TensorError> {
    let [hidden] = weight.value().dims()?;
    let [tokens, width] = x.dims()?;
    if !width.is_multiple_of(hidden.max(1)) {
        let (wanted, found) = (vec![tokens, hidden], x.shape().to_vec());
        return Err(TensorError::Shape { what: "rms_norm input", wanted, found });
    }
    let rows = tokens * width / hidden.max(1);
    let (mut y, mut inv_rms) = (Buffer::scratch(rows * hidden), Buffer::scratch(rows));
    norm::rms_norm(x.data(), weight.value().data(), eps, &mut y, &mut inv_rms);
    let input = x.clone();
    Ok(g.record(Tensor::new(x.shape(), y), move |dy, back| {
        // The kernel adds to both gradients at once; the weight's, a single row, is added by way of a row of its own.
        let mut dweight = Buffer::zeroed(hidden);
        let mut unwanted;
        let dx = match back.sum_of(&input) {
            Some(dx) => dx,
            None => {
                unwanted = Buffer::zeroed(rows * hidden);
                &mut unwanted
            }
        };
        norm::rms_norm_backward(&dy, input.data(), weight.value().data(), &inv_rms, dx, &mut dweight);
        moebius_kernels::select::add_assign(back.weight_sum(weight), &dweight);
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients_with_params, random};

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients_with_params(&[random(&[4, 6], 1)], &[random(&[6], 2)], |g, x, w| {
            rms_norm(g, &x[0], &w[0], 1e-5).unwrap()
        });
        // Three heads of two.
        check_gradients_with_params(&[random(&[4, 6], 1)], &[random(&[2], 2)], |g, x, w| {
            rms_norm(g, &x[0], &w[0], 1e-5).unwrap()
        });
    }

    #[test]
    fn a_head_is_normed_as_a_row_of_its_own() {
        let (x, weight) = (random(&[4, 6], 1), Param::new(0, "w", random(&[2], 2)));
        let g = Graph::inference(moebius_kernels::gemm::Precision::F32);
        let norm = |x: &Tensor| rms_norm(&g, &Var::constant(x.clone()), &weight, 1e-5).unwrap();
        assert_eq!(norm(&x).data(), norm(&x.reshape(&[12, 2])).data());
        assert!(rms_norm(&g, &Var::constant(x.reshape(&[8, 3])), &weight, 1e-5).is_err());
    }
}
