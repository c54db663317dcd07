//! Columns taken out of rows, and rows put together: for projections that hold several things.

use crate::{Graph, Place, Tensor, TensorError, Var};
use moebius_kernels::memory::Buffer;
use std::ops::Range;

/// The columns `part` of every `period` columns. With the whole width as period: a range of columns; with a head's width:
/// the same features of each head.
///
/// # Shapes
/// x `[tokens, n * period]`, result `[tokens, n * part.len()]`.
pub fn columns<'p>(g: &Graph<'p>, x: &Var, period: usize, part: Range<usize>) -> Result<Var, TensorError> {
    let [tokens, width] = x.dims()?;
    if period == 0 || !width.is_multiple_of(period) || part.start > part.end || part.end > period {
        let (wanted, found) = (vec![tokens, period], x.shape().to_vec());
        return Err(TensorError::Shape { what: "columns", wanted, found });
    }
    let taken = part.len();
    let mut out = Buffer::scratch(tokens * width / period * taken);
    for (from, to) in x.data().chunks_exact(period).zip(out.chunks_exact_mut(taken.max(1))) {
        to.copy_from_slice(&from[part.clone()]);
    }
    let to_x = x.place();
    Ok(g.record_from(&[x], Tensor::new(&[tokens, width / period * taken], out), move |d, back| {
        let Some(dx) = back.sum_of(to_x) else { return };
        for (dx, d) in dx.chunks_exact_mut(period).zip(d.chunks_exact(taken.max(1))) {
            dx[part.clone()].iter_mut().zip(d).for_each(|(dx, d)| *dx += d);
        }
    }))
}

/// Rows side by side.
///
/// # Shapes
/// parts `[tokens, width of each]`, result `[tokens, sum of the widths]`.
pub fn concat_columns<'p>(g: &Graph<'p>, parts: &[&Var]) -> Result<Var, TensorError> {
    let tokens = parts.first().map_or(Ok(0), |part| part.dims().map(|[tokens, _]| tokens))?;
    let mut places: Vec<(Place, Range<usize>)> = Vec::new();
    for part in parts {
        let [rows, width] = part.dims()?;
        if rows != tokens {
            let (wanted, found) = (vec![tokens, width], part.shape().to_vec());
            return Err(TensorError::Shape { what: "concat_columns", wanted, found });
        }
        let first = places.last().map_or(0, |(_, columns)| columns.end);
        places.push((part.place(), first..first + width));
    }
    let width = places.last().map_or(0, |(_, columns)| columns.end);
    let mut out = Buffer::scratch(tokens * width);
    for (part, (_, columns)) in parts.iter().zip(&places) {
        let rows = out.chunks_exact_mut(width.max(1)).zip(part.data().chunks_exact(columns.len().max(1)));
        rows.for_each(|(to, from)| to[columns.clone()].copy_from_slice(from));
    }
    Ok(g.record_from(parts, Tensor::new(&[tokens, width], out), move |d, back| {
        for (place, columns) in places {
            let Some(dx) = back.sum_of(place) else { continue };
            for (dx, d) in dx.chunks_exact_mut(columns.len().max(1)).zip(d.chunks_exact(width.max(1))) {
                dx.iter_mut().zip(&d[columns.clone()]).for_each(|(dx, d)| *dx += d);
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients, random};
    use moebius_kernels::gemm::Precision;

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients(&[random(&[3, 8], 1), random(&[3, 3], 2)], |g, x| {
            let heads = columns(g, &x[0], 4, 1..3).unwrap();
            concat_columns(g, &[&heads, &x[1], &heads]).unwrap()
        });
    }

    #[test]
    fn on_paper() {
        let g = Graph::inference(Precision::F32);
        let x = Var::constant(Tensor::new(&[2, 4], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]));
        assert_eq!(columns(&g, &x, 4, 1..3).unwrap().data(), [1.0, 2.0, 5.0, 6.0]);
        let odd = columns(&g, &x, 2, 1..2).unwrap();
        assert_eq!((odd.shape(), odd.data()), (&[2, 2][..], &[1.0, 3.0, 5.0, 7.0][..]));
        assert_eq!(concat_columns(&g, &[&odd, &odd]).unwrap().data(), [1.0, 3.0, 1.0, 3.0, 5.0, 7.0, 5.0, 7.0]);
        assert!(columns(&g, &x, 3, 0..1).is_err() && columns(&g, &x, 4, 3..5).is_err());
    }
}
