//! Switch (Fedus et al. 2021): one expert a token, weight p of the chosen one (not renormalised: it is the router's only
//! task gradient), capacity C = ⌈CF · T / E⌉ filled in token order, balance loss E Σ f_e P_e with f counted before
//! anything is dropped, and jitter: in training the router reads x times numbers uniform in 1 ± jitter.

use super::balancing::share_loss;
use super::math::{multiply, row_scores, softmax};
use super::selection::{by_rank, capacity, fill, least_tokens, plan_of, top_k_rows};
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

    fn least_tokens(&self) -> usize {
        least_tokens(self.capacity_factor, 1, self.weight.shape()[0])
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
    use super::super::testing::close;
    use super::*;
    use moebius_kernels::gemm::Precision;
    use moebius_tensor::Tensor;

    /// Two experts that score one coordinate each; tokens by the probability of the first.
    #[test]
    fn the_first_tokens_are_served_and_f_counts_all() {
        let identity = Tensor::new(&[2, 2], vec![1.0, 0.0, 0.0, 1.0]);
        let switch = |drop_in_inference| Switch {
            weight: Param::new(0, "router", identity.clone()),
            capacity_factor: 1.0,
            jitter: 0.0,
            balance: 0.01,
            drop_in_inference,
        };
        let p = [0.7_f32, 0.7, 0.8, 0.4];
        let x = Tensor::new(&[4, 2], p.iter().flat_map(|p| [p.ln(), (1.0 - p).ln()]).collect::<Vec<_>>());
        let x = Var::constant(x);
        for (method, training) in &[(switch(false), true), (switch(true), false)] {
            let g = if *training { Graph::training(Precision::F32) } else { Graph::inference(Precision::F32) };
            let decision = method.decide(&g, &x, &Context::default()).unwrap();
            // Capacity 4 / 2: the third token finds the first expert full.
            assert_eq!((decision.plan.offsets(), decision.plan.token()), (&[0, 2, 3][..], &[0, 1, 3][..]));
            assert_eq!((decision.capacity, decision.dropped), (Some(2), 1));
            close(decision.weights.data(), &[0.7, 0.7, 0.6]);
            // 2 (3/4 · 2.6/4 + 1/4 · 1.4/4).
            close(decision.losses[0].value.data(), &[2.0 * (0.75 * 0.65 + 0.25 * 0.35)]);
        }
        let whole = switch(false);
        let g = Graph::inference(Precision::F32);
        let decision = whole.decide(&g, &x, &Context::default()).unwrap();
        assert_eq!((decision.plan.counts(), decision.capacity, decision.dropped), (vec![3, 1], None, 0));
    }
}
