//! Mamba's selective state space (Gu and Dao 2023), with the norms that Jamba adds to step sizes, B and C (Lieber et al.
//! 2024).

use crate::cache::{LayerState, carried};
use crate::config::{Mamba, ModelConfig};
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_tensor::ops::{self, Function, ScanInputs};
use moebius_tensor::{Graph, Param, Var};

/// One layer's state space.
#[derive(Debug)]
pub(crate) struct MambaMixer {
    /// `[2 * width, hidden]`: inputs, then gates.
    input: Param,
    /// `[width, 1, taps]`.
    taps: Param,
    taps_bias: Option<Param>,
    /// `[rank + 2 * states, width]`: step sizes, B and C.
    x: Param,
    /// The norms of step sizes, B and C.
    norms: [Param; 3],
    /// `[width, rank]`.
    dt: Param,
    /// `[width]`.
    dt_bias: Param,
    /// `[width, states]`: logarithms of the rates of decay.
    rates: Param,
    /// `[width]`: how the input passes by.
    skip: Param,
    /// `[hidden, width]`.
    o: Param,
    /// Of the projections in and out.
    biases: Option<[Param; 2]>,
    config: Mamba,
    eps: f32,
}

impl MambaMixer {
    pub(crate) fn build(
        model: &ModelConfig,
        config: &Mamba,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        let Mamba { width, states, taps, rank, convolution_bias, projection_bias } = *config;
        let hidden = model.hidden;
        weights.within("mamba.", |weights| {
            Ok(Self {
                input: weights.get("in", &[2 * width, hidden])?,
                taps: weights.get("taps", &[width, 1, taps])?,
                taps_bias: weights.get_if(convolution_bias, "taps_bias", &[width])?,
                x: weights.get("x", &[rank + 2 * states, width])?,
                norms: [
                    weights.get("dt_norm", &[rank])?,
                    weights.get("b_norm", &[states])?,
                    weights.get("c_norm", &[states])?,
                ],
                dt: weights.get("dt", &[width, rank])?,
                dt_bias: weights.get("dt_bias", &[width])?,
                rates: weights.get("rates", &[width, states])?,
                skip: weights.get("skip", &[width])?,
                o: weights.get("o", &[hidden, width])?,
                biases: match projection_bias {
                    true => Some([weights.get("in_bias", &[2 * width])?, weights.get("o_bias", &[hidden])?]),
                    false => None,
                },
                config: *config,
                eps: model.norm.eps() as f32,
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
        let width = self.config.width;
        let mut projected = ops::linear(g, x, &self.input)?;
        if let Some([bias, _]) = &self.biases {
            projected = ops::add_bias(g, &projected, bias)?;
        }
        let entering = ops::columns(g, &projected, 2 * width, 0..width)?;
        let gate = ops::columns(g, &projected, 2 * width, width..2 * width)?;
        let (bias, histories) = (self.taps_bias.as_ref(), &mut carried(&mut states, 0));
        let u = ops::causal_convolution(g, &entering, &self.taps, bias, &batch.starts, histories)?;
        let inputs = self.scan_inputs(g, ops::apply(g, &u, Function::Silu))?;
        let y = ops::selective_scan(g, &inputs, &self.skip, &batch.starts, &mut carried(&mut states, 1))?;
        let gated = ops::multiply(g, &y, &ops::apply(g, &gate, Function::Silu))?;
        let leaving = ops::linear(g, &gated, &self.o)?;
        Ok(match &self.biases {
            Some([_, bias]) => ops::add_bias(g, &leaving, bias)?,
            None => leaving,
        })
    }

    /// What makes the scan selective: step sizes, B and C of each token.
    fn scan_inputs<'p>(&'p self, g: &Graph<'p>, u: Var) -> Result<ScanInputs, ModelError> {
        let Mamba { states, rank, .. } = self.config;
        let all = ops::linear(g, &u, &self.x)?;
        let period = rank + 2 * states;
        let [dt_norm, b_norm, c_norm] = &self.norms;
        let normed = |part, norm: &'p Param| {
            let part = ops::columns(g, &all, period, part)?;
            ops::rms_norm(g, &part, norm, self.eps)
        };
        let steps = ops::linear(g, &normed(0..rank, dt_norm)?, &self.dt)?;
        Ok(ScanInputs {
            u,
            delta: ops::apply(g, &ops::add_bias(g, &steps, &self.dt_bias)?, Function::Softplus),
            a: ops::minus_exp(g, &self.rates),
            b: normed(rank..rank + states, b_norm)?,
            c: normed(rank + states..period, c_norm)?,
        })
    }

    pub(crate) fn params(&self) -> Vec<&Param> {
        let Self { input, taps, taps_bias, x, norms, dt, dt_bias, rates, skip, o, biases, .. } = self;
        let first = [input, taps].into_iter().chain(taps_bias).chain([x]).chain(norms);
        first.chain([dt, dt_bias, rates, skip, o]).chain(biases.iter().flatten()).collect()
    }

    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        let Self { input, taps, taps_bias, x, norms, dt, dt_bias, rates, skip, o, biases, .. } = self;
        let first = [input, taps].into_iter().chain(taps_bias).chain([x]).chain(norms);
        first.chain([dt, dt_bias, rates, skip, o]).chain(biases.iter_mut().flatten()).collect()
    }
}
