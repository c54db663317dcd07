//! RMSNorm (Zhang and Sennrich 2019).

use super::rows_of;
use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::memory::Buffer;
use moebius_kernels::norm;

/// x / sqrt(mean(x²) + eps) * weight, row by row.
///
/// # Shapes
/// x `[tokens, hidden]`, weight `[hidden]`, result as x.
pub fn rms_norm<'p>(g: &Graph<'p>, x: &Var, weight: &'p Param, eps: f32) -> Result<Var, TensorError> {
    let [hidden] = weight.value().dims()?;
    let rows = rows_of("rms_norm input", x, hidden)?;
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
    }
}
