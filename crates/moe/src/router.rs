//! Routers: from scores to a [`Plan`] and the weights of its rows.

use crate::{MoeError, Plan};
use moebius_kernels::memory::Buffer;
use moebius_kernels::{activation, select};
use moebius_tensor::{Graph, Param, Tensor, Var, ops};
use std::rc::Rc;

/// What a router decided for a batch of tokens.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Which expert computes on which token.
    pub plan: Rc<Plan>,
    /// `[assignments]`: the weight of each of the plan's rows in its token's sum.
    pub weights: Var,
    /// `[tokens, experts]`: raw scores.
    pub logits: Var,
    /// `[tokens, experts]`: softmax of the scores.
    pub probabilities: Var,
    /// `[tokens, k]`: chosen experts, best first.
    pub topk_index: Vec<u32>,
    /// `[tokens, k]`: their weights.
    pub topk_weight: Tensor,
}

/// Scores tokens and chooses their experts. Works in f32 whatever the graph's precision.
pub trait Router {
    /// Routes the rows of x `[tokens, hidden]`.
    fn route<'p>(&'p self, g: &Graph<'p>, x: &Var) -> Result<Routing, MoeError>;

    /// Its weights.
    fn params(&self) -> Vec<&Param>;

    /// Its weights, to be changed.
    fn params_mut(&mut self) -> Vec<&mut Param>;
}

/// Softmax over all experts, then the `top_k` most probable, as in Mixtral (renormalised) and OLMoE (raw).
///
/// Ties go to the lower index. The choice has no gradient; the router learns through the weights and the balance
/// losses.
#[derive(Debug)]
pub struct TopKRouter {
    weight: Param,
    top_k: usize,
    renormalise: bool,
}

impl TopKRouter {
    /// A router with the scores x · weightᵀ.
    ///
    /// # Shapes
    /// weight `[experts, hidden]`.
    ///
    /// # Errors
    /// Unless 1 <= `top_k` <= experts.
    pub fn new(weight: Param, top_k: usize, renormalise: bool) -> Result<Self, MoeError> {
        let [experts, _] = weight.value().dims()?;
        if (1..=experts).contains(&top_k) {
            Ok(Self { weight, top_k, renormalise })
        } else {
            Err(MoeError::TopK { top_k, experts })
        }
    }
}

impl Router for TopKRouter {
    fn route<'p>(&'p self, g: &Graph<'p>, x: &Var) -> Result<Routing, MoeError> {
        if g.is_training() && self.top_k == 1 && self.renormalise {
            return Err(MoeError::NoRouterGradient);
        }
        let logits = ops::linear_f32(g, x, &self.weight)?;
        let [tokens, experts] = logits.dims()?;
        let probabilities = softmax(g, &logits)?;
        let mut index = vec![0; tokens * self.top_k];
        let mut best = Buffer::scratch(tokens * self.top_k);
        select::top_k_rows(probabilities.data(), experts, self.top_k, &mut index, &mut best);
        let plan = Rc::new(Plan::from_choices(experts, self.top_k, &index)?);
        let (weights, topk_weight) = self.weigh(g, &probabilities, &plan, &index, best);
        Ok(Routing { plan, weights, logits, probabilities, topk_index: index, topk_weight })
    }

    fn params(&self) -> Vec<&Param> {
        vec![&self.weight]
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        vec![&mut self.weight]
    }
}

impl TopKRouter {
    /// Weights from the chosen probabilities `best` `[tokens, k]`: in the plan's row order with a gradient, and by token.
    fn weigh<'p>(
        &self,
        g: &Graph<'p>,
        probabilities: &Var,
        plan: &Rc<Plan>,
        index: &[u32],
        mut best: Buffer<f32>,
    ) -> (Var, Tensor) {
        let (k, renormalise) = (self.top_k, self.renormalise);
        let sums: Vec<f32> = best.chunks_exact(k).map(|chosen| chosen.iter().sum()).collect();
        if renormalise {
            for (chosen, sum) in best.chunks_exact_mut(k).zip(&sums) {
                chosen.iter_mut().for_each(|p| *p /= sum);
            }
        }
        let by_token = Tensor::new(&[plan.n_tokens(), k], best);
        let rows = plan.rows_of_token().1;
        let mut by_row = Buffer::scratch(rows.len());
        rows.iter().zip(by_token.data()).for_each(|(&row, &weight)| by_row[row as usize] = weight);
        let (to_probabilities, plan, index, weight) =
            (probabilities.place(), plan.clone(), index.to_vec(), by_token.clone());
        let output = Tensor::new(&[rows.len()], by_row);
        let var = g.record_from(&[probabilities], output, move |dw, back| {
            let experts = plan.n_experts();
            let rows = plan.rows_of_token().1;
            let Some(dp) = back.sum_of(to_probabilities) else { return };
            for (t, &sum) in sums.iter().enumerate() {
                let choices = t * k..(t + 1) * k;
                // Renormalised, w = p / s: dp_i = (dw_i − Σ dw_j w_j) / s.
                let mean: f32 = choices.clone().map(|c| dw[rows[c] as usize] * weight.data()[c]).sum();
                for c in choices {
                    let d = dw[rows[c] as usize];
                    dp[t * experts + index[c] as usize] += if renormalise { (d - mean) / sum } else { d };
                }
            }
        });
        (var, by_token)
    }
}

