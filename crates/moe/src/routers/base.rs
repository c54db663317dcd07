//! BASE layers (Lewis et al. 2021): in training the batch is shared out evenly among experts by the assignment of the
//! largest sum of affinities x · w_e (by auction); otherwise each token goes to its best. y = α E_e(x) + (1 − α) x with
//! α = σ(x · w_e). No loss. Training looks at the whole batch.

use super::assignment::auction;
use super::math::{map, pick, row_scores, sigmoid, softmax};
use super::selection::{plan_of, top_k};
use super::{Context, Decision, RoutingMethod, Setup};
use crate::MoeError;
use moebius_tensor::{Graph, Param, Var, ops};

#[derive(Debug)]
struct Base {
    weight: Param,
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    setup.top_k_is(1)?;
    setup.looks_at_the_batch()?;
    Ok(Box::new(Base { weight: setup.score_weight("router")? }))
}

impl RoutingMethod for Base {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, _: &Context<'_>) -> Result<Decision, MoeError> {
        let logits = ops::router_logits(g, x, &self.weight)?;
        let [tokens, experts] = logits.dims()?;
        let chosen = if g.is_training() {
            let (low, high) =
                logits.data().iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
            // The authors' step: small steps find better sums, large ones end sooner.
            let epsilon = (f64::from(high - low) / 50.0).max(1e-4);
            if !epsilon.is_finite() {
                let reason = "the scores are not finite".to_owned();
                return Err(MoeError::Refused { router: "base", reason });
            }
            auction(logits.data(), experts, epsilon)
        } else {
            logits.data().chunks_exact(experts).map(|row| top_k(row, 1)[0]).collect()
        };
        let plan = plan_of(tokens, experts, chosen.iter().copied().enumerate())?;
        let weights = sigmoid(g, &row_scores(g, &logits, &plan));
        let own = pick(g, &logits, chosen.iter().enumerate().map(|(t, e)| t * experts + e).collect());
        let skip = sigmoid(g, &map(g, &own, |s| -s, |_| -1.0));
        let probabilities = softmax(g, &logits)?;
        let capacity = g.is_training().then(|| tokens.div_ceil(experts));
        Ok(Decision { skip: Some(skip), capacity, ..Decision::new(plan, weights, logits, probabilities) })
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

    /// Both tokens like the first expert best; 3 + 1.5 is more than 1 + 2.
    #[test]
    fn in_training_each_expert_has_its_share() {
        let identity = Tensor::new(&[2, 2], vec![1.0, 0.0, 0.0, 1.0]);
        let base = Base { weight: Param::new(0, "router", identity) };
        let x = Var::constant(Tensor::new(&[2, 2], vec![3.0, 1.0, 2.0, 1.5]));
        let sigmoid = |score: f32| 1.0 / (1.0 + (-score).exp());
        let g = Graph::training(Precision::F32);
        let decision = base.decide(&g, &x, &Context::default()).unwrap();
        assert_eq!((decision.plan.offsets(), decision.plan.token()), (&[0, 1, 2][..], &[0, 1][..]));
        close(decision.weights.data(), &[sigmoid(3.0), sigmoid(1.5)]);
        close(decision.skip.unwrap().data(), &[1.0 - sigmoid(3.0), 1.0 - sigmoid(1.5)]);
        let g = Graph::inference(Precision::F32);
        let decision = base.decide(&g, &x, &Context::default()).unwrap();
        assert_eq!(decision.plan.counts(), [2, 0]);
        close(decision.weights.data(), &[sigmoid(3.0), sigmoid(2.0)]);
    }
}
