//! Softmax top-k (Mixtral, OLMoE) behind the trait, with the balance loss of Fedus et al. 2021 (E Σ f_e P_e) and the
//! z-loss of Zoph et al. 2022 (mean of logsumexp²).

use super::{AuxiliaryLoss, Context, Decision, RoutingMethod, Setup};
use crate::{MoeError, Router, TopKRouter, load_balancing_loss, z_loss};
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
    let renormalise = setup.flag("renormalise", true)?;
    if top_k == 1 && renormalise {
        return Err(MoeError::NoRouterGradient);
    }
    let balance = setup.number("balance", 0.01, 0.0..=10.0)? as f32;
    let z = setup.number("z", 0.0, 0.0..=10.0)? as f32;
    let router = TopKRouter::new(setup.score_weight("router")?, top_k, renormalise)?;
    Ok(Box::new(TopK { router, balance, z }))
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
