//! [`Observer`]: looks on while a model computes.

use moebius_moe::Routing;
use moebius_moe::routers::DepthDecision;
use moebius_tensor::Var;

/// Sees hidden states and routing as they are made. Every method does nothing unless written anew.
pub trait Observer {
    /// `[tokens, hidden]`: index 0 is the embedding, index i what layer i − 1 gave; the last one is after the final norm.
    fn hidden(&mut self, index: usize, hidden: &Var) {
        let _ = (index, hidden);
    }

    /// What the router of a layer (counted among all layers, from 0) decided.
    fn routing(&mut self, layer: usize, routing: &Routing) {
        let _ = (layer, routing);
    }

    /// Which tokens went through a layer that the others went around.
    fn depth(&mut self, layer: usize, decision: &DepthDecision) {
        let _ = (layer, decision);
    }
}

/// Looks at nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}
