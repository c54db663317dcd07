//! Causal self-attention with grouped query heads and rotary positions (Ainslie et al. 2023, Su et al. 2021).

use crate::cache::LayerState;
use crate::config::{AttentionConfig, ModelConfig, QkNorm, Reach, Temperature};
use crate::position::RotaryAngles;
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_kernels::attention::{AttentionShape, CachedSequence, attention_cached};
use moebius_kernels::memory::Buffer;
use moebius_kernels::parallel;
use moebius_tensor::{Graph, Param, Tensor, Var, ops};
use std::sync::Arc;

/// Fewer numbers of keys than this are put into the caches by one thread.
const SERIAL_PUSH: usize = 1 << 12;

/// One layer's attention.
#[derive(Debug)]
pub(crate) struct Attention {
    /// `[n_heads * head_dim, hidden]`; gated, each head's rows are its query's, then its gate's.
    q: Param,
    /// `[n_kv_heads * head_dim, hidden]`.
    k: Param,
    /// `[n_kv_heads * head_dim, hidden]`.
    v: Param,
    /// `[hidden, n_heads * head_dim]`.
    o: Param,
    /// The norms' weights of queries and keys, if they are normed.
    norms: Option<[Param; 2]>,
    /// The biases of queries, keys and values, if they have them.
    biases: Option<[Param; 3]>,
    /// `[hidden]`.
    o_bias: Option<Param>,
    /// `[n_heads]`.
    sinks: Option<Param>,
    config: AttentionConfig,
    shape: AttentionShape,
    rotation: Option<Arc<RotaryAngles>>,
    /// Added to the weights and to the mean square in the norms of queries and keys.
    norm: [f32; 2],
}

impl Attention {
    pub(crate) fn build(
        model: &ModelConfig,
        config: &AttentionConfig,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        let hidden = model.hidden;
        let AttentionConfig { n_heads, n_kv_heads, head_dim, qk_norm, .. } = *config;
        let (queries, keys) = (n_heads * head_dim, n_kv_heads * head_dim);
        let rotation = config.rope.as_ref().map(|rope| weights.rotations.of(rope));
        weights.within("attention.", |weights| {
            Ok(Self {
                q: weights.get("q", &[if config.gated { 2 * queries } else { queries }, hidden])?,
                k: weights.get("k", &[keys, hidden])?,
                v: weights.get("v", &[keys, hidden])?,
                o: weights.get("o", &[hidden, queries])?,
                norms: match (qk_norm.width(n_heads, head_dim), qk_norm.width(n_kv_heads, head_dim)) {
                    (Some(q), Some(k)) => Some([weights.get("q_norm", &[q])?, weights.get("k_norm", &[k])?]),
                    _ => None,
                },
                biases: match config.qkv_bias {
                    true => Some([
                        weights.get("q_bias", &[queries])?,
                        weights.get("k_bias", &[keys])?,
                        weights.get("v_bias", &[keys])?,
                    ]),
                    false => None,
                },
                o_bias: weights.get_if(config.o_bias, "o_bias", &[hidden])?,
                sinks: weights.get_if(config.sinks, "sinks", &[n_heads])?,
                config: config.clone(),
                shape: shape(config),
                rotation,
                norm: [model.norm.offset(), model.norm.eps() as f32],
            })
        })
    }

