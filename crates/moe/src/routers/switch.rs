//! Switch (Fedus et al. 2021): one expert a token, weight p of the chosen one (not renormalised: it is the router's only
//! task gradient), capacity C = ⌈CF · T / E⌉ filled in token order, balance loss E Σ f_e P_e with f counted before
//! anything is dropped, and jitter: in training the router reads x times numbers uniform in 1 ± jitter.

use super::balancing::share_loss;
use super::math::{multiply, row_scores, softmax};
use super::selection::{by_rank, capacity, fill, plan_of, top_k_rows};
use super::{AuxiliaryLoss, Context, Decision, RoutingMethod, Setup};
use crate::MoeError;
use moebius_tensor::{Graph, Param, Rng, Var, ops};

#[derive(Debug)]
struct Switch {
    weight: Param,
    capacity_factor: f64,
    jitter: f32,
    balance: f32,
    drop_in_inference: bool,
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    setup.top_k_is(1)?;
    Ok(Box::new(Switch {
        weight: setup.score_weight("router")?,
        capacity_factor: setup.number("capacity_factor", 1.25, 1e-3..=1e6)?,
        jitter: setup.number("jitter", 0.01, 0.0..=0.99)? as f32,
        balance: setup.number("balance", 0.01, 0.0..=10.0)? as f32,
        drop_in_inference: setup.flag("drop_in_inference", false)?,
    }))
}

impl RoutingMethod for Switch {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, context: &Context<'_>) -> Result<Decision, MoeError> {
        let jittered;
        let x = if g.is_training() && self.jitter > 0.0 {
            let mut factors = vec![0.0; x.data().len()];
            Rng::new(context.seed).fill_uniform(&mut factors, 1.0 - self.jitter, 1.0 + self.jitter);
            jittered = multiply(g, x, factors);
            &jittered
        } else {
            x
        };
        let logits = ops::router_logits(g, x, &self.weight)?;
        let [tokens, experts] = logits.dims()?;
        let probabilities = softmax(g, &logits)?;
        let choices = top_k_rows(probabilities.data(), experts, 1);
        let mut counts = vec![0; experts];
        choices.iter().for_each(|chosen| counts[chosen[0]] += 1);
        let limit = if g.is_training() || self.drop_in_inference {
            Some(capacity("switch", self.capacity_factor, 1, tokens, experts)?)
        } else {
            None
        };
        let order: Vec<usize> = (0..tokens).collect();
        let (taken, dropped) = fill(experts, limit.unwrap_or(usize::MAX), by_rank(&order, &choices, 1));
        let plan = plan_of(tokens, experts, taken)?;
        let weights = row_scores(g, &probabilities, &plan);
        let value = share_loss(g, &probabilities, &counts);
        let losses = vec![AuxiliaryLoss { name: "balance", coefficient: self.balance, value }];
        let decision = Decision::new(plan, weights, logits, probabilities);
        Ok(Decision { losses, capacity: limit, dropped, ..decision })
    }

    /// √(0.1 / inputs): ten times less than usual (Fedus et al. 2021, section 2.4).
    fn initial_deviation(&self, weight: &Param) -> Option<f32> {
        Some((0.1 / weight.shape()[1] as f32).sqrt())
    }

    fn params(&self) -> Vec<&Param> {
        vec![&self.weight]
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        vec![&mut self.weight]
    }
}
