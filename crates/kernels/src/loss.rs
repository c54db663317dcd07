//! Cross-entropy of rows of logits.
//!
//! Legend: `rows` predictions, `vocab` classes. A target of `u32::MAX` ([`IGNORED`]) makes a row count for nothing.

/// The target that marks a row without a loss.
pub const IGNORED: u32 = u32::MAX;

/// `losses[r] = log Σ exp(logits[r]) - logits[r][targets[r]]`, zero for ignored rows.
///
/// # Shapes
/// `logits` `[rows, vocab]`, `targets`, `losses` `[rows]`.
pub fn cross_entropy_rows(logits: &[f32], targets: &[u32], losses: &mut [f32]) {
    cross_entropy_rows_reference(logits, targets, losses);
}

/// Replaces the logits by the gradient of `scale * Σ losses`: `scale * (softmax(logits) - onehot(target))`, zero for
/// ignored rows.
///
/// # Shapes
/// `logits` `[rows, vocab]`, `targets` `[rows]`.
pub fn cross_entropy_rows_backward_in_place(logits: &mut [f32], targets: &[u32], scale: f32) {
    cross_entropy_rows_backward_reference(logits, targets, scale);
}

/// [`cross_entropy_rows`] and [`cross_entropy_rows_backward_in_place`] in one go, sharing the sums.
///
/// # Shapes
/// `logits` `[rows, vocab]`, `targets`, `losses` `[rows]`.
pub fn cross_entropy_rows_with_gradient(logits: &mut [f32], targets: &[u32], losses: &mut [f32], scale: f32) {
    cross_entropy_rows_reference(logits, targets, losses);
    cross_entropy_rows_backward_reference(logits, targets, scale);
}

fn vocab_of(logits: &[f32], targets: &[u32]) -> usize {
    if targets.is_empty() {
        assert!(logits.is_empty(), "logits without targets");
        return 1;
    }
    assert!(logits.len().is_multiple_of(targets.len()), "logits {} for {} targets", logits.len(), targets.len());
    logits.len() / targets.len()
}

/// The plain loop that [`cross_entropy_rows`] is compared with.
pub fn cross_entropy_rows_reference(logits: &[f32], targets: &[u32], losses: &mut [f32]) {
    assert_eq!(targets.len(), losses.len());
    let vocab = vocab_of(logits, targets);
    for ((row, &target), loss) in logits.chunks_exact(vocab).zip(targets).zip(losses) {
        *loss = if target == IGNORED { 0.0 } else { (log_sum_exp(row) - f64::from(row[target as usize])) as f32 };
    }
}

/// The plain loop that [`cross_entropy_rows_backward_in_place`] is compared with.
pub fn cross_entropy_rows_backward_reference(logits: &mut [f32], targets: &[u32], scale: f32) {
    let vocab = vocab_of(logits, targets);
    for (row, &target) in logits.chunks_exact_mut(vocab).zip(targets) {
        if target == IGNORED {
            row.fill(0.0);
            continue;
        }
        let log_sum = log_sum_exp(row);
        row.iter_mut().for_each(|v| *v = scale * (f64::from(*v) - log_sum).exp() as f32);
        row[target as usize] -= scale;
    }
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + row.iter().map(|&v| (f64::from(v) - max).exp()).sum::<f64>().ln()
}
