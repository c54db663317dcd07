//! Linear attention by the gated delta rule (Yang et al. 2024), as Qwen3-Next and Qwen3.5 mix tokens.

use crate::cache::{LayerState, carried};
use crate::config::{DeltaNet, DeltaProjections, ModelConfig};
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_tensor::ops::{self, DeltaInputs, DeltaShape, Function};
use moebius_tensor::{Graph, Param, Var};

/// Added to the squared length of queries and keys when they are divided by it.
const LENGTH_EPS: f32 = 1e-6;

/// One layer's delta rule.
#[derive(Debug)]
pub(crate) struct DeltaMixer {
    projections: Projections,
    /// `[mixed_width, 1, taps]`.
    taps: Param,
    /// `[value_heads]`.
    dt_bias: Param,
    /// `[value_heads]`: logarithms of the rates of decay.
    rates: Param,
    /// `[value_dim]`: the norm of each head's output.
    norm: Param,
    /// `[hidden, value_width]`.
    o: Param,
    config: DeltaNet,
    eps: f32,
}

/// What makes queries, keys and values, output gates, betas and decays.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few of them in a model, beside megabytes of weights")]
enum Projections {
    /// `[mixed_width + value_width, hidden]` and `[2 * value_heads, hidden]`; each key head's parts stand together.
    ByHead { qkvz: Param, ba: Param },
    /// `[mixed_width, hidden]`, `[value_width, hidden]`, and `[value_heads, hidden]` twice.
    ByKind { qkv: Param, z: Param, b: Param, a: Param },
}

/// What the projections make of the tokens.
struct Projected {
    qkv: Var,
    z: Var,
    b: Var,
    a: Var,
}

impl DeltaMixer {
    pub(crate) fn build(
        model: &ModelConfig,
        config: &DeltaNet,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        let (hidden, heads) = (model.hidden, config.value_heads);
        let (mixed, values) = (config.mixed_width(), config.value_width());
        weights.within("delta.", |weights| {
            let projections = match config.projections {
                DeltaProjections::ByHead => Projections::ByHead {
                    qkvz: weights.get("qkvz", &[mixed + values, hidden])?,
                    ba: weights.get("ba", &[2 * heads, hidden])?,
                },
                DeltaProjections::ByKind => Projections::ByKind {
                    qkv: weights.get("qkv", &[mixed, hidden])?,
                    z: weights.get("z", &[values, hidden])?,
                    b: weights.get("b", &[heads, hidden])?,
                    a: weights.get("a", &[heads, hidden])?,
                },
            };
            Ok(Self {
                projections,
                taps: weights.get("taps", &[mixed, 1, config.taps])?,
                dt_bias: weights.get("dt_bias", &[heads])?,
                rates: weights.get("rates", &[heads])?,
                norm: weights.get("norm", &[config.value_dim])?,
                o: weights.get("o", &[hidden, values])?,
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
        let DeltaNet { key_heads, value_heads, key_dim, value_dim, .. } = self.config;
        let Projected { qkv, z, b, a } = self.projections.forward(g, x, &self.config)?;
        let mixed = ops::causal_convolution(g, &qkv, &self.taps, None, &batch.starts, &mut carried(&mut states, 0))?;
        let mixed = ops::apply(g, &mixed, Function::Silu);
        let (keys, width) = (key_heads * key_dim, self.config.mixed_width());
        let [q, k, v] = [0..keys, keys..2 * keys, 2 * keys..width].map(|part| ops::columns(g, &mixed, width, part));
        let decays = ops::apply(g, &ops::add_bias(g, &a, &self.dt_bias)?, Function::Softplus);
        let inputs = DeltaInputs {
            q: ops::l2_norm(g, &q?, key_dim, (key_dim as f32).powf(-0.5), LENGTH_EPS)?,
            k: ops::l2_norm(g, &k?, key_dim, 1.0, LENGTH_EPS)?,
            v: v?,
            log_decay: ops::multiply_rows(g, &decays, &ops::minus_exp(g, &self.rates))?,
            beta: ops::apply(g, &b, Function::Sigmoid),
        };
        let shape = DeltaShape { key_heads, value_heads, key_dim, value_dim };
        let out = ops::gated_delta_rule(g, &shape, &inputs, &batch.starts, &mut carried(&mut states, 1))?;
        let normed = ops::rms_norm(g, &out, &self.norm, self.eps)?;
        let gated = ops::multiply(g, &normed, &ops::apply(g, &z, Function::Silu))?;
        Ok(ops::linear(g, &gated, &self.o)?)
    }

    pub(crate) fn params(&self) -> Vec<&Param> {
        let Self { projections, taps, dt_bias, rates, norm, o, .. } = self;
        let projections = match projections {
            Projections::ByHead { qkvz, ba } => vec![qkvz, ba],
            Projections::ByKind { qkv, z, b, a } => vec![qkv, z, b, a],
        };
        projections.into_iter().chain([taps, dt_bias, rates, norm, o]).collect()
    }

    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        let Self { projections, taps, dt_bias, rates, norm, o, .. } = self;
        let projections = match projections {
            Projections::ByHead { qkvz, ba } => vec![qkvz, ba],
            Projections::ByKind { qkv, z, b, a } => vec![qkv, z, b, a],
        };
        projections.into_iter().chain([taps, dt_bias, rates, norm, o]).collect()
    }
}

impl Projections {
    fn forward<'p>(&'p self, g: &Graph<'p>, x: &Var, config: &DeltaNet) -> Result<Projected, ModelError> {
        let (qkvz, ba) = match self {
            Self::ByKind { qkv, z, b, a } => {
                let [qkv, z] = [qkv, z].map(|weight| ops::linear(g, x, weight));
                let [b, a] = [b, a].map(|weight| ops::linear_f32(g, x, weight));
                return Ok(Projected { qkv: qkv?, z: z?, b: b?, a: a? });
            }
            Self::ByHead { qkvz, ba } => (ops::linear(g, x, qkvz)?, ops::linear_f32(g, x, ba)?),
        };
        let DeltaNet { key_heads, value_heads, key_dim, value_dim, .. } = *config;
        let group = value_heads / key_heads;
        let (keys, values) = (2 * key_dim, group * value_dim);
        let period = keys + 2 * values;
        let of_heads = |part| ops::columns(g, &qkvz, period, part);
        let (q, k) = (of_heads(0..key_dim)?, of_heads(key_dim..keys)?);
        let (v, z) = (of_heads(keys..keys + values)?, of_heads(keys + values..period)?);
        Ok(Projected {
            qkv: ops::concat_columns(g, &[&q, &k, &v])?,
            z,
            b: ops::columns(g, &ba, 2 * group, 0..group)?,
            a: ops::columns(g, &ba, 2 * group, group..2 * group)?,
        })
    }
}
