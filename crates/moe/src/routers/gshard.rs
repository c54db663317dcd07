//! GShard (Lepikhin et al. 2020, algorithm 1): two experts a token with weights g / (g1 + g2); the second is kept with
//! probability min(1, 2 g2) (paper) or min(1, g2 / 0.2) (the authors' code); capacity by groups of tokens, all first
//! choices before any second; the balance loss counts first choices only. A dropped choice's weight is not given to
//! the other one.

use super::balancing::share_loss;
use super::math::{pick, softmax};
use super::selection::{by_rank, capacity, fill, least_tokens, plan_of, top_k_rows};
use super::{AuxiliaryLoss, Context, Decision, RoutingMethod, Setup};
use crate::MoeError;
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Param, Rng, Tensor, Var, ops};

#[derive(Debug)]
struct GShard {
    weight: Param,
    capacity_factor: f64,
    group: usize,
    /// The second expert is kept with probability min(1, g2 · this).
    second_factor: f32,
    random_second: bool,
    balance: f32,
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    setup.top_k_is(2)?;
    Ok(Box::new(GShard {
        weight: setup.score_weight("router")?,
        capacity_factor: setup.number("capacity_factor", 1.25, 1e-3..=1e6)?,
        group: setup.count("group", 1024, 1..=1 << 30)?,
        second_factor: setup.number("second_factor", 2.0, 1e-3..=1e9)? as f32,
        random_second: setup.flag("random_second", true)?,
        balance: setup.number("balance", 0.01, 0.0..=10.0)? as f32,
    }))
}

impl GShard {
    /// Second choices that the draw rejects are taken away; both are weighted by their shares of g1 + g2 all the same.
    fn draw(&self, probabilities: &[f32], choices: &mut [Vec<usize>], seed: u64) {
        let (experts, mut rng) = (self.weight.shape()[0], Rng::new(seed));
        for (row, chosen) in probabilities.chunks_exact(experts).zip(choices) {
            let share = row[chosen[1]] / (row[chosen[0]] + row[chosen[1]] + 1e-9);
            if rng.uniform() >= share * self.second_factor {
                chosen.truncate(1);
            }
        }
    }
}

/// p of a row over the sum of its token's two best, taken or dropped.
fn shares<'p>(g: &Graph<'p>, probabilities: &Var, pairs: &[[usize; 2]]) -> Var {
    let own = pick(g, probabilities, pairs.iter().map(|pair| pair[0]).collect());
    let other = pick(g, probabilities, pairs.iter().map(|pair| pair[1]).collect());
    let (a, b) = (own.value().clone(), other.value().clone());
    let output = a.data().iter().zip(b.data()).map(|(a, b)| a / (a + b + 1e-9)).collect::<Buffer<f32>>();
    let (to_own, to_other) = (own.place(), other.place());
    g.record_from(&[&own, &other], Tensor::new(&[pairs.len()], output), move |dy, back| {
        let slope = |of: fn(f32, f32) -> f32| {
            let both = a.data().iter().zip(b.data()).zip(dy.iter());
            both.map(|((&a, &b), dy)| dy * of(a, b) / (a + b + 1e-9).powi(2)).collect::<Buffer<f32>>()
        };
        back.give(to_own, slope(|_, b| b + 1e-9));
        back.give(to_other, slope(|a, _| -a));
    })
}

impl RoutingMethod for GShard {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, context: &Context<'_>) -> Result<Decision, MoeError> {
        let logits = ops::router_logits(g, x, &self.weight)?;
        let [tokens, experts] = logits.dims()?;
        let probabilities = softmax(g, &logits)?;
        let both = top_k_rows(probabilities.data(), experts, 2);
        let mut choices = both.clone();
        let mut counts = vec![0; experts];
        both.iter().for_each(|chosen| counts[chosen[0]] += 1);
        let (mut taken, mut dropped, mut most) = (Vec::new(), 0, None);
        if g.is_training() {
            if self.random_second {
                self.draw(probabilities.data(), &mut choices, context.seed);
            }
            let order: Vec<usize> = (0..tokens).collect();
            let mut sum = 0;
            for group in order.chunks(self.group) {
                let limit = capacity("gshard", self.capacity_factor, 2, group.len(), experts)?;
                let (mine, lost) = fill(experts, limit, by_rank(group, &choices, 2));
                taken.extend(mine);
                dropped += lost;
                sum += limit;
            }
            most = Some(sum);
        } else {
            taken.extend(choices.iter().enumerate().flat_map(|(t, c)| c.iter().map(move |&e| (t, e))));
        }
        let plan = plan_of(tokens, experts, taken)?;
        let rows = super::math::experts_of_rows(&plan).zip(plan.token());
        let pairs: Vec<[usize; 2]> = rows
            .map(|(expert, &token)| {
                let chosen = &both[token as usize];
                let other = if chosen[0] == expert { chosen[1] } else { chosen[0] };
                [expert, other].map(|e| token as usize * experts + e)
            })
            .collect();
        let weights = shares(g, &probabilities, &pairs);
        let value = share_loss(g, &probabilities, &counts);
        let losses = vec![AuxiliaryLoss { name: "balance", coefficient: self.balance, value }];
        let decision = Decision::new(plan, weights, logits, probabilities);
        Ok(Decision { losses, capacity: most, dropped, ..decision })
    }

    fn least_tokens(&self) -> usize {
        least_tokens(self.capacity_factor, 2, self.weight.shape()[0])
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
    fn firsts_before_seconds_on_paper() {
        // Two experts that read one coordinate each; capacity 2 of three tokens.
        let weight = Param::new(0, "w", Tensor::new(&[2, 2], vec![1.0, 0.0, 0.0, 1.0]));
        let router = GShard {
            weight,
            capacity_factor: 2.0 / 3.0,
            group: 3,
            second_factor: 1e9,
            random_second: true,
            balance: 0.0,
        };
        let ln = f32::ln;
        let x = [0.75, 0.25, 0.4, 0.6, 0.9, 0.1].map(ln);
        let x = Var::constant(Tensor::new(&[3, 2], x.to_vec()));
        let decision = router.decide(&Graph::training(Precision::F32), &x, &Context::default()).unwrap();
        // Expert 0: firsts of tokens 0 and 2; expert 1: first of token 1, then the second of token 0.
        assert_eq!(decision.plan.token(), [0, 2, 0, 1]);
        assert_eq!((decision.plan.offsets(), decision.dropped), (&[0, 2, 4][..], 2));
        for (found, wanted) in decision.weights.data().iter().zip([0.75, 0.9, 0.25, 0.6]) {
            assert!((found - wanted).abs() < 1e-5, "{found} {wanted}");
        }
    }
}
