//! Noisy top-k (Shazeer et al. 2017, eqs. 3-11): H = x W_g + ε · (softplus(x W_n) + 0.01) with ε normal, in training only;
//! weights softmax of the k largest H. Importance_e is the sum of e's weights, Load_e the sum over tokens of the
//! probability Φ((x W_g − τ) / deviation) that e is among the k under new noise of its own, τ the k-th largest H of the
//! others; both losses are CV². The 0.01 is the authors' code's, not the paper's.

use super::math::{add_scaled, map, normal, normalised, row_scores, scalar, softmax, softplus, squared_variation};
use super::selection::{plan_of_choices, top_k, top_k_rows};
use super::{AuxiliaryLoss, Context, Decision, RoutingMethod, Setup};
use crate::{MoeError, Plan};
use moebius_tensor::{Graph, Param, Rng, Var, ops};

/// Weights of noisy scores.
#[derive(Debug)]
pub(super) struct NoisyGate {
    pub(super) gate: Param,
    pub(super) noise: Param,
}

/// Scores with and without noise, and its deviation.
pub(super) struct NoisyScores {
    pub(super) clean: Var,
    pub(super) deviation: Var,
    pub(super) noisy: Var,
}

impl NoisyGate {
    pub(super) fn score<'p>(&'p self, g: &Graph<'p>, x: &Var, seed: u64) -> Result<NoisyScores, MoeError> {
        let clean = ops::router_logits(g, x, &self.gate)?;
        let deviation = map(g, &softplus(g, &ops::router_logits(g, x, &self.noise)?), |s| s + 0.01, |_| 1.0);
        let mut noise = vec![0.0; clean.data().len()];
        if g.is_training() {
            Rng::new(seed).fill_normal(&mut noise, 1.0);
        }
        let noisy = add_scaled(g, &clean, &deviation, noise);
        Ok(NoisyScores { clean, deviation, noisy })
    }
}

/// A smooth load: `[experts]` sums of probabilities, and how to bring slopes of the loads back to the scores.
pub(super) struct SmoothLoad {
    pub(super) loads: Vec<f64>,
    /// (expert, place of the score, place of the threshold, d P / d clean, z)
    terms: Vec<(usize, usize, usize, f64, f64)>,
}

impl NoisyScores {
    /// Load of the `columns` (a run of experts among which `k` are chosen) over `tokens`.
    pub(super) fn load(&self, tokens: &[usize], columns: std::ops::Range<usize>, k: usize) -> SmoothLoad {
        let experts = self.noisy.shape()[1];
        let mut load = SmoothLoad { loads: vec![0.0; columns.len()], terms: Vec::new() };
        for &t in tokens {
            let at = t * experts + columns.start;
            let best = top_k(&self.noisy.data()[at..at + columns.len()], k + 1);
            for e in 0..columns.len() {
                let threshold = if best[..k].contains(&e) { best[k] } else { best[k - 1] };
                let sd = f64::from(self.deviation.data()[at + e]);
                let gap = f64::from(self.clean.data()[at + e]) - f64::from(self.noisy.data()[at + threshold]);
                let (probability, density) = normal(gap / sd);
                load.loads[e] += probability;
                load.terms.push((e, at + e, at + threshold, density / sd, gap / sd));
            }
        }
        load
    }

    /// A loss of loads: `value`, whose slope by the load e of loads[i] is `slopes[i][e]`.
    pub(super) fn loss<'p>(&self, g: &Graph<'p>, value: f64, loads: &[(SmoothLoad, Vec<f64>)]) -> Var {
        let len = self.noisy.data().len();
        let (mut clean, mut deviation, mut noisy) = (vec![0.0; len], vec![0.0; len], vec![0.0; len]);
        for (load, slopes) in loads {
            for &(e, at, threshold, density, z) in &load.terms {
                let slope = slopes[e] * density;
                clean[at] += slope as f32;
                noisy[threshold] -= slope as f32;
                deviation[at] -= (slope * z) as f32;
            }
        }
        scalar(g, value, vec![(&self.clean, clean), (&self.deviation, deviation), (&self.noisy, noisy)])
    }
}

/// CV² of the sums of each expert's row weights.
pub(super) fn importance_loss<'p>(g: &Graph<'p>, weights: &Var, plan: &Plan) -> Var {
    let mut sums = vec![0.0; plan.n_experts()];
    super::math::experts_of_rows(plan).zip(weights.data()).for_each(|(e, &w)| sums[e] += f64::from(w));
    let (value, slopes) = squared_variation(&sums);
    let slopes = super::math::experts_of_rows(plan).map(|e| slopes[e] as f32).collect();
    scalar(g, value, vec![(weights, slopes)])
}

