//! Loss-free balancing (Wang et al. 2024; DeepSeek-V3, 2024): experts are chosen by score + b, weighted by the score
//! alone; after each optimiser step b_e += γ sign(mean count − count_e), without a gradient (an overloaded expert's bias
//! falls). V3 adds a sequence-wise loss with a small coefficient, its shares counted before the bias.

use super::balancing::{sequence_balance_loss, share_loss};
use super::math::sigmoid;
use super::selection::top_k_rows;
use super::top_k::groups;
use super::{AuxiliaryLoss, Context, Decision, RoutingMethod, Setup};
use crate::{MoeError, Normalise, Router, RouterSettings, Routing, Score, TopKRouter};
use moebius_tensor::{Graph, Param, Var};

#[derive(Debug)]
struct LossFree {
    /// Its selection bias `[experts]` is what follows the load; no gradient ever reaches it.
    router: TopKRouter,
    rate: f32,
    sequence: f32,
    balance: f32,
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    let top_k = setup.top_k_up_to(setup.experts)?;
    let score = if setup.word("score", &["sigmoid", "softmax"])? == 0 { Score::Sigmoid } else { Score::Softmax };
    // What DeepSeek-V3's code adds to the sum.
    let normalise = if setup.flag("renormalise", true)? { Normalise::Sum { plus: 1e-20 } } else { Normalise::None };
    let settings = RouterSettings {
        score,
        selection_bias: true,
        groups: groups(setup)?,
        normalise,
        scale: setup.number("scale", 1.0, 1e-6..=1e6)? as f32,
        ..RouterSettings::softmax(top_k, false)
    };
    if settings.has_no_gradient() {
        return Err(MoeError::NoRouterGradient);
    }
    let weight = setup.score_weight("router")?;
    let bias = (setup.param)("selection_bias", &[setup.experts])?;
    Ok(Box::new(LossFree {
        router: TopKRouter::with(weight, [None, Some(bias)], settings)?,
        rate: setup.number("rate", 1e-3, 0.0..=1.0)? as f32,
        sequence: setup.number("sequence", 1e-4, 0.0..=10.0)? as f32,
        balance: setup.number("balance", 0.0, 0.0..=10.0)? as f32,
    }))
}

impl RoutingMethod for LossFree {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, context: &Context<'_>) -> Result<Decision, MoeError> {
        let Routing { plan, weights, logits, probabilities, .. } = self.router.route(g, x)?;
        let (top_k, experts) = (self.router.settings().top_k, plan.n_experts());
        let is_sigmoid = self.router.settings().score == Score::Sigmoid;
        let scores = if is_sigmoid { sigmoid(g, &logits) } else { probabilities.clone() };
        let mut chosen = vec![false; scores.data().len()];
        for (t, best) in top_k_rows(scores.data(), experts, top_k).iter().enumerate() {
            best.iter().for_each(|e| chosen[t * experts + e] = true);
        }
        let counts: Vec<u64> = plan.counts().into_iter().map(|count| count as u64).collect();
        let sequence = sequence_balance_loss(g, &scores, &chosen, top_k, context.starts);
        let losses = vec![
            AuxiliaryLoss { name: "sequence", coefficient: self.sequence, value: sequence },
            AuxiliaryLoss { name: "balance", coefficient: self.balance, value: share_loss(g, &probabilities, &counts) },
        ];
        Ok(Decision { losses, ..Decision::new(plan, weights, logits, probabilities) })
    }

    fn settings(&self) -> Option<&RouterSettings> {
        Some(self.router.settings())
    }

    fn params(&self) -> Vec<&Param> {
        Router::params(&self.router)
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        Router::params_mut(&mut self.router)
    }

    fn after_step(&mut self, counts: &[u64]) {
        let (rate, total, n) = (self.rate, counts.iter().sum::<u64>(), counts.len() as u64);
        let bias = self.router.selection_bias_mut().expect("its settings speak of it");
        bias.update(|bias| {
            for (b, &count) in bias.iter_mut().zip(counts) {
                // In whole numbers, so that an even load leaves the bias alone.
                *b += match (count * n).cmp(&total) {
                    std::cmp::Ordering::Less => rate,
                    std::cmp::Ordering::Equal => 0.0,
                    std::cmp::Ordering::Greater => -rate,
                };
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moebius_kernels::gemm::Precision;
    use moebius_tensor::{Gradients, Tensor};

    fn router(rate: f32) -> LossFree {
        let weight = Tensor::new(&[3, 3], vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
        let (weight, bias) = (Param::new(0, "w", weight), Param::new(1, "b", Tensor::zeros(&[3])));
        let settings = RouterSettings {
            score: Score::Sigmoid,
            selection_bias: true,
            scale: 2.5,
            ..RouterSettings::softmax(2, true)
        };
        let router = TopKRouter::with(weight, [None, Some(bias)], settings).unwrap();
        LossFree { router, rate, sequence: 0.0, balance: 0.0 }
    }

    #[test]
    fn overload_lowers_the_bias() {
        let mut router = router(0.25);
        router.after_step(&[4, 2, 0]);
        let bias = router.router.selection_bias_mut().unwrap();
        assert_eq!(bias.value().data(), [-0.25, 0.0, 0.25]);
    }

    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let mut router = router(0.5);
        router.after_step(&[2, 1, 0]);
        let x = Tensor::new(&[1, 3], vec![1.0, 0.0, -1.0]);
        let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
        let decision = router.decide(&g, &g.variable(x), &Context::default()).unwrap();
        // σ + b: 0.231, 0.5, 0.769.
        assert_eq!(decision.plan.counts(), [0, 1, 1]);
        let s = [0.5, 0.268_941_4];
        for (found, s) in decision.weights.data().iter().zip(s) {
            assert!((found - 2.5 * s / (0.5 + 0.268_941_4)).abs() < 1e-5, "{found}");
        }
        let loss = moebius_tensor::ops::scale(&g, &super::super::math::pick(&g, &decision.weights, vec![0]), 1.0);
        g.backward(&loss, &mut gradients);
        assert!(gradients.get(0).is_some() && gradients.get(1).is_none());
    }

    #[test]
    fn the_bias_evens_a_skewed_load() {
        let mut x = vec![0.0; 300];
        moebius_tensor::Rng::new(5).fill_normal(&mut x, 1.0);
        // The first coordinate is high, the last low: expert 0 has almost all tokens, expert 2 few.
        x.chunks_exact_mut(3).for_each(|row| (row[0], row[2]) = (row[0] + 2.0, row[2] - 2.0));
        let x = Var::constant(Tensor::new(&[100, 3], x));
        let mut router = router(0.01);
        let mut violations = Vec::new();
        for _ in 0..100 {
            let decision = router.decide(&Graph::inference(Precision::F32), &x, &Context::default()).unwrap();
            let mut load = crate::LoadStatistics::default();
            load.add(&decision.plan);
            violations.push(load.max_violation());
            router.after_step(&load.counts);
        }
        assert!(violations[0] > 0.3 && violations[99] < 0.1, "{violations:?}");
    }
}
