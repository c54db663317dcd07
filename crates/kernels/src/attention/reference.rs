//! Attention by the definition, accumulating in f64: what the fast path is compared with.

use super::{AttentionShape, Saved};

/// The plain [`super::attention_forward`].
pub fn attention_reference(
    shape: &AttentionShape,
    [q, k, v]: [&[f32]; 3],
    sinks: Option<&[f32]>,
    sequence_starts: &[usize],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let tokens = q.len() / shape.query_width();
    for bounds in sequence_starts.windows(2) {
        let part_of = |width: usize| bounds[0] * width..bounds[1] * width;
        let (queries, keys) = (&q[part_of(shape.query_width())], &k[part_of(shape.key_width())]);
        let (values, out) = (&v[part_of(shape.value_width())], &mut out[part_of(shape.out_width())]);
        let rows = bounds[1] - bounds[0];
        let mut part = vec![0.0; shape.n_heads * rows];
        attention_rows(shape, [queries, keys, values], sinks, 0, out, &mut part);
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
    attention_rows(shape, [q, keys, values], None, first_position, out, &mut lse);
}

/// Rows `first_position..` of one sequence; `lse` `[nh, rows]`.
fn attention_rows(
    shape: &AttentionShape,
    [q, keys, values]: [&[f32]; 3],
    sinks: Option<&[f32]>,
    first_position: usize,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (query_width, head_dim, value_dim) = (shape.query_width(), shape.head_dim, shape.value_dim);
    let rows = q.len() / query_width;
    for row in 0..rows {
        for head in 0..shape.n_heads {
            let query = &q[row * query_width + head * head_dim..][..head_dim];
            let visible = shape.visible(first_position + row, first_position + rows);
            let kv_head = head / shape.group();
            let place = |position: usize| position * shape.key_width() + kv_head * head_dim;
            let sink = sinks.map(|sinks| sinks[head]);
            let (probabilities, log_sum, _) = softmax_of_scores(shape, query, keys, visible.clone(), place, sink);
            lse[head * rows + row] = log_sum as f32;
            let mut mixed = vec![0.0f64; value_dim];
            for (position, probability) in visible.zip(probabilities) {
                let place = position * shape.value_width() + kv_head * value_dim;
                for (sum, &value) in mixed.iter_mut().zip(&values[place..][..value_dim]) {
                    *sum += probability * f64::from(value);
                }
            }
            let out = &mut out[row * shape.out_width() + head * value_dim..][..value_dim];
            out.iter_mut().zip(mixed).for_each(|(out, sum)| *out = sum as f32);
        }
    }
}

/// Probabilities, the logarithm of their sum, and the slope of each score by its dot product.
fn softmax_of_scores(
    shape: &AttentionShape,
    query: &[f32],
    keys: &[f32],
    visible: std::ops::Range<usize>,
    place: impl Fn(usize) -> usize,
    sink: Option<f32>,
) -> (Vec<f64>, f64, Vec<f64>) {
    let scale = f64::from(shape.scale);
    let (scores, slopes): (Vec<f64>, Vec<f64>) = visible
        .map(|position| {
            let score = dot(query, &keys[place(position)..][..query.len()]) * scale;
            shape.soft_cap.map_or((score, scale), |cap| {
                let share = (score / f64::from(cap)).tanh();
                (f64::from(cap) * share, (1.0 - share * share) * scale)
            })
        })
        .unzip();
    let sink = sink.map(f64::from);
    let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + scores.iter().copied().chain(sink).map(|s| (s - max).exp()).sum::<f64>().ln();
    (scores.iter().map(|s| (s - log_sum).exp()).collect(), log_sum, slopes)
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// The plain [`super::attention_backward`]; with sinks, those of the forward.
pub fn attention_backward_reference(
    shape: &AttentionShape,
    saved: &Saved<'_>,
    sinks: Option<&[f32]>,
    dout: &[f32],
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    let (head_dim, value_dim) = (shape.head_dim, shape.value_dim);
    let mut dk_sum = vec![0.0f64; dk.len()];
    let mut dv_sum = vec![0.0f64; dv.len()];
    for bounds in saved.sequence_starts.windows(2) {
        for (row, head) in (bounds[0]..bounds[1]).flat_map(|row| (0..shape.n_heads).map(move |head| (row, head))) {
            let at = row * shape.query_width() + head * head_dim;
            let query = &saved.q[at..][..head_dim];
            let dout = &dout[row * shape.out_width() + head * value_dim..][..value_dim];
            let out = &saved.out[row * shape.out_width() + head * value_dim..][..value_dim];
            let visible = shape.visible(row - bounds[0], bounds[1] - bounds[0]);
            let kv_head = head / shape.group();
            let place = |position: usize| (bounds[0] + position) * shape.key_width() + kv_head * head_dim;
            let value_place = |position: usize| (bounds[0] + position) * shape.value_width() + kv_head * value_dim;
            let sink = sinks.map(|sinks| sinks[head]);
            let (probabilities, _, slopes) = softmax_of_scores(shape, query, saved.k, visible.clone(), place, sink);
            let mean = dot(dout, out);
            let mut dquery = vec![0.0f64; head_dim];
            for ((position, p), slope) in visible.zip(probabilities).zip(slopes) {
                let dp = dot(dout, &saved.v[value_place(position)..][..value_dim]);
                let dscore = p * (dp - mean) * slope;
                let at = place(position);
                for i in 0..head_dim {
                    dquery[i] += dscore * f64::from(saved.k[at + i]);
                    dk_sum[at + i] += dscore * f64::from(query[i]);
                }
                for (sum, &dout) in dv_sum[value_place(position)..].iter_mut().zip(dout) {
                    *sum += p * f64::from(dout);
                }
            }
            dq[at..][..head_dim].iter_mut().zip(dquery).for_each(|(out, sum)| *out += sum as f32);
        }
    }
    dk.iter_mut().zip(dk_sum).for_each(|(out, sum)| *out += sum as f32);
    dv.iter_mut().zip(dv_sum).for_each(|(out, sum)| *out += sum as f32);
}
