//! Attention over the sequences of a ragged batch.

use super::rows_of;
use crate::{Graph, Tensor, TensorError, Var};
use moebius_kernels::attention::{AttentionShape, Saved, attention_backward, attention_forward};
use moebius_kernels::memory::Buffer;

/// softmax(scale * q kᵀ, within each sequence, causal unless `shape` looks both ways) v; query heads share key and value heads in equal groups.
///
/// # Shapes
/// q `[tokens, n_heads * head_dim]`, k and v `[tokens, n_kv_heads * head_dim]`, `starts` `[sequences + 1]` the first row
/// of each sequence and the end, result as q.
pub fn attention<'p>(
    g: &Graph<'p>,
    q: &Var,
    k: &Var,
    v: &Var,
    shape: &AttentionShape,
    starts: &[usize],
) -> Result<Var, TensorError> {
    let tokens = rows_of("attention queries", q, shape.n_heads * shape.head_dim)?;
    for (what, x) in [("attention keys", k), ("attention values", v)] {
        let wanted = shape.n_kv_heads * shape.head_dim;
        if rows_of(what, x, wanted)? != tokens {
            return Err(TensorError::Shape { what, wanted: vec![tokens, wanted], found: x.shape().to_vec() });
        }
    }
    let (mut out, mut lse) = (Buffer::scratch(q.data().len()), Buffer::scratch(shape.n_heads * tokens));
    attention_forward(shape, q.data(), k.data(), v.data(), starts, &mut out, &mut lse);
    let output = Tensor::new(q.shape(), out);
    if !g.is_recording() {
        return Ok(Var::constant(output));
    }
    let (inputs, shape, starts, saved_out) =
        ([q.clone(), k.clone(), v.clone()], *shape, starts.to_vec(), output.clone());
    Ok(g.record_from(&[q, k, v], output, move |dy, back| {
        let [q, k, v] = &inputs;
        let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| Buffer::zeroed(x.data().len()));
        let saved =
            Saved { q: q.data(), k: k.data(), v: v.data(), sequence_starts: &starts, out: saved_out.data(), lse: &lse };
        attention_backward(&shape, &saved, &dy, &mut dq, &mut dk, &mut dv);
        for (x, dx) in [(q, dq), (k, dk), (v, dv)] {
            back.give(x, dx);
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients, random};

    #[test]
    fn gradients_match_finite_differences() {
        for window in [None, Some(2)] {
            let shape =
                AttentionShape { n_heads: 2, n_kv_heads: 1, head_dim: 4, scale: 0.5, window, bidirectional: false };
            check_gradients(&[random(&[5, 8], 1), random(&[5, 4], 2), random(&[5, 4], 3)], |g, x| {
                attention(g, &x[0], &x[1], &x[2], &shape, &[0, 4, 5]).unwrap()
            });
        }
    }
}
