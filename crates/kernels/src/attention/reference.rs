//! Attention by the definition, accumulating in f64: what the fast path is compared with.

use super::{AttentionShape, Saved};

/// The plain [`super::attention_forward`].
pub fn attention_reference(
    shape: &AttentionShape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    sequence_starts: &[usize],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (query_width, key_width) = (shape.query_width(), shape.key_width());
    let tokens = q.len() / query_width;
    for bounds in sequence_starts.windows(2) {
        let (queries, keys) =
            (bounds[0] * query_width..bounds[1] * query_width, bounds[0] * key_width..bounds[1] * key_width);
        let rows = bounds[1] - bounds[0];
        let mut part = vec![0.0; shape.n_heads * rows];
        attention_rows(shape, &q[queries.clone()], 0, &k[keys.clone()], &v[keys], &mut out[queries], &mut part);
        for head in 0..shape.n_heads {
            lse[head * tokens + bounds[0]..][..rows].copy_from_slice(&part[head * rows..][..rows]);
        }
    }
}

/// The plain [`super::attention_cached`].
pub fn attention_cached_reference(
    shape: &AttentionShape,
    q: &[f32],
    first_position: usize,
    keys: &[f32],
    values: &[f32],
    out: &mut [f32],
) {
    let mut lse = vec![0.0; q.len() / shape.head_dim];
    attention_rows(shape, q, first_position, keys, values, out, &mut lse);
}

/// Rows `first_position..` of one sequence; `lse` `[nh, rows]`.
fn attention_rows(
    shape: &AttentionShape,
    q: &[f32],
    first_position: usize,
    keys: &[f32],
    values: &[f32],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (query_width, key_width, head_dim) = (shape.query_width(), shape.key_width(), shape.head_dim);
    let rows = q.len() / query_width;
    for row in 0..rows {
        for head in 0..shape.n_heads {
            let query = &q[row * query_width + head * head_dim..][..head_dim];
            let visible = shape.visible(first_position + row, first_position + rows);
            let place = |position: usize| position * key_width + head / shape.group() * head_dim;
            let (probabilities, log_sum) = softmax_of_scores(shape, query, keys, visible.clone(), place);
            lse[head * rows + row] = log_sum as f32;
            let mut mixed = vec![0.0f64; head_dim];
            for (position, probability) in visible.zip(probabilities) {
                for (sum, &value) in mixed.iter_mut().zip(&values[place(position)..][..head_dim]) {
                    *sum += probability * f64::from(value);
                }
            }
            let out = &mut out[row * query_width + head * head_dim..][..head_dim];
            out.iter_mut().zip(mixed).for_each(|(out, sum)| *out = sum as f32);
        }
    }
}

fn softmax_of_scores(
    shape: &AttentionShape,
    query: &[f32],
    keys: &[f32],
    visible: std::ops::Range<usize>,
    place: impl Fn(usize) -> usize,
) -> (Vec<f64>, f64) {
    let scores: Vec<f64> =
        visible.map(|position| dot(query, &keys[place(position)..][..query.len()]) * f64::from(shape.scale)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
    (scores.iter().map(|s| (s - log_sum).exp()).collect(), log_sum)
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// The plain [`super::attention_backward`].
pub fn attention_backward_reference(
    shape: &AttentionShape,
    saved: &Saved<'_>,
    dout: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let (query_width, key_width, head_dim) = (shape.query_width(), shape.key_width(), shape.head_dim);
    let mut dk_sum = vec![0.0f64; dk.len()];
    let mut dv_sum = vec![0.0f64; dv.len()];
    for bounds in saved.sequence_starts.windows(2) {
        let key_start = bounds[0] * key_width;
        for (row, head) in (bounds[0]..bounds[1]).flat_map(|row| (0..shape.n_heads).map(move |head| (row, head))) {
            let at = row * query_width + head * head_dim;
            let (query, dout) = (&saved.q[at..][..head_dim], &dout[at..][..head_dim]);
            let visible = shape.visible(row - bounds[0], bounds[1] - bounds[0]);
            let place = |position: usize| key_start + position * key_width + head / shape.group() * head_dim;
            let (probabilities, _) = softmax_of_scores(shape, query, saved.k, visible.clone(), place);
            let dprobabilities: Vec<f64> =
                visible.clone().map(|position| dot(dout, &saved.v[place(position)..][..head_dim])).collect();
            let mean: f64 = probabilities.iter().zip(&dprobabilities).map(|(p, d)| p * d).sum();
            let mut dquery = vec![0.0f64; head_dim];
            for ((position, p), dp) in visible.zip(probabilities).zip(dprobabilities) {
                let dscore = p * (dp - mean) * f64::from(shape.scale);
                let at = place(position);
                for i in 0..head_dim {
                    dquery[i] += dscore * f64::from(saved.k[at + i]);
                    dk_sum[at + i] += dscore * f64::from(query[i]);
                    dv_sum[at + i] += p * f64::from(dout[i]);
                }
            }
            dq[at..][..head_dim].iter_mut().zip(dquery).for_each(|(out, sum)| *out += sum as f32);
        }
    }
    dk.iter_mut().zip(dk_sum).for_each(|(out, sum)| *out += sum as f32);
    dv.iter_mut().zip(dv_sum).for_each(|(out, sum)| *out += sum as f32);
}
