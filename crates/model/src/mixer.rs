//! [`TokenMixer`]: what carries numbers from token to token, one variant for each kind that
//! [`Mixer`](crate::config::Mixer) names.

use crate::attention::Attention;
use crate::cache::LayerState;
use crate::config::{Mixer, ModelConfig};
use crate::latent::LatentAttention;
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_tensor::{Graph, Param, Var};

/// A layer's mixer with its weights.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few of them in a model, beside megabytes of weights")]
pub(crate) enum TokenMixer {
    Attention(Attention),
    Latent(LatentAttention),
}

impl TokenMixer {
    pub(crate) fn build(
        config: &ModelConfig,
        mixer: &Mixer,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        match mixer {
            Mixer::Attention(attention) => Attention::build(config, attention, weights).map(Self::Attention),
            Mixer::Latent(latent) => LatentAttention::build(config, latent, weights).map(Self::Latent),
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
            Self::Latent(latent) => latent.forward(g, x, batch, states),
        }
    }

    pub(crate) fn params(&self) -> Vec<&Param> {
        match self {
            Self::Attention(attention) => attention.params(),
            Self::Latent(latent) => latent.params(),
        }
    }

    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        match self {
            Self::Attention(attention) => attention.params_mut(),
            Self::Latent(latent) => latent.params_mut(),
        }
    }
}
