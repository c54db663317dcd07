//! [`MoeLayer`]: a router and its experts.

use crate::{ExpertBank, MoeError, Router, Routing, TopKRouter};
use moebius_tensor::{Graph, Param, Var};

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

#[cfg(test)]
mod tests;
