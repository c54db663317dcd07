//! Sinkhorn routing (S-BASE of Clark et al. 2022; Sinkhorn 1967): in training rows and columns of exp(ℓ / τ) are rescaled
//! in turn to sums 1 and T / E, and a token goes to the k largest of its row; otherwise to the k largest scores. The
//! weight is the ordinary softmax or sigmoid of the score. Nothing flows through the rescaling. Training looks at the
//! whole batch.

use super::math::{row_scores, sigmoid, softmax};
use super::selection::{plan_of_choices, top_k_rows};
use super::{Context, Decision, RoutingMethod, Setup};
use crate::MoeError;
use moebius_tensor::{Graph, Param, Var, ops};

#[derive(Debug)]
struct Sinkhorn {
    weight: Param,
    top_k: usize,
    temperature: f64,
    rounds: usize,
    sigmoid: bool,
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    let top_k = setup.top_k_up_to(setup.experts)?;
    setup.looks_at_the_batch()?;
    Ok(Box::new(Sinkhorn {
        weight: setup.score_weight("router")?,
        top_k,
        temperature: setup.number("temperature", 1.0, 1e-3..=1e3)?,
        rounds: setup.count("rounds", 50, 1..=100_000)?,
        sigmoid: setup.word("weight", &["softmax", "sigmoid"])? == 1,
    }))
}

/// exp(scores / temperature) with rows of sum 1 and columns of sum tokens / experts, nearly; columns last.
fn rescaled(scores: &[f32], experts: usize, temperature: f64, rounds: usize) -> Vec<f32> {
    let tokens = scores.len() / experts;
    let mut a = Vec::with_capacity(scores.len());
    for row in scores.chunks_exact(experts) {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        a.extend(row.iter().map(|&s| (f64::from(s - largest) / temperature).exp().max(1e-300)));
    }
    for _ in 0..rounds {
        for row in a.chunks_exact_mut(experts) {
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|v| *v /= sum);
        }
        for e in 0..experts {
            let sum: f64 = a.iter().skip(e).step_by(experts).sum();
            let factor = tokens as f64 / experts as f64 / sum;
            a.iter_mut().skip(e).step_by(experts).for_each(|v| *v *= factor);
        }
    }
    a.into_iter().map(|v| v as f32).collect()
}

impl RoutingMethod for Sinkhorn {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, _: &Context<'_>) -> Result<Decision, MoeError> {
        let logits = ops::router_logits(g, x, &self.weight)?;
        let [_, experts] = logits.dims()?;
        let choices = if g.is_training() {
            top_k_rows(&rescaled(logits.data(), experts, self.temperature, self.rounds), experts, self.top_k)
        } else {
            top_k_rows(logits.data(), experts, self.top_k)
        };
        let plan = plan_of_choices(experts, &choices)?;
        let probabilities = softmax(g, &logits)?;
        let scores = if self.sigmoid { sigmoid(g, &logits) } else { probabilities.clone() };
        let weights = row_scores(g, &scores, &plan);
        Ok(Decision::new(plan, weights, logits, probabilities))
    }

    fn params(&self) -> Vec<&Param> {
        vec![&self.weight]
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        vec![&mut self.weight]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_rows_and_columns() {
        let scores = [3.0, 0.0, 1.0, 2.0, 1.0, 0.5, 2.5, 0.2];
        let a = rescaled(&scores, 2, 1.0, 200);
        for row in a.chunks_exact(2) {
            assert!((row[0] + row[1] - 1.0).abs() < 1e-4, "{a:?}");
        }
        assert!((a.iter().step_by(2).sum::<f32>() - 2.0).abs() < 1e-4, "{a:?}");
        // Three of four tokens prefer expert 0; after rescaling two stay.
        assert_eq!(top_k_rows(&a, 2, 1), [[0], [1], [1], [0]]);
    }
}
