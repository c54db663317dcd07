//! [`MoeLayer`]: a router and its experts.

use crate::routers::{Context, Decision, RoutingMethod};
use crate::{ExpertBank, MoeError, Router, Routing, TopKRouter};
use moebius_tensor::{Graph, Param, Var, ops};

/// The sparse counterpart of a feed-forward layer.
#[derive(Debug)]
pub struct MoeLayer<R = TopKRouter> {
    /// Chooses the experts of each token.
    pub router: R,
    /// Compute on the tokens they are given.
    pub experts: ExpertBank,
}

impl<R: Router> MoeLayer<R> {
    /// Route, compute, combine.
    ///
    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub fn forward<'p>(&'p self, g: &Graph<'p>, x: &Var) -> Result<(Var, Routing), MoeError> {
        let routing = self.router.route(g, x)?;
        let y = self.experts.forward(g, x, &routing.plan, &routing.weights)?;
        Ok((y, routing))
    }

    /// Its weights: the router's, then the experts'.
    pub fn params(&self) -> Vec<&Param> {
        self.router.params().into_iter().chain(self.experts.params()).collect()
    }

    /// Its weights, to be changed.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        self.router.params_mut().into_iter().chain(self.experts.params_mut()).collect()
    }
}

impl<R: RoutingMethod> MoeLayer<R> {
    /// A layer whose weights multiply what the method says, the experts' input or their answers.
    pub fn by(router: R, experts: ExpertBank) -> Self {
        let experts = experts.weighing_input(router.settings().is_some_and(|settings| settings.weighs_input));
        Self { router, experts }
    }

    /// As [`MoeLayer::forward`], for every routing method: with what else the method may need to know, and with its own
    /// losses and what it dropped in the answer. A dropped token's row is zero, so that the residual carries the token.
    ///
    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub fn forward_by<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        context: &Context<'_>,
    ) -> Result<(Var, Decision), MoeError> {
        let decision = self.router.decide(g, x, context)?;
        let mut y = self.experts.forward(g, x, &decision.plan, &decision.weights)?;
        if let Some(skip) = &decision.skip {
            y = ops::add(g, &y, crate::routers::math::scale_rows(g, x, skip)?)?;
        }
        Ok((y, decision))
    }
}

#[cfg(test)]
mod tests;
