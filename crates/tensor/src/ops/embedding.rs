//! Rows of a table by token id.

use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::select;

/// The rows of `table` that `ids` name.
///
/// # Shapes
/// table `[vocab, hidden]`, ids `[tokens]`, result `[tokens, hidden]`.
///
/// # Panics
/// If an id lies outside the table: callers check ids where they enter.
pub fn embedding<'p>(g: &Graph<'p>, ids: &[u32], table: &'p Param) -> Result<Var, TensorError> {
    let [_, hidden] = table.dims()?;
    let rows = Tensor::new(&[ids.len(), hidden], table.rows(ids));
    if !g.is_recording() {
        return Ok(Var::constant(rows));
    }
    table.check_trainable()?;
    let ids = ids.to_vec();
    Ok(g.record(rows, move |dy, back| {
        select::embedding_backward(&dy, hidden, &ids, back.weight_sum(table));
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients_with_params, random};

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients_with_params(&[], &[random(&[6, 3], 1)], |g, _, w| embedding(g, &[5, 0, 5, 2], &w[0]).unwrap());
    }
}
