//! Operations on rows that hold several heads one after the other.

use super::rows_of;
use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::gemm::{Beta, Mat, grouped_matmul, grouped_matmul_weight_gradient};
use moebius_kernels::memory::Buffer;

/// Rows `[tokens, heads * width]` as `[heads, tokens, width]`.
fn head_major(rows: &[f32], [tokens, heads, width]: [usize; 3]) -> Buffer<f32> {
    let mut out = Buffer::scratch(rows.len());
    for (token, row) in rows.chunks_exact((heads * width).max(1)).enumerate() {
        for (head, part) in row.chunks_exact(width).enumerate() {
            out[(head * tokens + token) * width..][..width].copy_from_slice(part);
        }
    }
    out
}

/// The reverse of [`head_major`].
fn token_major(rows: &[f32], [tokens, heads, width]: [usize; 3]) -> Buffer<f32> {
    let mut out = Buffer::scratch(rows.len());
    for (row, part) in rows.chunks_exact(width.max(1)).enumerate() {
        let (head, token) = (row / tokens, row % tokens);
        out[(token * heads + head) * width..][..width].copy_from_slice(part);
    }
    out
}

/// y = x Wᵀ with a matrix for each head, in the graph's precision.
///
/// # Shapes
/// x `[tokens, heads * in]`, weight `[heads, out, in]`, result `[tokens, heads * out]`.
pub fn linear_by_head<'p>(g: &Graph<'p>, x: &Var, weight: &'p Param) -> Result<Var, TensorError> {
    let [heads, out, inner] = weight.dims()?;
    let tokens = rows_of("linear_by_head input", x, heads * inner)?;
    let (precision, offsets) = (g.precision(), (0..=heads).map(|head| head * tokens).collect::<Vec<_>>());
    let rows = head_major(x.data(), [tokens, heads, inner]);
    let mut y = Buffer::scratch(heads * tokens * out);
    weight.grouped_product(precision, &rows, None, &offsets, &mut y);
    let output = Tensor::new(&[tokens, heads * out], token_major(&y, [tokens, heads, out]));
    if !g.is_recording() {
        return Ok(Var::constant(output));
    }
    weight.check_trainable()?;
    let to_x = x.place();
    Ok(g.record(output, move |dy, back| {
        let dy = head_major(&dy, [tokens, heads, out]);
        let dy = Mat::new(&dy, heads * tokens, out);
        let (dw, beta) = back.weight(weight);
        grouped_matmul_weight_gradient(precision, dy, Mat::new(&rows, heads * tokens, inner), &offsets, dw, beta);
        let mut dx = rows;
        grouped_matmul(dy, &offsets, weight.packed_backward(precision), &mut dx, Beta::Overwrite);
        back.give(to_x, token_major(&dx, [tokens, heads, inner]));
    }))
}

/// For each head, its part of a, then its part of b.
///
/// # Shapes
/// a `[tokens, heads * wa]`, b `[tokens, heads * wb]`, result `[tokens, heads * (wa + wb)]`.
pub fn join_heads<'p>(g: &Graph<'p>, a: &Var, b: &Var, heads: usize) -> Result<Var, TensorError> {
    let [tokens, all_a] = a.dims()?;
    let [_, all_b] = b.dims()?;
    let (wa, wb) = (all_a / heads, all_b / heads);
    if rows_of("join_heads, second", b, wb * heads)? != tokens || wa * heads != all_a {
        let (wanted, found) = (vec![tokens, wa * heads], a.shape().to_vec());
        return Err(TensorError::Shape { what: "join_heads, first", wanted, found });
    }
    let mut out = Buffer::scratch(tokens * heads * (wa + wb));
    let parts = a.data().chunks_exact(wa).zip(b.data().chunks_exact(wb));
    for (out, (a, b)) in out.chunks_exact_mut(wa + wb).zip(parts) {
        out[..wa].copy_from_slice(a);
        out[wa..].copy_from_slice(b);
    }
    let (to_a, to_b) = (a.place(), b.place());
    Ok(g.record_from(&[a, b], Tensor::new(&[tokens, heads * (wa + wb)], out), move |dy, back| {
        let part = |range: std::ops::Range<usize>| -> Buffer<f32> {
            dy.chunks_exact(wa + wb).flat_map(|row| row[range.clone()].iter().copied()).collect()
        };
        back.give(to_a, part(0..wa));
        back.give(to_b, part(wa..wa + wb));
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients_with_params, random};
    use moebius_kernels::gemm::Precision;

    #[test]
    fn gradients_match_finite_differences() {
        let inputs = [random(&[4, 6], 1), random(&[4, 2], 2)];
        check_gradients_with_params(&inputs, &[random(&[2, 4, 3], 3)], |g, x, w| {
            join_heads(g, &linear_by_head(g, &x[0], &w[0]).unwrap(), &x[1], 2).unwrap()
        });
    }

    #[test]
    fn each_head_has_its_matrix() {
        let weight = Param::new(0, "w", Tensor::new(&[2, 1, 2], vec![1.0, 10.0, 100.0, 1000.0]));
        let x = Var::constant(Tensor::new(&[2, 4], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]));
        let y = linear_by_head(&Graph::inference(Precision::F32), &x, &weight).unwrap();
        assert_eq!(y.data(), [21.0, 4300.0, 65.0, 8700.0]);
    }
}
