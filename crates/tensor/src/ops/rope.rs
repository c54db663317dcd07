//! Rotary position embedding (Su et al. 2021), half-split as Llama and Mixtral store it.

use super::rows_of;
use crate::{Graph, TensorError, Var};
use moebius_kernels::rope::{RopeTable, rope as rotate};
use std::sync::Arc;

/// Rotates each head's pairs by the token's position: in place, if nobody else holds x.
///
/// # Shapes
/// x `[tokens, heads * head_dim]`, positions `[tokens]`, result as x.
pub fn rope<'p>(
    g: &Graph<'p>,
    x: Var,
    heads: usize,
    head_dim: usize,
    positions: &[u32],
    table: &Arc<RopeTable>,
) -> Result<Var, TensorError> {
    let rows = rows_of("rope input", &x, heads * head_dim)?;
    assert_eq!(rows, positions.len(), "a position for each token");
    let to_x = x.place();
    let mut y = x.into_value();
    rotate(y.data_mut(), heads, head_dim, positions, table, false);
    let (positions, table) = (positions.to_vec(), table.clone());
    Ok(g.record_from_places(&[to_x], y, move |mut dy, back| {
        // A rotation's transpose is the rotation back.
        rotate(&mut dy, heads, head_dim, &positions, &table, true);
        back.give(to_x, dy);
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients, random};

    #[test]
    fn gradients_match_finite_differences() {
        let table = Arc::new(RopeTable::new(100.0, 4, 16));
        check_gradients(&[random(&[3, 8], 1)], |g, x| rope(g, x[0].clone(), 2, 4, &[0, 7, 15], &table).unwrap());
    }
}
