//! Attention over the sequences of a ragged batch.

use super::rows_of;
use crate::{Backprop, Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::attention::{AttentionShape, Saved, attention_backward, attention_forward};
use moebius_kernels::memory::Buffer;

/// softmax(scale * q kᵀ, within each sequence, causal unless `shape` looks both ways) v; query heads share key and value
/// heads in equal groups.
///
/// # Shapes
/// q `[tokens, n_heads * head_dim]`, k `[tokens, n_kv_heads * head_dim]`, v `[tokens, n_kv_heads * value_dim]`, `starts`
/// `[sequences + 1]` the first row of each sequence and the end, result `[tokens, n_heads * value_dim]`.
pub fn attention<'p>(
    g: &Graph<'p>,
    q: &Var,
    k: &Var,
    v: &Var,
    shape: &AttentionShape,
    starts: &[usize],
) -> Result<Var, TensorError> {
    attention_with_sinks(g, [q, k, v], None, shape, starts)
}

/// As [`attention`], with a score of each query head that takes part in the softmax and brings no value.
///
/// # Shapes
/// As [`attention`]; sinks `[n_heads]`.
pub fn attention_with_sinks<'p>(
    g: &Graph<'p>,
    [q, k, v]: [&Var; 3],
    sinks: Option<&'p Param>,
    shape: &AttentionShape,
    starts: &[usize],
) -> Result<Var, TensorError> {
    let tokens = rows_of("attention queries", q, shape.query_width())?;
    for (what, x, wanted) in [("attention keys", k, shape.key_width()), ("attention values", v, shape.value_width())] {
        if rows_of(what, x, wanted)? != tokens {
            return Err(TensorError::Shape { what, wanted: vec![tokens, wanted], found: x.shape().to_vec() });
        }
    }
    let (mut out, mut lse) = (Buffer::scratch(tokens * shape.out_width()), Buffer::scratch(shape.n_heads * tokens));
    let sink_scores = sinks.map(|sinks| sinks.value().data());
    attention_forward(shape, [q.data(), k.data(), v.data()], sink_scores, starts, &mut out, &mut lse);
    let output = Tensor::new(&[tokens, shape.out_width()], out);
    if !g.is_recording() {
        return Ok(Var::constant(output));
    }
    let precision = g.precision();
    let (inputs, shape, starts, saved_out) =
        ([q.clone(), k.clone(), v.clone()], *shape, starts.to_vec(), output.clone());
    let backward = move |dy: Buffer<f32>, back: &mut Backprop<'_>| {
        let [q, k, v] = &inputs;
        let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| Buffer::scratch(x.data().len()));
        let saved =
            Saved { q: q.data(), k: k.data(), v: v.data(), sequence_starts: &starts, out: saved_out.data(), lse: &lse };
        attention_backward(&shape, &saved, precision, &dy, [&mut dq, &mut dk, &mut dv]);
        for (x, dx) in [(q, dq), (k, dk), (v, dv)] {
            back.give(x, dx);
        }
        if let Some(sinks) = sinks {
            let slopes = sink_slopes(&shape, sinks.value().data(), &saved, &dy);
            back.weight_sum(sinks).iter_mut().zip(slopes).for_each(|(sum, slope)| *sum += slope as f32);
        }
    };
    Ok(match sinks {
        Some(_) => g.record(output, backward),
        None => g.record_from(&[q, k, v], output, backward),
    })
}

/// The gradients of the sinks: a sink takes the share `exp(sink − lse)` from every value of its row.
fn sink_slopes(shape: &AttentionShape, sinks: &[f32], saved: &Saved<'_>, dout: &[f32]) -> Vec<f64> {
    let tokens = saved.lse.len() / shape.n_heads;
    let of_head = |(head, &sink): (usize, &f32)| -> f64 {
        let rows = 0..tokens;
        rows.map(|row| {
            let at = row * shape.out_width() + head * shape.value_dim;
            let pairs = dout[at..at + shape.value_dim].iter().zip(&saved.out[at..at + shape.value_dim]);
            let moved: f64 = pairs.map(|(d, o)| f64::from(*d) * f64::from(*o)).sum();
            -f64::from((sink - saved.lse[head * tokens + row]).exp()) * moved
        })
        .sum()
    };
    sinks.iter().enumerate().map(of_head).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients, check_gradients_with_params, random};

    #[test]
    fn gradients_match_finite_differences() {
        for window in [None, Some(2)] {
            let shape = AttentionShape { window, ..AttentionShape::grouped([2, 1, 4], 0.5) };
            check_gradients(&[random(&[5, 8], 1), random(&[5, 4], 2), random(&[5, 4], 3)], |g, x| {
                attention(g, &x[0], &x[1], &x[2], &shape, &[0, 4, 5]).unwrap()
            });
        }
    }

    #[test]
    fn gradients_of_sinks_match_finite_differences() {
        let shape = AttentionShape { value_dim: 3, soft_cap: Some(2.0), ..AttentionShape::grouped([2, 1, 4], 0.5) };
        let inputs = [random(&[5, 8], 1), random(&[5, 4], 2), random(&[5, 3], 3)];
        check_gradients_with_params(&inputs, &[random(&[2], 4)], |g, x, w| {
            attention_with_sinks(g, [&x[0], &x[1], &x[2]], Some(&w[0]), &shape, &[0, 4, 5]).unwrap()
        });
    }
}
