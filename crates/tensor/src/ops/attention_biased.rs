//! Attention with T5's bias for distances (Raffel et al. 2020), within a sequence or over another one.

use super::rows_of;
use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::attention_biased::{
    BiasedGradients, BiasedInputs, DistanceBias, biased_attention as attend, biased_attention_backward,
};
use moebius_kernels::memory::Buffer;
use std::sync::Arc;

pub use moebius_kernels::attention_biased::BiasedShape;

/// The bias of every distance that a call needs, by the bucket that the distance falls into.
#[derive(Clone, Debug)]
pub struct BucketBias {
    heads: usize,
    /// `[heads, span]`
    values: Buffer<f32>,
    /// `[span]`: the bucket of each distance, the least one first.
    buckets: Vec<u32>,
    /// Where the distance 0 is.
    zero: usize,
}

impl BucketBias {
    /// The biases of keys up to `before` positions before their query and fewer than `after` after it.
    ///
    /// # Shapes
    /// weight `[buckets, heads]`.
    ///
    /// # Errors
    /// A weight that is no matrix.
    ///
    /// # Panics
    /// If `bucket` gives one that is not there.
    pub fn new(
        weight: &Param,
        before: usize,
        after: usize,
        bucket: impl Fn(i64) -> usize,
    ) -> Result<Self, TensorError> {
        let [_, heads] = weight.dims()?;
        let buckets: Vec<u32> = (-(before as i64)..after as i64).map(|distance| bucket(distance) as u32).collect();
        let table = weight.value().data();
        let values = (0..heads).flat_map(|head| buckets.iter().map(move |&b| table[b as usize * heads + head]));
        Ok(Self { heads, values: values.collect(), buckets, zero: before })
    }

    /// As the kernels take it.
    pub fn by_distance(&self) -> DistanceBias<'_> {
        DistanceBias { values: &self.values, span: self.buckets.len(), zero: self.zero }
    }

    /// Adds what each bucket's distances got, in the order of the distances.
    fn add_to_buckets(&self, by_distance: &[f32], by_bucket: &mut [f32]) {
        for (head, gradients) in by_distance.chunks_exact(self.buckets.len().max(1)).enumerate() {
            for (&bucket, gradient) in self.buckets.iter().zip(gradients) {
                by_bucket[bucket as usize * self.heads + head] += gradient;
            }
        }
    }
}

/// softmax(scale * q kᵀ + bias) v of each sequence, from position 0 on.
///
/// # Shapes
/// q `[query rows, n_heads * head_dim]`, k and v `[key rows, n_heads * head_dim]`, `starts` the first rows of each
/// sequence and the end, `[sequences + 1]` in rows of queries and of keys; result as q.
///
/// # Panics
/// If a sequence with queries has no keys.
pub fn biased_attention<'p>(
    g: &Graph<'p>,
    [q, k, v]: [&Var; 3],
    shape: &BiasedShape,
    bias: Option<(&'p Param, &Arc<BucketBias>)>,
    [query_starts, key_starts]: [&[usize]; 2],
) -> Result<Var, TensorError> {
    rows_of("attention queries", q, shape.width())?;
    let keys = rows_of("attention keys", k, shape.width())?;
    if rows_of("attention values", v, shape.width())? != keys {
        let (wanted, found) = (k.shape().to_vec(), v.shape().to_vec());
        return Err(TensorError::Shape { what: "attention values", wanted, found });
    }
    let mut out = Buffer::scratch(q.data().len());
    {
        let inputs = BiasedInputs { q: q.data(), k: k.data(), v: v.data(), query_starts, key_starts };
        let bias = bias.map(|(_, bias)| bias.by_distance());
        attend(shape, bias.as_ref(), &inputs.sequences(shape), &mut out);
    }
    let output = Tensor::new(q.shape(), out);
    if !g.is_recording() {
        return Ok(Var::constant(output));
    }
    let bias_is_learned = bias.is_some();
    let (saved, shape, bias) = ([q.clone(), k.clone(), v.clone()], *shape, bias.map(|(weight, b)| (weight, b.clone())));
    let (query_starts, key_starts) = (query_starts.to_vec(), key_starts.to_vec());
    let backward = move |dout: Buffer<f32>, back: &mut crate::Backprop<'_>| {
        let [q, k, v] = &saved;
        let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| Buffer::zeroed(x.data().len()));
        let by_distance = bias.as_ref().map(|(_, bias)| bias.by_distance());
        let mut dbias = Buffer::zeroed(by_distance.map_or(0, |bias| bias.values.len()));
        let (query_starts, key_starts) = (&query_starts[..], &key_starts[..]);
        let inputs = BiasedInputs { q: q.data(), k: k.data(), v: v.data(), query_starts, key_starts };
        let gradients = BiasedGradients { q: &mut dq, k: &mut dk, v: &mut dv, bias: &mut dbias };
        biased_attention_backward(&shape, by_distance.as_ref(), &inputs, &dout, gradients);
        for (x, dx) in [(q, dq), (k, dk), (v, dv)] {
            back.give(x, dx);
        }
        if let Some((weight, bias)) = &bias {
            bias.add_to_buckets(&dbias, back.weight_sum(weight));
        }
    };
    // With a bias it has a weight of its own.
    Ok(if bias_is_learned { g.record(output, backward) } else { g.record_from(&[q, k, v], output, backward) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients, check_gradients_with_params, random};

    #[test]
    fn gradients_match_finite_differences() {
        let inputs = [random(&[5, 8], 1), random(&[5, 8], 2), random(&[5, 8], 3)];
        for causal in [true, false] {
            let shape = BiasedShape { n_heads: 2, head_dim: 4, scale: 0.5, causal };
            check_gradients_with_params(&inputs, &[random(&[3, 2], 4)], |g, x, w| {
                let bias = BucketBias::new(&w[0], 5, 5, |distance| distance.unsigned_abs().min(2) as usize).unwrap();
                let bias = Some((&w[0], &Arc::new(bias)));
                biased_attention(g, [&x[0], &x[1], &x[2]], &shape, bias, [&[0, 3, 5]; 2]).unwrap()
            });
        }
    }

    #[test]
    fn gradients_over_another_sequence_match_finite_differences() {
        let shape = BiasedShape { n_heads: 2, head_dim: 4, scale: 1.0, causal: false };
        check_gradients(&[random(&[3, 8], 1), random(&[6, 8], 2), random(&[6, 8], 3)], |g, x| {
            biased_attention(g, [&x[0], &x[1], &x[2]], &shape, None, [&[0, 1, 3], &[0, 4, 6]]).unwrap()
        });
    }
}
