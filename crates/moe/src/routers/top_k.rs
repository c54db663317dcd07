//! The router of published families behind the trait: softmax top-k (Mixtral, OLMoE), logistic scores, softmax of the
//! chosen (gpt-oss), SparseMixer (Phi-3.5-MoE), groups of experts (DeepSeek), with the balance loss of Fedus et al. 2021 (E Σ f_e P_e) and the
//! z-loss of Zoph et al. 2022 (mean of logsumexp²).

use super::{AuxiliaryLoss, Context, Decision, RoutingMethod, Setup};
use crate::{
    ExpertGroups, GroupScore, MoeError, Router, RouterSettings, Score, TopKRouter, load_balancing_loss, z_loss,
};
use moebius_tensor::{Graph, Param, Var};

impl RoutingMethod for TopKRouter {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, _: &Context<'_>) -> Result<Decision, MoeError> {
        let routing = self.route(g, x)?;
        Ok(Decision::new(routing.plan, routing.weights, routing.logits, routing.probabilities))
    }

    fn params(&self) -> Vec<&Param> {
        Router::params(self)
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        Router::params_mut(self)
    }
}

/// A [`TopKRouter`] with its losses.
#[derive(Debug)]
struct TopK {
    router: TopKRouter,
    balance: f32,
    z: f32,
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    let top_k = setup.top_k_up_to(setup.experts)?;
    let score = match setup.word("score", &SCORES)? {
        0 => Score::Softmax,
        1 => Score::Sigmoid,
        2 => Score::SoftmaxOfChosen,
        3 => Score::SigmoidOfChosen,
        _ => Score::SparseMixer { jitter: setup.number("jitter", 0.01, 0.0..=1.0)? as f32 },
    };
    let renormalise = setup.flag("renormalise", matches!(score, Score::Softmax | Score::Sigmoid))?;
    let settings = RouterSettings {
        score,
        logit_bias: setup.flag("bias", false)?,
        groups: groups(setup)?,
        scale: setup.number("scale", 1.0, 1e-6..=1e6)? as f32,
        weighs_input: setup.flag("weighs_input", false)?,
        ..RouterSettings::softmax(top_k, renormalise)
    };
    if settings.has_no_gradient() {
        return Err(MoeError::NoRouterGradient);
    }
    let balance = setup.number("balance", 0.01, 0.0..=10.0)? as f32;
    let z = setup.number("z", 0.0, 0.0..=10.0)? as f32;
    let weight = setup.score_weight("router")?;
    let bias = if settings.logit_bias { Some((setup.param)("router_bias", &[setup.experts])?) } else { None };
    Ok(Box::new(TopK { router: TopKRouter::with(weight, [bias, None], settings)?, balance, z }))
}

/// The words of `score`.
const SCORES: [&str; 5] = ["softmax", "sigmoid", "softmax_of_chosen", "sigmoid_of_chosen", "sparse_mixer"];

/// Reads the groups of experts of which a token may use a few: one group is none.
pub(super) fn groups(setup: &mut Setup<'_>) -> Result<Option<ExpertGroups>, MoeError> {
    let count = setup.count("groups", 1, 1..=setup.experts)?;
    let used = setup.count("groups_per_token", count, 1..=count)?;
    let score = match setup.word("group_score", &["two_best", "best"])? {
        0 => GroupScore::TwoBest,
        _ => GroupScore::Best,
    };
    Ok((count > 1).then_some(ExpertGroups { count, used, score }))
}

impl RoutingMethod for TopK {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, _: &Context<'_>) -> Result<Decision, MoeError> {
        let routing = self.router.route(g, x)?;
        let losses = vec![
            AuxiliaryLoss { name: "balance", coefficient: self.balance, value: load_balancing_loss(g, &[&routing]) },
            AuxiliaryLoss { name: "z", coefficient: self.z, value: z_loss(g, &[&routing]) },
        ];
        let decision = Decision::new(routing.plan, routing.weights, routing.logits, routing.probabilities);
        Ok(Decision { losses, ..decision })
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
}

#[cfg(test)]
mod tests {
    use super::super::MethodConfig;
    use super::super::method::MethodLayer;
    use crate::routers::{Context, Options};
    use crate::{ExpertBank, MoeLayer, Plan};
    use moebius_kernels::gemm::Precision;
    use moebius_tensor::{Graph, Param, Rng, Tensor, Var};
    use std::rc::Rc;

    fn random(shape: &[usize], seed: u64) -> Tensor {
        let mut data = vec![0.0; shape.iter().product()];
        Rng::new(seed).fill_normal(&mut data, 1.0);
        Tensor::new(shape, data)
    }

    /// Llama 4's: the expert of the largest score reads its logistic function times x, and its answer is taken as it is.
    #[test]
    fn weights_multiply_what_an_expert_reads() {
        let bank = || {
            let param = |id, shape: &[usize]| Param::new(id, "w", random(shape, id as u64));
            ExpertBank::new(param(1, &[2, 6, 2]), param(2, &[2, 2, 3])).unwrap()
        };
        let options = [("score", "sigmoid_of_chosen".into()), ("weighs_input", true.into())];
        let options: Options = options.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let layer = MethodLayer { hidden: 2, experts: 2, top_k: 1, vocabulary: 0, causal: true };
        // Expert 0 scores the first coordinate, expert 1 the second.
        let mut weight =
            |name: &str, _: &[usize]| Ok(Param::new(0, name, Tensor::new(&[2, 2], vec![1.0, 0.0, 0.0, 1.0])));
        let method = MethodConfig { name: "top_k".into(), options }.build(&layer, &mut weight).unwrap();
        let x = Tensor::new(&[2, 2], vec![2.0, 1.0, -3.0, 0.0]);
        let (layer, bank) = (MoeLayer::by(method, bank()), bank());
        let g = Graph::inference(Precision::F32);
        let (y, decision) = layer.forward_by(&g, &Var::constant(x), &Context::default()).unwrap();
        assert_eq!(decision.plan.counts(), [1, 1]);
        let [first, second] = [2.0, 0.0].map(|score: f32| 1.0 / (1.0 + (-score).exp()));
        let scaled = Tensor::new(&[2, 2], vec![2.0 * first, first, -3.0 * second, 0.0]);
        let plan = Rc::new(Plan::from_choices(2, 1, &[0, 1]).unwrap());
        let ones = Var::constant(Tensor::new(&[2], vec![1.0; 2]));
        let wanted = bank.forward(&g, &Var::constant(scaled), &plan, &ones).unwrap();
        for (y, wanted) in y.data().iter().zip(wanted.data()) {
            assert!((y - wanted).abs() < 1e-5, "{y} {wanted}");
        }
    }
}