#[derive(Debug)]
struct NoisyTopK {
    gate: NoisyGate,
    top_k: usize,
    importance: f32,
    load: f32,
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    let top_k = setup.top_k_up_to(setup.experts)?;
    if top_k == setup.experts {
        return Err(setup.refuse(format!(
            "wanted fewer choices than the {} experts (the load has no threshold otherwise), found {top_k}",
            setup.experts
        )));
    }
    if top_k == 1 {
        // Softmax over one value.
        return Err(MoeError::NoRouterGradient);
    }
    Ok(Box::new(NoisyTopK {
        gate: NoisyGate { gate: setup.score_weight("router")?, noise: setup.score_weight("router_noise")? },
        top_k,
        importance: setup.number("importance", 0.1, 0.0..=10.0)? as f32,
        load: setup.number("load", 0.1, 0.0..=10.0)? as f32,
    }))
}

impl RoutingMethod for NoisyTopK {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, context: &Context<'_>) -> Result<Decision, MoeError> {
        let scores = self.gate.score(g, x, context.seed)?;
        let [tokens, experts] = scores.noisy.dims()?;
        let probabilities = softmax(g, &scores.noisy)?;
        let choices = top_k_rows(scores.noisy.data(), experts, self.top_k);
        let plan = plan_of_choices(experts, &choices)?;
        // Softmax over the chosen is softmax over all, normalised over the chosen.
        let weights = normalised(g, &row_scores(g, &probabilities, &plan), &plan, 1.0);
        let load = scores.load(&(0..tokens).collect::<Vec<_>>(), 0..experts, self.top_k);
        let (value, slopes) = squared_variation(&load.loads);
        let losses = vec![
            AuxiliaryLoss {
                name: "importance",
                coefficient: self.importance,
                value: importance_loss(g, &weights, &plan),
            },
            AuxiliaryLoss { name: "load", coefficient: self.load, value: scores.loss(g, value, &[(load, slopes)]) },
        ];
        let decision = Decision::new(plan, weights, scores.clean, probabilities);
        Ok(Decision { losses, ..decision })
    }

    /// Zero: at first the noise alone chooses, evenly (Shazeer et al. 2017, appendix A).
    fn initial_deviation(&self, _: &Param) -> Option<f32> {
        Some(0.0)
    }

    fn params(&self) -> Vec<&Param> {
        vec![&self.gate.gate, &self.gate.noise]
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        vec![&mut self.gate.gate, &mut self.gate.noise]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{by_scores, close};
    use super::*;
    use moebius_kernels::gemm::Precision;
    use moebius_tensor::Tensor;

    /// Three experts that score 2, 1, 0 on one token and 0, 1, 2 on the other; no noise, for nothing is trained.
    #[test]
    fn weights_and_losses_without_noise() {
        let method = by_scores("noisy_top_k", [3, 2], &[], &|name| match name {
            "router" => Some(vec![1.0, 0.0, -1.0]),
            _ => None,
        });
        let g = Graph::inference(Precision::F32);
        let x = Var::constant(Tensor::new(&[2, 2], vec![1.0, 0.0, -1.0, 0.0]));
        let decision = method.decide(&g, &x, &Context::default()).unwrap();
        assert_eq!((decision.plan.offsets(), decision.plan.token()), (&[0, 1, 3, 4][..], &[0, 0, 1, 1][..]));
        let (more, less) = (0.731_058_6_f64, 0.268_941_4_f64);
        close(decision.weights.data(), &[more, less, less, more].map(|w| w as f32));
        let variation = |values: [f64; 3]| {
            let mean = values.iter().sum::<f64>() / 3.0;
            (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 3.0 / (mean * mean)) as f32
        };
        close(decision.losses[0].value.data(), &[variation([more, 2.0 * less, more])]);
        // Deviation ln 2 + 0.01. On the first token the best has the third's score below it, 2 away; the second has it 1
        // away; the third would have to pass the second, 1 away.
        let chance = |gap: f64| normal(gap / (2f64.ln() + 0.01)).0;
        let outer = chance(2.0) + chance(-1.0);
        close(decision.losses[1].value.data(), &[variation([outer, 2.0 * chance(1.0), outer])]);
    }

    #[test]
    fn noise_is_drawn_in_training_only_and_by_the_seed() {
        let method = by_scores("noisy_top_k", [3, 2], &[], &|_| None);
        let x = Var::constant(Tensor::new(&[64, 2], vec![1.0; 128]));
        let counts = |training: bool, seed: u64| {
            let g = if training { Graph::training(Precision::F32) } else { Graph::inference(Precision::F32) };
            method.decide(&g, &x, &Context { seed, ..Context::default() }).unwrap().plan.counts()
        };
        // Ties go to the lower index.
        assert_eq!(counts(false, 1), [64, 64, 0]);
        let [first, again, other] = [1, 1, 2].map(|seed| counts(true, seed));
        assert!(first == again && first != other && first.iter().all(|&count| count > 20), "{first:?} {other:?}");
        assert!(method.params().iter().all(|param| method.initial_deviation(param) == Some(0.0)));
    }
}
