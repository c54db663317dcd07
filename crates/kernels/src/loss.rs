//! Cross-entropy of rows of logits.
//!
//! Legend: `rows` predictions, `vocab` classes. A target of `u32::MAX` ([`IGNORED`]) makes a row count for nothing.

use crate::gemm::bf16_of;
use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::math::{exp_nonpositive, largest, sum_of_exponentials};
use crate::simd::{Kernel, LANES, Lanes, Number, Simd, dispatch};
use crate::tasks::{for_each_block, rows as rows_of, rows_mut};

/// Logits of a row that are taken at once: they stay in the first cache between the search for the largest and the
/// sum of exponentials.
const VOCABULARY_CHUNK: usize = 2048;

/// The target that marks a row without a loss.
pub const IGNORED: u32 = u32::MAX;

/// `losses[r] = log Σ exp(logits[r]) - logits[r][targets[r]]`, zero for ignored rows.
///
/// # Shapes
/// `logits` `[rows, vocab]`, `targets`, `losses` `[rows]`.
pub fn cross_entropy_rows(logits: &[f32], targets: &[u32], losses: &mut [f32]) {
    losses_on(Isa::current(), logits, targets, losses);
}

fn losses_on(isa: Isa, logits: &[f32], targets: &[u32], losses: &mut [f32]) {
    let vocab = vocab_of(logits, targets);
    assert_eq!(targets.len(), losses.len());
    let losses = DisjointMut::new(losses);
    for_each_block(targets.len(), vocab, |rows| {
        let (logits, targets) = (rows_of(logits, &rows, vocab), &targets[rows.clone()]);
        // SAFETY: blocks of rows are disjoint.
        dispatch(isa, Losses { logits, targets, losses: unsafe { losses.range(rows) } });
    });
}

/// Replaces the logits by the gradient of `scale * Σ losses`: `scale * (softmax(logits) - onehot(target))`, zero for
/// ignored rows.
///
/// # Shapes
/// `logits` `[rows, vocab]`, `targets` `[rows]`.
pub fn cross_entropy_rows_backward_in_place(logits: &mut [f32], targets: &[u32], scale: f32) {
    gradients_on(Isa::current(), logits, targets, None, scale, None);
}

/// [`cross_entropy_rows`] and [`cross_entropy_rows_backward_in_place`] in one go, sharing the sums; the gradient goes to
/// `rounded` as bf16 instead, if there is room.
///
/// # Shapes
/// `logits`, `rounded` `[rows, vocab]`, `targets`, `losses` `[rows]`.
pub fn cross_entropy_rows_with_gradient(
    logits: &mut [f32],
    targets: &[u32],
    losses: &mut [f32],
    scale: f32,
    rounded: Option<&mut [u16]>,
) {
    gradients_on(Isa::current(), logits, targets, Some(losses), scale, rounded);
}

fn gradients_on(
    isa: Isa,
    logits: &mut [f32],
    targets: &[u32],
    losses: Option<&mut [f32]>,
    scale: f32,
    rounded: Option<&mut [u16]>,
) {
    let vocab = vocab_of(logits, targets);
    assert!(losses.as_ref().is_none_or(|losses| losses.len() == targets.len()));
    assert!(rounded.as_ref().is_none_or(|rounded| rounded.len() == logits.len()));
    let (logits, losses) = (DisjointMut::new(logits), losses.map(DisjointMut::new));
    let rounded = rounded.map(DisjointMut::new);
    for_each_block(targets.len(), 2 * vocab, |rows| {
        // SAFETY: blocks of rows are disjoint.
        let logits = unsafe { rows_mut(&logits, &rows, vocab) };
        // SAFETY: as above.
        let losses = losses.as_ref().map(|losses| unsafe { losses.range(rows.clone()) });
        // SAFETY: as above.
        let rounded = rounded.as_ref().map(|rounded| unsafe { rows_mut(rounded, &rows, vocab) });
        dispatch(isa, Gradients { logits, targets: &targets[rows], losses, scale, rounded });
    });
}

/// The largest logit of a row, and `Σ exp(logit - largest)`, in one pass over the memory (online, as Milakov &
/// Gimelshein 2018).
#[inline(always)]
fn largest_and_sum<S: Simd>(simd: S, row: &[f32]) -> (f32, f64) {
    let (mut top, mut sum) = (f32::NEG_INFINITY, 0.0f64);
    for chunk in row.chunks(VOCABULARY_CHUNK) {
        let found = largest(simd, chunk);
        if found > top {
            sum *= (f64::from(top) - f64::from(found)).exp();
            top = found;
        }
        // Classes ruled out by -inf count zero, even when no other came yet.
        let shift = if top == f32::NEG_INFINITY { 0.0 } else { top };
        sum += f64::from(sum_of_exponentials(simd, chunk, shift));
    }
    (top, sum)
}

/// A class's part of the gradient.
#[inline(always)]
fn share<S: Simd>(logit: Lanes<S>, top: Lanes<S>, factor: Lanes<S>) -> Lanes<S> {
    exp_nonpositive(logit - top) * factor
}

