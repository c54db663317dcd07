//! x + b, the bias the same in every row.

use super::rows_of;
use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::memory::Buffer;
use moebius_kernels::select;

/// Adds a bias to every row.
///
/// # Shapes
/// x and result `[tokens, width]`, bias `[width]`.
pub fn add_bias<'p>(g: &Graph<'p>, x: &Var, bias: &'p Param) -> Result<Var, TensorError> {
    let [width] = bias.dims()?;
    let rows = rows_of("add_bias input", x, width)?;
    let mut y = Buffer::from_slice(x.data());
    y.chunks_exact_mut(width.max(1)).for_each(|row| select::add_assign(row, bias.value().data()));
    let to_x = x.place();
    Ok(g.record(Tensor::new(&[rows, width], y), move |dy, back| {
        // Row after row: one order, whatever the threads.
        let sum = back.weight_sum(bias);
        dy.chunks_exact(width.max(1)).for_each(|row| select::add_assign(sum, row));
        back.give(to_x, dy);
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients_with_params, random};

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients_with_params(&[random(&[4, 6], 1)], &[random(&[6], 2)], |g, x, w| {
            add_bias(g, &x[0], &w[0]).unwrap()
        });
    }
}
