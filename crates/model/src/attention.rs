//! Causal self-attention with grouped query heads and rotary positions (Ainslie et al. 2023, Su et al. 2021).

use crate::cache::LayerState;
use crate::config::{AttentionConfig, ModelConfig};
use crate::position::RotaryAngles;
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_kernels::attention::{AttentionShape, CachedSequence, attention_cached};
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Param, Tensor, Var, ops};
use std::sync::Arc;

/// One layer's attention.
#[derive(Debug)]
pub(crate) struct Attention {
    /// `[n_heads * head_dim, hidden]`.
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
    shape: AttentionShape,
    rotation: Option<Arc<RotaryAngles>>,
    /// Added to the mean square in the norms of queries and keys.
    eps: f32,
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
                q: weights.get("q", &[queries, hidden])?,
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
                shape: shape(config),
                rotation,
                eps: model.norm.eps() as f32,
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
        if let Some([q_norm, k_norm]) = &self.norms {
            (q, k) = (ops::rms_norm(g, &q, q_norm, self.eps)?, ops::rms_norm(g, &k, k_norm, self.eps)?);
        }
        if let Some(rotation) = &self.rotation {
            let table = rotation.covering(batch.end_position());
            let turn = |x: &Var, heads| ops::rope(g, x, heads, shape.head_dim, &batch.positions, &table);
            (q, k) = (turn(&q, shape.n_heads)?, turn(&k, shape.n_kv_heads)?);
        }
        let attended = match states {
            None => ops::attention(g, &q, &k, &v, shape, &batch.starts)?,
            Some(states) => attend_cached(shape, &q, [k.data(), v.data()], batch, states),
        };
        Ok(ops::linear(g, &attended, &self.o)?)
    }

    pub(crate) fn params(&self) -> Vec<&Param> {
        let Self { q, k, v, o, norms, biases, .. } = self;
        [q, k, v, o].into_iter().chain(norms.iter().flatten()).chain(biases.iter().flatten()).collect()
    }

    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        let Self { q, k, v, o, norms, biases, .. } = self;
        [q, k, v, o].into_iter().chain(norms.iter_mut().flatten()).chain(biases.iter_mut().flatten()).collect()
    }
}

fn shape(config: &AttentionConfig) -> AttentionShape {
    AttentionShape {
        n_heads: config.n_heads,
        n_kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
        scale: config.scale as f32,
        window: config.reach.window(),
        bidirectional: false,
    }
}

/// Adds each sequence's keys and values to its cache and attends over it.
fn attend_cached(
    shape: &AttentionShape,
    q: &Var,
    [k, v]: [&[f32]; 2],
    batch: &Batch,
    states: &mut [&mut LayerState],
) -> Var {
    let width = shape.key_width();
    let sequences: Vec<CachedSequence<'_>> = (states.iter_mut().zip(batch.starts.windows(2)))
        .map(|(state, bounds)| {
            let rows = bounds[0] * width..bounds[1] * width;
            let cache = state.keys_values();
            cache.push(&k[rows.clone()], &v[rows]);
            CachedSequence { rows: bounds[1] - bounds[0], cache }
        })
        .collect();
    let mut out = Buffer::scratch(q.data().len());
    attention_cached(shape, q.data(), &sequences, &mut out);
    Var::constant(Tensor::new(q.shape(), out))
}