/// Softmax over the last dimension of `[tokens, experts]`.
fn softmax<'p>(g: &Graph<'p>, logits: &Var) -> Result<Var, MoeError> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use moebius_kernels::gemm::Precision;

    fn router(top_k: usize, renormalise: bool) -> TopKRouter {
        // Three experts that read one coordinate each.
        let weight = Tensor::new(&[3, 3], vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
        TopKRouter::new(Param::new(0, "gate", weight), top_k, renormalise).unwrap()
    }

    #[test]
    fn routing_on_paper() {
        let ln = |p: f32| p.ln();
        let x = Var::constant(Tensor::new(&[2, 3], vec![ln(0.5), ln(0.2), ln(0.3), 0.0, 0.0, 0.0]));
        for (renormalise, expected) in [(true, [0.625, 0.375, 0.5, 0.5]), (false, [0.5, 0.3, 1.0 / 3.0, 1.0 / 3.0])] {
            let router = router(2, renormalise);
            let routing = router.route(&Graph::inference(Precision::Bf16), &x).unwrap();
            // Equal scores go to the lower index.
            assert_eq!(routing.topk_index, [0, 2, 0, 1]);
            for (found, wanted) in routing.topk_weight.data().iter().zip(expected) {
                assert!((found - wanted).abs() < 1e-6, "{found} {wanted}");
            }
            assert_eq!(routing.plan.counts(), [2, 1, 1]);
        }
    }

    #[test]
    fn a_router_without_gradient_is_refused_in_training_only() {
        let router = router(1, true);
        let x = Var::constant(Tensor::zeros(&[1, 3]));
        assert!(router.route(&Graph::inference(Precision::F32), &x).is_ok());
        let error = router.route(&Graph::training(Precision::F32), &x).unwrap_err();
        assert_eq!(error, MoeError::NoRouterGradient);
    }

    #[test]
    fn a_router_without_gradient_is_refused_before_it_is_recomputed() {
        let router = router(1, true);
        let g = Graph::training(Precision::F32);
        let x = g.variable(Tensor::zeros(&[1, 3]));
        let error = g.checkpoint(&x, |g, x| router.route(g, x).map(|routing| vec![routing.weights])).unwrap_err();
        assert_eq!(error, MoeError::NoRouterGradient);
        assert!(error.to_string().contains("use raw weights or at least two choices"));
    }

    #[test]
    fn routing_is_f32_whatever_the_precision() {
        let mut data = vec![0.0; 64 * 96];
        moebius_tensor::Rng::new(3).fill_normal(&mut data, 1.0);
        let weight = Tensor::new(&[8, 96], data[..8 * 96].to_vec());
        let router = TopKRouter::new(Param::new(0, "gate", weight), 2, true).unwrap();
        let x = Var::constant(Tensor::new(&[64, 96], data));
        let [full, half] = [Precision::F32, Precision::Bf16].map(|p| router.route(&Graph::inference(p), &x).unwrap());
        moebius_testkit::same_bits("logits", half.logits.data(), full.logits.data());
        moebius_testkit::same_bits("weights", half.weights.data(), full.weights.data());
        assert_eq!(half.plan, full.plan);
    }

    #[test]
    fn weights_stand_in_the_plans_order() {
        let x = Var::constant(Tensor::new(&[2, 3], vec![0.0, 1.0, 3.0, 2.0, 0.0, 1.0]));
        let routing = router(2, true).route(&Graph::inference(Precision::F32), &x).unwrap();
        assert_eq!(routing.topk_index, [2, 1, 0, 2]);
        for row in 0..4 {
            let (token, slot) = (routing.plan.token()[row] as usize, routing.plan.slot()[row] as usize);
            assert_eq!(routing.weights.data()[row], routing.topk_weight.data()[token * 2 + slot]);
        }
    }

    #[test]
    fn more_choices_than_experts_are_refused() {
        let error = TopKRouter::new(Param::new(0, "gate", Tensor::zeros(&[3, 2])), 4, true).unwrap_err();
        assert_eq!(error.to_string(), "top-k router: wanted 1 to 3 choices a token, found 4");
    }
}
