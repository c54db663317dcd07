//! The feed-forward part of a layer: one SwiGLU network, or a mixture of them.

use crate::ModelError;
use moebius_moe::{MoeLayer, Routing};
use moebius_tensor::{Graph, Param, Var, ops};

/// One network, or several behind a router.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few of them in a model, beside megabytes of weights")]
pub(crate) enum FeedForward {
    /// gate_up `[2 * width, hidden]` (the gate's rows first), down `[hidden, width]`.
    Dense { gate_up: Param, down: Param },
    /// A router and its experts.
    Moe(MoeLayer),
}

impl FeedForward {
    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub(crate) fn forward<'p>(&'p self, g: &Graph<'p>, x: &Var) -> Result<(Var, Option<Routing>), ModelError> {
        match self {
            Self::Dense { gate_up, down } => {
                let inner = ops::swiglu(g, &ops::linear(g, x, gate_up)?)?;
                Ok((ops::linear(g, &inner, down)?, None))
            }
            Self::Moe(layer) => {
                let (y, routing) = layer.forward(g, x)?;
                Ok((y, Some(routing)))
            }
        }
    }

    pub(crate) fn params(&self) -> Vec<&Param> {
        match self {
            Self::Dense { gate_up, down } => vec![gate_up, down],
            Self::Moe(layer) => layer.params(),
        }
    }

    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        match self {
            Self::Dense { gate_up, down } => vec![gate_up, down],
            Self::Moe(layer) => layer.params_mut(),
        }
    }
}
