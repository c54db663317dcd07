//! V-MoE (Riquelme et al. 2021): softmax over all experts, then the k best of scores with normal noise of deviation 1 / E
//! (in training), weights not renormalised; importance and load losses; capacity with all first choices before any
//! second, tokens in their order or, batch-prioritised, in falling order of their largest weight, so that little
//! capacity drops the least important. A group is the whole batch: in a causal model batch priority leaks.

use super::math::{add_scaled, normal, row_scores, scalar, softmax, squared_variation};
use super::selection::{by_rank, capacity, fill, least_tokens, plan_of, top_k, top_k_rows};
use super::{AuxiliaryLoss, Context, Decision, RoutingMethod, Setup};
use crate::MoeError;
use moebius_tensor::{Graph, Param, Rng, Tensor, Var, ops};

#[derive(Debug)]
struct Vision {
    weight: Param,
    top_k: usize,
    capacity_factor: f64,
    batch_priority: bool,
    noise: bool,
    importance: f32,
    load: f32,
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    let top_k = setup.top_k_up_to(setup.experts)?;
    let batch_priority = setup.flag("batch_priority", false)?;
    if batch_priority {
        setup.looks_at_the_batch()?;
    }
    Ok(Box::new(Vision {
        weight: setup.score_weight("router")?,
        top_k,
        capacity_factor: setup.number("capacity_factor", 1.05, 1e-3..=1e6)?,
        batch_priority,
        noise: setup.flag("noise", true)?,
        importance: setup.number("importance", 0.005, 0.0..=10.0)? as f32,
        load: setup.number("load", 0.005, 0.0..=10.0)? as f32,
    }))
}

/// CV² of each expert's mean probability over all tokens.
fn importance<'p>(g: &Graph<'p>, probabilities: &Var, experts: usize) -> Var {
    let mut sums = vec![0.0; experts];
    probabilities.data().iter().enumerate().for_each(|(i, &p)| sums[i % experts] += f64::from(p));
    let (value, slopes) = squared_variation(&sums);
    let slopes = (0..probabilities.data().len()).map(|i| slopes[i % experts] as f32).collect();
    scalar(g, value, vec![(probabilities, slopes)])
}

impl Vision {
    /// CV² of Σ_t Φ((ℓ − τ) · E), τ the token's k-th largest noisy score (as the authors' code has it).
    fn load_loss<'p>(&self, g: &Graph<'p>, logits: &Var, noisy: &Var, experts: usize) -> Var {
        let (mut loads, mut terms) = (vec![0.0; experts], Vec::new());
        let factor = experts as f64;
        for (t, row) in noisy.data().chunks_exact(experts).enumerate() {
            let threshold = t * experts + top_k(row, self.top_k)[self.top_k - 1];
            for (e, load) in loads.iter_mut().enumerate() {
                let at = t * experts + e;
                let gap = f64::from(logits.data()[at]) - f64::from(noisy.data()[threshold]);
                let (probability, density) = normal(gap * factor);
                *load += probability;
                terms.push((e, at, threshold, density * factor));
            }
        }
        let (value, slopes) = squared_variation(&loads);
        let (mut to_logits, mut to_noisy) = (vec![0.0; logits.data().len()], vec![0.0; logits.data().len()]);
        for (e, at, threshold, density) in terms {
            to_logits[at] += (slopes[e] * density) as f32;
            to_noisy[threshold] -= (slopes[e] * density) as f32;
        }
        scalar(g, value, vec![(logits, to_logits), (noisy, to_noisy)])
    }
}

impl RoutingMethod for Vision {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, context: &Context<'_>) -> Result<Decision, MoeError> {
        let logits = ops::router_logits(g, x, &self.weight)?;
        let [tokens, experts] = logits.dims()?;
        let clean = softmax(g, &logits)?;
        let mut noise = vec![0.0; tokens * experts];
        if g.is_training() && self.noise {
            Rng::new(context.seed).fill_normal(&mut noise, 1.0 / experts as f32);
        }
        let ones = Var::constant(Tensor::new(&[tokens, experts], vec![1.0; tokens * experts]));
        let noisy = add_scaled(g, &logits, &ones, noise);
        let probabilities = softmax(g, &noisy)?;
        let choices = top_k_rows(probabilities.data(), experts, self.top_k);
        let limit = if g.is_training() || self.batch_priority {
            Some(capacity("vision", self.capacity_factor, self.top_k, tokens, experts)?)
        } else {
            None
        };
        let mut order: Vec<usize> = (0..tokens).collect();
        if self.batch_priority {
            let best = |t: usize| probabilities.data()[t * experts + choices[t][0]];
            order.sort_by(|&a, &b| best(b).total_cmp(&best(a)).then(a.cmp(&b)));
        }
        let (taken, dropped) = fill(experts, limit.unwrap_or(usize::MAX), by_rank(&order, &choices, self.top_k));
        let plan = plan_of(tokens, experts, taken)?;
        let weights = row_scores(g, &probabilities, &plan);
        let (importance_value, load_value) =
            (importance(g, &clean, experts), self.load_loss(g, &logits, &noisy, experts));
        let losses = vec![
            AuxiliaryLoss { name: "importance", coefficient: self.importance, value: importance_value },
            AuxiliaryLoss { name: "load", coefficient: self.load, value: load_value },
        ];
        let decision = Decision::new(plan, weights, logits, probabilities);
        Ok(Decision { losses, capacity: limit, dropped, ..decision })
    }

    fn least_tokens(&self) -> usize {
        least_tokens(self.capacity_factor, self.top_k, self.weight.shape()[0])
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
    use moebius_kernels::gemm::Precision;

    #[test]
    fn priority_drops_the_least_important() {
        let weight = || Param::new(0, "w", Tensor::new(&[2, 2], vec![1.0, 0.0, 0.0, 1.0]));
        let x = Var::constant(Tensor::new(&[3, 2], [0.6, 0.4, 0.9, 0.1, 0.8, 0.2].map(f32::ln).to_vec()));
        // Capacity ⌈2/3 · 3 / 2⌉ = 1: in order token 0 gets in, by priority token 1.
        for (batch_priority, wanted) in [(false, 0), (true, 1)] {
            let router = Vision {
                weight: weight(),
                top_k: 1,
                capacity_factor: 2.0 / 3.0,
                batch_priority,
                noise: false,
                importance: 0.0,
                load: 0.0,
            };
            let decision = router.decide(&Graph::training(Precision::F32), &x, &Context::default()).unwrap();
            assert_eq!((decision.plan.token(), decision.dropped), (&[wanted][..], 2));
        }
    }
}
