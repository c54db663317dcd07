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
    /// `[hidden]`.
    bias: Option<Param>,
}

impl StreamNorm {
    pub(crate) fn build(
        kind: Norm,
        name: &str,
        hidden: usize,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        let weight = weights.get(name, &[hidden])?;
        let has_bias = matches!(kind, Norm::Layer { bias: true, .. });
        Ok(Self { kind, weight, bias: weights.get_if(has_bias, &format!("{name}_bias"), &[hidden])? })
    }

    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub(crate) fn forward<'p>(&'p self, g: &Graph<'p>, x: &Var) -> Result<Var, ModelError> {
        let normed = match self.kind {
            Norm::Rms { eps } | Norm::RmsFromOne { eps } => {
                ops::rms_norm_plus(g, x, &self.weight, self.kind.offset(), eps as f32)?
            }
            Norm::Layer { eps, .. } => ops::layer_norm(g, x, &self.weight, eps as f32)?,
        };
        Ok(match &self.bias {
            None => normed,
            Some(bias) => ops::add_bias(g, &normed, bias)?,
        })
    }

    pub(crate) fn params(&self) -> impl Iterator<Item = &Param> {
        [&self.weight].into_iter().chain(&self.bias)
    }

    pub(crate) fn params_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        [&mut self.weight].into_iter().chain(&mut self.bias)
    }
}