#[inline(always)]
fn loss_of(row: &[f32], target: u32, (top, sum): (f32, f64)) -> f32 {
    (f64::from(top) - f64::from(row[target as usize]) + sum.ln()) as f32
}

struct Losses<'a> {
    logits: &'a [f32],
    targets: &'a [u32],
    losses: &'a mut [f32],
}

impl Kernel for Losses<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let rows = self.logits.chunks_exact(vocab_of(self.logits, self.targets));
        for ((row, &target), loss) in rows.zip(self.targets).zip(self.losses) {
            *loss = if target == IGNORED { 0.0 } else { loss_of(row, target, largest_and_sum(simd, row)) };
        }
    }
}

struct Gradients<'a> {
    logits: &'a mut [f32],
    targets: &'a [u32],
    losses: Option<&'a mut [f32]>,
    scale: f32,
    rounded: Option<&'a mut [u16]>,
}

impl Kernel for Gradients<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let vocab = vocab_of(self.logits, self.targets);
        for (i, (row, &target)) in self.logits.chunks_exact_mut(vocab).zip(self.targets).enumerate() {
            let mut loss = 0.0;
            let mut rounded = self.rounded.as_mut().map(|rounded| &mut rounded[i * vocab..(i + 1) * vocab]);
            if target == IGNORED {
                match &mut rounded {
                    Some(rounded) => rounded.fill(0),
                    None => row.fill(0.0),
                }
            } else {
                let (top, sum) = largest_and_sum(simd, row);
                loss = loss_of(row, target, (top, sum));
                let factor = Lanes::splat(simd, (f64::from(self.scale) / sum) as f32);
                let top = Lanes::splat(simd, top);
                if let Some(rounded) = rounded {
                    for (x, to) in row.chunks(LANES).zip(rounded.chunks_mut(LANES)) {
                        u16::store_any(share(Lanes::load_any(simd, x, 0.0), top, factor), to);
                    }
                    let mut of_target = [0.0; LANES];
                    share(Lanes::splat(simd, row[target as usize]), top, factor).store(&mut of_target);
                    rounded[target as usize] = bf16_of(of_target[0] - self.scale);
                } else {
                    for x in row.chunks_mut(LANES) {
                        share(Lanes::load_any(simd, x, 0.0), top, factor).store_any(x);
                    }
                    row[target as usize] -= self.scale;
                }
            }
            if let Some(losses) = &mut self.losses {
                losses[i] = loss;
            }
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::narrow::narrow;
    use crate::testing::{check, numbers};

    #[test]
    fn losses_and_gradients_are_the_reference() {
        for (rows, vocab) in [(0, 7), (1, 1), (5, 3), (7, 33), (40, 1000), (3, 2 * VOCABULARY_CHUNK + 5)] {
            let logits: Vec<f32> = numbers(1, rows * vocab + 1)[1..].iter().map(|x| 20.0 * x).collect();
            let mut targets: Vec<u32> = (0..rows).map(|row| (row * 31 % vocab) as u32).collect();
            if let Some(target) = targets.get_mut(2) {
                *target = IGNORED;
            }
            let (mut losses, mut gradient) = (vec![0.0; rows], logits.clone());
            cross_entropy_rows_reference(&logits, &targets, &mut losses);
            cross_entropy_rows_backward_reference(&mut gradient, &targets, 0.25);
            check(&[losses.clone(), losses, gradient.clone(), gradient], 2e-6, |isa| {
                let mut losses = [vec![f32::NAN; rows], vec![f32::NAN; rows]];
                let mut gradients = [logits.clone(), logits.clone()];
                losses_on(isa, &logits, &targets, &mut losses[0]);
                gradients_on(isa, &mut gradients[0], &targets, Some(&mut losses[1]), 0.25, None);
                gradients_on(isa, &mut gradients[1], &targets, None, 0.25, None);
                let (mut rounded, mut wanted) = (vec![9; rows * vocab], vec![0; rows * vocab]);
                gradients_on(isa, &mut logits.clone(), &targets, None, 0.25, Some(&mut rounded));
                narrow(&gradients[1], &mut wanted);
                assert_eq!(rounded, wanted);
                losses.into_iter().chain(gradients).collect()
            });
        }
    }

    #[test]
    fn ruled_out_classes_and_far_logits() {
        let mut logits = vec![f32::NEG_INFINITY; VOCABULARY_CHUNK + 2];
        logits[VOCABULARY_CHUNK] = 1000.0;
        logits[VOCABULARY_CHUNK + 1] = 1000.0;
        for isa in Isa::available() {
            let mut loss = [0.0];
            let mut gradient = logits.clone();
            gradients_on(isa, &mut gradient, &[VOCABULARY_CHUNK as u32], Some(&mut loss), 1.0, None);
            assert!((loss[0] - 2f32.ln()).abs() < 1e-6);
            assert_eq!((gradient[0], gradient[VOCABULARY_CHUNK], gradient[VOCABULARY_CHUNK + 1]), (0.0, -0.5, 0.5));
            logits[5] = f32::NAN;
            losses_on(isa, &logits, &[0], &mut loss);
            assert!(loss[0].is_nan());
            logits[5] = f32::NEG_INFINITY;
        }
    }
}
