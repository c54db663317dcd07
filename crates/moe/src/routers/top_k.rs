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

    fn params(&self) -> Vec<&Param> {
        Router::params(&self.router)
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        Router::params_mut(&mut self.router)
    }
}
