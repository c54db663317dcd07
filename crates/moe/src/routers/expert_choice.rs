//! Expert choice (Zhou et al. 2022): each expert takes the k' = c T / E tokens that score highest in its column of the
//! softmax over experts, c the mean number of experts a token; the weight is that probability, not normalised. A token
//! may have 0 to E experts; no balance loss is needed. Choices depend on all tokens of the batch: in a causal model
//! this leaks the future and decoding cannot repeat it.
//!
//! Capped: choose by A that maximises ⟨S, A⟩ + λ entropy(A) with Σ_t A = k' for each expert, Σ_e A <= b for each token
//! and 0 <= A <= 1, found by Dykstra's alternating projections (in the logarithm: λ is small).

use super::math::{row_scores, softmax};
use super::selection::{capacity, least_tokens, plan_of, top_k};
use super::{Context, Decision, RoutingMethod, Setup};
use crate::MoeError;
use moebius_tensor::{Graph, Param, Var, ops};

#[derive(Debug)]
struct ExpertChoice {
    weight: Param,
    experts_per_token: f64,
    /// b; 0: no cap.
    cap: usize,
    lambda: f64,
    rounds: usize,
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    let mean = setup.top_k_up_to(setup.experts)?;
    setup.looks_at_the_batch()?;
    Ok(Box::new(ExpertChoice {
        weight: setup.score_weight("router")?,
        experts_per_token: setup.number("capacity_factor", mean as f64, 1e-3..=setup.experts as f64)?,
        cap: setup.count("cap", 0, 0..=setup.experts)?,
        lambda: setup.number("entropy", 1e-3, 1e-6..=10.0)?,
        rounds: setup.count("rounds", 100, 1..=100_000)?,
    }))
}

fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let largest = values.clone().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY { largest } else { largest + values.map(|v| (v - largest).exp()).sum::<f64>().ln() }
}

/// ln A of the capped assignment of scores `[tokens, experts]`; `take` tokens an expert, at most `cap` experts a token.
fn capped(scores: &[f32], experts: usize, take: usize, cap: usize, lambda: f64, rounds: usize) -> Vec<f64> {
    let mut a: Vec<f64> = scores.iter().map(|&s| f64::from(s) / lambda).collect();
    let tokens = a.len() / experts;
    let (mut by_token, mut by_element) = (vec![0.0; a.len()], vec![0.0; a.len()]);
    for _ in 0..rounds {
        for e in 0..experts {
            let excess = log_sum_exp((0..tokens).map(|t| a[t * experts + e])) - (take as f64).ln();
            (0..tokens).for_each(|t| a[t * experts + e] -= excess);
        }
        // The two inequalities remember what they took (Dykstra's correction, a product of ratios in KL divergence).
        for (row, taken) in a.chunks_exact_mut(experts).zip(by_token.chunks_exact_mut(experts)) {
            row.iter_mut().zip(&*taken).for_each(|(a, q)| *a += q);
            let excess = (log_sum_exp(row.iter().copied()) - (cap as f64).ln()).max(0.0);
            row.iter_mut().for_each(|a| *a -= excess);
            taken.fill(excess);
        }
        for (a, taken) in a.iter_mut().zip(&mut by_element) {
            *a += *taken;
            *taken = a.max(0.0);
            *a = a.min(0.0);
        }
    }
    a
}

impl ExpertChoice {
    /// The factor that gives each expert one of `tokens` tokens.
    fn least(&self, tokens: usize) -> f64 {
        let [experts, _] = *self.weight.shape() else { unreachable!("a matrix") };
        experts as f64 / tokens.max(1) as f64
    }
}

impl RoutingMethod for ExpertChoice {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, _: &Context<'_>) -> Result<Decision, MoeError> {
        let logits = ops::router_logits(g, x, &self.weight)?;
        let [tokens, experts] = logits.dims()?;
        let probabilities = softmax(g, &logits)?;
        // Decoding brings fewer tokens than an expert's share: then it takes one.
        let factor =
            if g.is_training() { self.experts_per_token } else { self.experts_per_token.max(self.least(tokens)) };
        let take = capacity("expert_choice", factor, 1, tokens, experts)?.min(tokens);
        let affinity = if self.cap == 0 {
            probabilities.data().to_vec()
        } else {
            let a = capped(probabilities.data(), experts, take, self.cap, self.lambda, self.rounds);
            // The greatest differences stand far below zero, where f32 still orders them.
            a.into_iter().map(|a| a as f32).collect()
        };
        let pairs = (0..experts).flat_map(|e| {
            let column: Vec<f32> = affinity.iter().skip(e).step_by(experts).copied().collect();
            top_k(&column, take).into_iter().map(move |t| (t, e))
        });
        let plan = plan_of(tokens, experts, pairs)?;
        let weights = row_scores(g, &probabilities, &plan);
        Ok(Decision { capacity: Some(take), ..Decision::new(plan, weights, logits, probabilities) })
    }

    fn least_tokens(&self) -> usize {
        least_tokens(self.experts_per_token, 1, self.weight.shape()[0])
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
    fn a_cap_moves_the_second_expert_to_another_token() {
        // Both experts want token 0 most; capped at one expert a token, the one that loses less goes elsewhere.
        let scores = [0.9, 0.8, 0.1, 0.7];
        let a: Vec<f64> = capped(&scores, 2, 1, 1, 0.05, 500).into_iter().map(f64::exp).collect();
        let wanted = [1.0, 0.0, 0.0, 1.0];
        assert!(a.iter().zip(wanted).all(|(a, wanted)| (a - wanted).abs() < 5e-3), "{a:?}");
    }
}
