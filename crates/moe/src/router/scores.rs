//! From logits to scores, and from chosen scores to weights: forward beside backward.

use super::{Normalise, RouterSettings, Score};
use crate::{MoeError, Plan};
use moebius_kernels::activation;
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Tensor, Var};
use std::rc::Rc;

/// Softmax over the last dimension of `[tokens, experts]`.
pub(super) fn softmax<'p>(g: &Graph<'p>, logits: &Var) -> Result<Var, MoeError> {
    let [_, experts] = logits.dims()?;
    let mut p = Buffer::from_slice(logits.data());
    activation::softmax_rows(&mut p, experts);
    let output = Tensor::new(logits.shape(), p);
    let (to_logits, p) = (logits.place(), output.clone());
    Ok(g.record_from(&[logits], output, move |dp, back| {
        let mut dx = Buffer::scratch(dp.len());
        activation::softmax_rows_backward(&dp, p.data(), experts, &mut dx);
        back.give(to_logits, dx);
    }))
}

/// 1 / (1 + exp(−x)).
fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// [`logistic`] of every element.
pub(super) fn sigmoid<'p>(g: &Graph<'p>, logits: &Var) -> Var {
    let scores: Buffer<f32> = logits.data().iter().map(|&x| logistic(x)).collect();
    let output = Tensor::new(logits.shape(), scores);
    let (to_logits, s) = (logits.place(), output.clone());
    g.record_from(&[logits], output, move |mut ds, back| {
        ds.iter_mut().zip(s.data()).for_each(|(d, s)| *d *= s * (1.0 - s));
        back.give(to_logits, ds);
    })
}

/// Weights from the chosen scores `chosen` `[tokens, k]`: in the plan's row order with a gradient, and by token.
pub(super) fn weigh<'p>(
    g: &Graph<'p>,
    settings: &RouterSettings,
    scores: &Var,
    plan: &Rc<Plan>,
    index: &[u32],
    chosen: Buffer<f32>,
) -> (Var, Tensor) {
    let (k, settings) = (settings.top_k, *settings);
    let mut weights = Buffer::from_slice(&chosen);
    for weights in weights.chunks_exact_mut(k) {
        settings.weigh(weights);
    }
    let by_token = Tensor::new(&[plan.n_tokens(), k], weights);
    let rows = plan.rows_of_token().1;
    let mut by_row = Buffer::scratch(rows.len());
    rows.iter().zip(by_token.data()).for_each(|(&row, &weight)| by_row[row as usize] = weight);
    let (to_scores, plan, index, weight) = (scores.place(), plan.clone(), index.to_vec(), by_token.clone());
    let output = Tensor::new(&[rows.len()], by_row);
    let var = g.record_from(&[scores], output, move |dw, back| {
        let experts = plan.n_experts();
        let rows = plan.rows_of_token().1;
        let Some(dscores) = back.sum_of(to_scores) else { return };
        let mut d = vec![0.0; k];
        for (t, chosen) in chosen.chunks_exact(k).enumerate() {
            let choices = t * k..(t + 1) * k;
            d.iter_mut().zip(&rows[choices.clone()]).for_each(|(d, &row)| *d = dw[row as usize]);
            settings.weigh_backward(chosen, &weight.data()[choices.clone()], &mut d);
            for (d, &expert) in d.iter().zip(&index[choices]) {
                dscores[t * experts + expert as usize] += d;
            }
        }
    });
    (var, by_token)
}

impl RouterSettings {
    /// Turns a token's chosen scores into weights.
    fn weigh(&self, scores: &mut [f32]) {
        match self.score {
            Score::SoftmaxOfChosen => {
                let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores.iter_mut().for_each(|s| *s = (*s - top).exp());
                let sum: f32 = scores.iter().sum();
                scores.iter_mut().for_each(|s| *s /= sum);
            }
            Score::SigmoidOfChosen => scores.iter_mut().for_each(|s| *s = logistic(*s)),
            Score::Softmax | Score::Sigmoid | Score::SparseMixer { .. } => {}
        }
        if let Some(divisor) = self.normalise.divisor(scores) {
            scores.iter_mut().for_each(|s| *s /= divisor);
        }
        if self.scale != 1.0 {
            scores.iter_mut().for_each(|s| *s *= self.scale);
        }
    }

    /// Turns the gradients of a token's weights into those of its chosen scores.
    fn weigh_backward(&self, chosen: &[f32], weights: &[f32], d: &mut [f32]) {
        let (mut activated, mut by_activation) = (chosen.to_vec(), Self { scale: 1.0, ..*self });
        by_activation.normalise = Normalise::None;
        by_activation.weigh(&mut activated);
        d.iter_mut().for_each(|d| *d *= self.scale);
        if let Some(divisor) = self.normalise.divisor(&activated) {
            // y = s / n: ds_i = (dy_i − Σ dy_j y_j · ∂n/∂s_i) / n.
            let mean: f32 = d.iter().zip(weights).map(|(d, w)| d * w / self.scale).sum();
            for ((d, &s), w) in d.iter_mut().zip(&activated).zip(weights) {
                *d = (*d - mean * self.normalise.slope(s, w / self.scale, divisor)) / divisor;
            }
        }
        match self.score {
            Score::SoftmaxOfChosen => {
                let mean: f32 = d.iter().zip(&activated).map(|(d, p)| d * p).sum();
                d.iter_mut().zip(&activated).for_each(|(d, p)| *d = p * (*d - mean));
            }
            Score::SigmoidOfChosen => d.iter_mut().zip(&activated).for_each(|(d, s)| *d *= s * (1.0 - s)),
            Score::Softmax | Score::Sigmoid | Score::SparseMixer { .. } => {}
        }
    }
}

impl Normalise {
    fn divisor(self, scores: &[f32]) -> Option<f32> {
        let sum = || scores.iter().sum::<f32>();
        match self {
            Self::None => None,
            Self::Sum { plus } => Some(sum() + plus),
            Self::SumAtLeast { least } => Some(sum().max(least)),
            Self::Norm { p } => Some(scores.iter().map(|s| s.abs().powf(p)).sum::<f32>().powf(1.0 / p)),
        }
    }

    /// ∂ divisor / ∂ score of a score that became `y` when it was divided.
    fn slope(self, score: f32, y: f32, divisor: f32) -> f32 {
        match self {
            Self::None => 0.0,
            Self::Sum { .. } => 1.0,
            Self::SumAtLeast { least } => f32::from(u8::from(divisor > least)),
            Self::Norm { p } => y.abs().powf(p - 1.0) * score.signum(),
        }
    }
}
