//! The norm of the residual stream, of the kind that a configuration says.

use crate::ModelError;
use crate::config::Norm;
use crate::weights::Weights;
use moebius_tensor::{Graph, Param, Var, ops};

/// One norm with its weights.
#[derive(Debug)]
pub(crate) struct StreamNorm {
    kind: Norm,
    /// `[hidden]`.
    weight: Param,
}

impl StreamNorm {
    pub(crate) fn build(
        kind: Norm,
        name: &str,
        hidden: usize,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        Ok(Self { kind, weight: weights.get(name, &[hidden])? })
    }

    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub(crate) fn forward<'p>(&'p self, g: &Graph<'p>, x: &Var) -> Result<Var, ModelError> {
        Ok(match self.kind {
            Norm::Rms { eps } | Norm::RmsFromOne { eps } => {
                ops::rms_norm_plus(g, x, &self.weight, self.kind.offset(), eps as f32)?
            }
        })
    }

    pub(crate) fn params(&self) -> impl Iterator<Item = &Param> {
        [&self.weight].into_iter()
    }

    pub(crate) fn params_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        [&mut self.weight].into_iter()
    }
}
