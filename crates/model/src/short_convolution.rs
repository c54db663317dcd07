//! The short convolution of LFM2 (Liquid AI 2025): of three projections of a token, the first and the third are
//! multiplied, convolved over a few tokens, and multiplied with the second.

use crate::cache::{LayerState, carried};
use crate::config::ShortConvolution;
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_tensor::{Graph, Param, Var, ops};

/// One layer's convolution.
#[derive(Debug)]
pub(crate) struct ConvolutionMixer {
    /// `[3 * hidden, hidden]`.
    input: Param,
    /// `[hidden, 1, taps]`.
    taps: Param,
    /// `[hidden, hidden]`.
    o: Param,
    /// Of the input projection, the convolution and the output projection.
    biases: Option<[Param; 3]>,
}

impl ConvolutionMixer {
    pub(crate) fn build(
        hidden: usize,
        config: &ShortConvolution,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        weights.within("convolution.", |weights| {
            Ok(Self {
                input: weights.get("in", &[3 * hidden, hidden])?,
                taps: weights.get("taps", &[hidden, 1, config.taps])?,
                o: weights.get("o", &[hidden, hidden])?,
                biases: match config.bias {
                    true => Some([
                        weights.get("in_bias", &[3 * hidden])?,
                        weights.get("taps_bias", &[hidden])?,
                        weights.get("o_bias", &[hidden])?,
                    ]),
                    false => None,
                },
            })
        })
    }

    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub(crate) fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        batch: &Batch,
        mut states: Option<&mut [&mut LayerState]>,
    ) -> Result<Var, ModelError> {
        let [_, hidden] = x.dims()?;
        let biases = self.biases.as_ref();
        let mut projected = ops::linear(g, x, &self.input)?;
        if let Some([bias, _, _]) = biases {
            projected = ops::add_bias(g, &projected, bias)?;
        }
        let part = |i: usize| ops::columns(g, &projected, 3 * hidden, i * hidden..(i + 1) * hidden);
        let entering = ops::multiply(g, &part(0)?, &part(2)?)?;
        let bias = biases.map(|[_, bias, _]| bias);
        let histories = &mut carried(&mut states, 0);
        let convolved = ops::causal_convolution(g, &entering, &self.taps, bias, &batch.starts, histories)?;
        let leaving = ops::linear(g, &ops::multiply(g, &part(1)?, &convolved)?, &self.o)?;
        Ok(match biases {
            Some([_, _, bias]) => ops::add_bias(g, &leaving, bias)?,
            None => leaving,
        })
    }

    pub(crate) fn params(&self) -> Vec<&Param> {
        let Self { input, taps, o, biases } = self;
        [input, taps, o].into_iter().chain(biases.iter().flatten()).collect()
    }

    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        let Self { input, taps, o, biases } = self;
        [input, taps, o].into_iter().chain(biases.iter_mut().flatten()).collect()
    }
}
