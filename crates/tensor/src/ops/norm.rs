//! RMSNorm (Zhang and Sennrich 2019), layer normalisation (Ba et al. 2016), and rows divided by their length.

use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::memory::Buffer;
use moebius_kernels::{layer_norm, norm};

/// x / sqrt(mean(x²) + eps) * weight, row by row; rows longer than the weight are normed in parts of its length, as
/// heads are.
///
/// # Shapes
/// x `[tokens, parts * hidden]`, weight `[hidden]`, result as x.
pub fn rms_norm<'p>(g: &Graph<'p>, x: &Var, weight: &'p Param, eps: f32) -> Result<Var, TensorError> {
    rms_norm_plus(g, x, weight, 0.0, eps)
}

/// As [`rms_norm`], with `offset` added to the weight: 1 where weights are held by their distance from one (Gemma, Qwen3-Next).
pub fn rms_norm_plus<'p>(g: &Graph<'p>, x: &Var, weight: &'p Param, offset: f32, eps: f32) -> Result<Var, TensorError> {
    let [hidden] = weight.value().dims()?;
    let [tokens, width] = x.dims()?;
    if !width.is_multiple_of(hidden.max(1)) {
        let (wanted, found) = (vec![tokens, hidden], x.shape().to_vec());
        return Err(TensorError::Shape { what: "rms_norm input", wanted, found });
    }
    let rows = tokens * width / hidden.max(1);
    let (mut y, mut inv_rms) = (Buffer::scratch(rows * hidden), Buffer::scratch(rows));
    let factors = if offset == 0.0 {
        weight.value().clone()
    } else {
        Tensor::new(&[hidden], weight.value().data().iter().map(|w| w + offset).collect::<Buffer<f32>>())
    };
    norm::rms_norm(x.data(), factors.data(), eps, &mut y, &mut inv_rms);
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
        norm::rms_norm_backward(&dy, input.data(), factors.data(), &inv_rms, dx, &mut dweight);
        moebius_kernels::select::add_assign(back.weight_sum(weight), &dweight);
    }))
}

/// As [`rms_norm`] in parts of `part` features, without a weight.
///
/// # Shapes
/// x `[tokens, parts * part]`, result as x.
pub fn unit_rms_norm<'p>(g: &Graph<'p>, x: &Var, part: usize, eps: f32) -> Result<Var, TensorError> {
    let [tokens, width] = x.dims()?;
    if !width.is_multiple_of(part.max(1)) {
        let (wanted, found) = (vec![tokens, part], x.shape().to_vec());
        return Err(TensorError::Shape { what: "unit_rms_norm input", wanted, found });
    }
    let (ones, rows) = (vec![1.0; part], tokens * width / part.max(1));
    let (mut y, mut inv_rms) = (Buffer::scratch(rows * part), Buffer::scratch(rows));
    norm::rms_norm(x.data(), &ones, eps, &mut y, &mut inv_rms);
    let input = x.clone();
    Ok(g.record_from(&[x], Tensor::new(x.shape(), y), move |dy, back| {
        let Some(dx) = back.sum_of(&input) else { return };
        norm::rms_norm_backward(&dy, input.data(), &ones, &inv_rms, dx, &mut vec![0.0; part]);
    }))
}

/// (x − mean) / sqrt(variance + eps) * weight, row by row (Ba et al. 2016).
///
/// # Shapes
/// x and result `[tokens, hidden]`, weight `[hidden]`.
pub fn layer_norm<'p>(g: &Graph<'p>, x: &Var, weight: &'p Param, eps: f32) -> Result<Var, TensorError> {
    let [hidden] = weight.dims()?;
    let rows = super::rows_of("layer_norm input", x, hidden)?;
    let (mut y, mut moments) = (Buffer::scratch(rows * hidden), Buffer::scratch(2 * rows));
    layer_norm::layer_norm(x.data(), weight.value().data(), eps, &mut y, &mut moments);
    let input = x.clone();
    Ok(g.record(Tensor::new(x.shape(), y), move |dy, back| {
        let (mut dx, mut dweight) = (Buffer::zeroed(rows * hidden), Buffer::zeroed(hidden));
        let weights = weight.value().data();
        layer_norm::layer_norm_backward(&dy, input.data(), weights, &moments, &mut dx, &mut dweight);
        back.give(&input, dx);
        moebius_kernels::select::add_assign(back.weight_sum(weight), &dweight);
    }))
}

/// factor * x / sqrt(Σ x² + eps) of each head.
///
/// # Shapes
/// x and result `[tokens, heads * head_dim]`.
pub fn l2_norm<'p>(g: &Graph<'p>, x: &Var, head_dim: usize, factor: f32, eps: f32) -> Result<Var, TensorError> {
    let [tokens, width] = x.dims()?;
    if !width.is_multiple_of(head_dim.max(1)) {
        let (wanted, found) = (vec![tokens, head_dim], x.shape().to_vec());
        return Err(TensorError::Shape { what: "l2_norm input", wanted, found });
    }
    // The root of the mean square is the length over sqrt(head_dim).
    let width = head_dim as f32;
    let weight = Tensor::new(&[head_dim], vec![factor / width.sqrt(); head_dim]);
    let heads = x.data().len() / head_dim.max(1);
    let (mut y, mut inv_rms) = (Buffer::scratch(x.data().len()), Buffer::scratch(heads));
    norm::rms_norm(x.data(), weight.data(), eps / width, &mut y, &mut inv_rms);
    let input = x.clone();
    Ok(g.record_from(&[x], Tensor::new(x.shape(), y), move |dy, back| {
        let Some(dx) = back.sum_of(&input) else { return };
        let mut unwanted = Buffer::zeroed(head_dim);
        norm::rms_norm_backward(&dy, input.data(), weight.data(), &inv_rms, dx, &mut unwanted);
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
    fn gradients_of_the_others_match_finite_differences() {
        check_gradients_with_params(&[random(&[4, 6], 1)], &[random(&[6], 2)], |g, x, w| {
            layer_norm(g, &unit_rms_norm(g, &x[0], 3, 1e-5).unwrap(), &w[0], 1e-5).unwrap()
        });
    }

    #[test]
    fn gradients_of_the_other_norms_match_finite_differences() {
        check_gradients_with_params(&[random(&[4, 6], 1)], &[random(&[6], 2)], |g, x, w| {
            rms_norm_plus(g, &x[0], &w[0], 1.0, 1e-5).unwrap()
        });
        crate::ops::testing::check_gradients(&[random(&[4, 6], 1)], |g, x| l2_norm(g, &x[0], 3, 0.5, 1e-6).unwrap());
    }

    #[test]
    fn a_head_of_length_five_on_paper() {
        let g = Graph::inference(moebius_kernels::gemm::Precision::F32);
        let x = Var::constant(Tensor::new(&[1, 4], vec![3.0, 4.0, 0.0, -2.0]));
        for (found, wanted) in l2_norm(&g, &x, 2, 10.0, 0.0).unwrap().data().iter().zip([6.0, 8.0, 0.0, -10.0]) {
            assert!((found - wanted).abs() < 1e-5, "{found} {wanted}");
        }
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