    /// Attends within each sequence of the batch; with states, one a sequence, also to what each read before.
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
        let shape = &self.shape;
        let (mut q, mut k) = (ops::linear(g, x, &self.q)?, ops::linear(g, x, &self.k)?);
        let mut v = ops::linear(g, x, &self.v)?;
        if let Some([q_bias, k_bias, v_bias]) = &self.biases {
            (q, k) = (ops::add_bias(g, &q, q_bias)?, ops::add_bias(g, &k, k_bias)?);
            v = ops::add_bias(g, &v, v_bias)?;
        }
        let gate = if self.config.gated { Some(split_gate(g, shape.head_dim, &mut q)?) } else { None };
        let is_turned_first = matches!(self.config.qk_norm, QkNorm::HeadTurned | QkNorm::UnitTurned);
        if !is_turned_first {
            (q, k) = self.normed(g, q, k)?;
        }
        if let Some(clip) = self.config.clip {
            [q, k, v] = [&q, &k, &v].map(|x| ops::clamp(g, x, clip as f32));
        }
        if let Some(rotation) = &self.rotation {
            let table = rotation.covering(batch.end_position());
            let turn = |x: Var, heads| ops::rope(g, x, heads, shape.head_dim, &batch.positions, &table);
            (q, k) = (turn(q, shape.n_heads)?, turn(k, shape.n_kv_heads)?);
        }
        if is_turned_first {
            (q, k) = self.normed(g, q, k)?;
        }
        if let Some(temperature) = self.config.temperature {
            let factors = batch.positions.iter().map(|&position| temperature.at(position)).collect();
            q = ops::scale_rows_by(g, &q, factors)?;
        }
        let mut attended = match states {
            None => ops::attention_with_sinks(g, [&q, &k, &v], self.sinks.as_ref(), shape, &batch.starts)?,
            Some(states) => attend_cached(shape, &q, [k.data(), v.data()], self.sinks.as_ref(), batch, states),
        };
        if let Some(gate) = gate {
            attended = ops::multiply(g, &attended, &ops::sigmoid(g, &gate))?;
        }
        let answer = ops::linear(g, &attended, &self.o)?;
        Ok(match &self.o_bias {
            None => answer,
            Some(bias) => ops::add_bias(g, &answer, bias)?,
        })
    }

    /// Queries and keys normed as the configuration says.
    fn normed<'p>(&'p self, g: &Graph<'p>, q: Var, k: Var) -> Result<(Var, Var), ModelError> {
        if self.config.qk_norm == QkNorm::UnitTurned {
            let unit = |x: &Var| ops::unit_rms_norm(g, x, self.shape.head_dim, self.norm[1]);
            return Ok((unit(&q)?, unit(&k)?));
        }
        match &self.norms {
            None => Ok((q, k)),
            Some([q_norm, k_norm]) => {
                let normed = |x: &Var, weight: &'p Param| ops::rms_norm_plus(g, x, weight, self.norm[0], self.norm[1]);
                Ok((normed(&q, q_norm)?, normed(&k, k_norm)?))
            }
        }
    }

    pub(crate) fn params(&self) -> Vec<&Param> {
        let Self { q, k, v, o, norms, biases, o_bias, sinks, .. } = self;
        let vectors = norms.iter().flatten().chain(biases.iter().flatten()).chain(o_bias).chain(sinks);
        [q, k, v, o].into_iter().chain(vectors).collect()
    }

    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        let Self { q, k, v, o, norms, biases, o_bias, sinks, .. } = self;
        let vectors = norms.iter_mut().flatten().chain(biases.iter_mut().flatten()).chain(o_bias).chain(sinks);
        [q, k, v, o].into_iter().chain(vectors).collect()
    }
}

impl Temperature {
    /// What the query of a position is multiplied with.
    fn at(&self, position: u32) -> f32 {
        let step = ((position as f32 + 1.0) / self.floor as f32).floor();
        step.ln_1p() * self.scale as f32 + 1.0
    }
}

/// Takes the gates out of projected queries; both are `[tokens, n_heads * head_dim]` then.
fn split_gate<'p>(g: &Graph<'p>, head_dim: usize, q: &mut Var) -> Result<Var, ModelError> {
    let gate = ops::columns(g, q, 2 * head_dim, head_dim..2 * head_dim)?;
    *q = ops::columns(g, q, 2 * head_dim, 0..head_dim)?;
    Ok(gate)
}

fn shape(config: &AttentionConfig) -> AttentionShape {
    let heads = [config.n_heads, config.n_kv_heads, config.head_dim];
    let (window, chunk) = match config.reach {
        Reach::All => (None, None),
        Reach::Window(window) => (Some(window), None),
        Reach::Chunk(chunk) => (None, Some(chunk)),
    };
    let soft_cap = config.soft_cap.map(|cap| cap as f32);
    AttentionShape { window, chunk, soft_cap, ..AttentionShape::grouped(heads, config.scale as f32) }
}

/// Adds each sequence's keys and values to its cache and attends over it.
pub(crate) fn attend_cached(
    shape: &AttentionShape,
    q: &Var,
    [k, v]: [&[f32]; 2],
    sinks: Option<&Param>,
    batch: &Batch,
    states: &mut [&mut LayerState],
) -> Var {
    let (key_width, value_width) = (shape.key_width(), shape.value_width());
    let serial = if k.len() < SERIAL_PUSH { usize::MAX } else { 1 };
    parallel::for_each_chunk(states, 1, serial, |sequence, state| {
        let rows = |width: usize| batch.starts[sequence] * width..batch.starts[sequence + 1] * width;
        state[0].push(&k[rows(key_width)], &v[rows(value_width)]);
    });
    let sequences: Vec<CachedSequence<'_>> = (states.iter().zip(batch.starts.windows(2)))
        .map(|(state, bounds)| CachedSequence { rows: bounds[1] - bounds[0], cache: state.cached() })
        .collect();
    let tokens = batch.tokens.len();
    let mut out = Buffer::scratch(tokens * shape.out_width());
    attention_cached(shape, q.data(), sinks.map(|sinks| sinks.value().data()), &sequences, &mut out);
    Var::constant(Tensor::new(&[tokens, shape.out_width()], out))
}
