//! [`TokenMixer`]: what carries numbers from token to token, one variant for each kind that
//! [`Mixer`](crate::config::Mixer) names.

use crate::attention::Attention;
use crate::cache::LayerState;
use crate::config::{Mixer, ModelConfig};
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_tensor::{Graph, Param, Var};

/// A layer's mixer with its weights.
#[derive(Debug)]
pub(crate) enum TokenMixer {
    Attention(Attention),
}

impl TokenMixer {
    pub(crate) fn build(
        config: &ModelConfig,
        mixer: &Mixer,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        match mixer {
            Mixer::Attention(attention) => Attention::build(config, attention, weights).map(Self::Attention),
        }
    }

    /// Mixes within each sequence of the batch; with states, one a sequence, also with what each read before.
    ///
    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub(crate) fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        batch: &Batch,
        states: Option<&mut [&mut LayerState]>,
    ) -> Result<Var, ModelError> {
        match self {
            Self::Attention(attention) => attention.forward(g, x, batch, states),
        }
    }

    pub(crate) fn params(&self) -> Vec<&Param> {
        match self {
            Self::Attention(attention) => attention.params(),
        }
    }

    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        match self {
            Self::Attention(attention) => attention.params_mut(),
        }
    }
}
