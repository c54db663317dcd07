//! [`TokenMixer`]: what carries numbers from token to token, one variant for each kind that
//! [`Mixer`](crate::config::Mixer) names.

use crate::attention::Attention;
use crate::cache::LayerState;
use crate::config::{Mixer, ModelConfig};
use crate::delta_net::DeltaMixer;
use crate::head_mixture::MixedAttention;
use crate::latent::LatentAttention;
use crate::mamba::MambaMixer;
use crate::short_convolution::ConvolutionMixer;
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_moe::Routing;
use moebius_tensor::{Graph, Param, Var};

/// A layer's mixer with its weights.
#[derive(Debug)]
pub(crate) enum TokenMixer {
    Attention(Box<Attention>),
    Latent(Box<LatentAttention>),
    HeadMixture(Box<MixedAttention>),
    DeltaNet(Box<DeltaMixer>),
    ShortConvolution(Box<ConvolutionMixer>),
    Mamba(Box<MambaMixer>),
}

/// Does the same with every kind.
macro_rules! with_each {
    ($mixer:expr, $name:ident => $do:expr) => {
        match $mixer {
            TokenMixer::Attention($name) => $do,
            TokenMixer::Latent($name) => $do,
            TokenMixer::HeadMixture($name) => $do,
            TokenMixer::DeltaNet($name) => $do,
            TokenMixer::ShortConvolution($name) => $do,
            TokenMixer::Mamba($name) => $do,
        }
    };
}

impl TokenMixer {
    pub(crate) fn build(
        config: &ModelConfig,
        mixer: &Mixer,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        Ok(match mixer {
            Mixer::Attention(attention) => Self::Attention(Attention::build(config, attention, weights)?.into()),
            Mixer::Latent(latent) => Self::Latent(LatentAttention::build(config, latent, weights)?.into()),
            Mixer::HeadMixture(mixture) => {
                Self::HeadMixture(MixedAttention::build(config.hidden, mixture, weights)?.into())
            }
            Mixer::DeltaNet(net) => Self::DeltaNet(DeltaMixer::build(config, net, weights)?.into()),
            Mixer::ShortConvolution(convolution) => {
                Self::ShortConvolution(ConvolutionMixer::build(config.hidden, convolution, weights)?.into())
            }
            Mixer::Mamba(mamba) => Self::Mamba(MambaMixer::build(config, mamba, weights)?.into()),
        })
    }

    /// Mixes within each sequence of the batch; with states, one a sequence, also with what each read before. Gives what
    /// the mixer's router decided too, if it has one.
    ///
    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub(crate) fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        batch: &Batch,
        mut states: Option<&mut [&mut LayerState]>,
    ) -> Result<(Var, Option<Routing>), ModelError> {
        let handed = states.as_deref_mut();
        let mixed = match self {
            Self::Attention(attention) => (attention.forward(g, x, batch, handed)?, None),
            Self::Latent(latent) => (latent.forward(g, x, batch, handed)?, None),
            Self::HeadMixture(mixture) => {
                let (y, routing) = mixture.forward(g, x, batch, handed)?;
                (y, Some(routing))
            }
            Self::DeltaNet(net) => (net.forward(g, x, batch, handed)?, None),
            Self::ShortConvolution(convolution) => (convolution.forward(g, x, batch, handed)?, None),
            Self::Mamba(mamba) => (mamba.forward(g, x, batch, handed)?, None),
        };
        for (state, bounds) in states.into_iter().flatten().zip(batch.starts.windows(2)) {
            state.advance(bounds[1] - bounds[0]);
        }
        Ok(mixed)
    }

    pub(crate) fn params(&self) -> Vec<&Param> {
        with_each!(self, mixer => mixer.params())
    }

    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        with_each!(self, mixer => mixer.params_mut())
    }
}
