//! Causal self-attention with grouped query heads and rotary positions (Ainslie et al. 2023, Su et al. 2021).

use crate::{Batch, ModelConfig, ModelError};
use moebius_kernels::attention::{AttentionShape, CachedSequence, LayerCache, attention_cached};
use moebius_kernels::memory::Buffer;
use moebius_kernels::rope::RopeTable;
use moebius_tensor::{Graph, Param, Tensor, Var, ops};
use std::sync::{Arc, Mutex, PoisonError};

/// One layer's attention.
#[derive(Debug)]
pub(crate) struct Attention {
    /// `[n_heads * head_dim, hidden]`.
    pub(crate) q: Param,
    /// `[n_kv_heads * head_dim, hidden]`.
    pub(crate) k: Param,
    /// `[n_kv_heads * head_dim, hidden]`.
    pub(crate) v: Param,
    /// `[hidden, n_heads * head_dim]`.
    pub(crate) o: Param,
    /// The norms' weights of queries and keys, if they are normed.
    pub(crate) norms: Option<[Param; 2]>,
    /// The biases of queries, keys and values, if they have them.
    pub(crate) biases: Option<[Param; 3]>,
}

/// What all layers' attention has in common.
#[derive(Debug)]
pub(crate) struct AttentionPlan {
    shape: AttentionShape,
    rope: RotaryAngles,
    /// Added to the mean square in the norms of queries and keys.
    eps: f32,
}

/// The rotations of as many positions as were asked for so far: a context may be of millions.
#[derive(Debug)]
struct RotaryAngles {
    theta: f64,
    head_dim: usize,
    table: Mutex<Arc<RopeTable>>,
}

impl RotaryAngles {
    fn new(config: &ModelConfig) -> Self {
        let (theta, head_dim) = (config.rope_theta, config.head_dim);
        Self { theta, head_dim, table: Mutex::new(Arc::new(RopeTable::new(theta, head_dim, 0))) }
    }

    /// A table that holds `positions` positions. Each row is the same in a table of any length.
    fn covering(&self, positions: usize) -> Arc<RopeTable> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.positions() < positions {
            let length = positions.next_power_of_two().max(256);
            *table = Arc::new(RopeTable::new(self.theta, self.head_dim, length));
        }
        table.clone()
    }
}

impl AttentionPlan {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let shape = AttentionShape {
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
            scale: (config.head_dim as f32).powf(-0.5),
            window: config.window,
            bidirectional: false,
        };
        Self { shape, rope: RotaryAngles::new(config), eps: config.rms_eps as f32 }
    }
}

impl Attention {
    /// Attends within each sequence of the batch; with caches, one a sequence, also to what each read before.
    ///
    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub(crate) fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        plan: &AttentionPlan,
        batch: &Batch,
        caches: Option<&mut [&mut LayerCache]>,
    ) -> Result<Var, ModelError> {
        let shape = &plan.shape;
        let table = plan.rope.covering(batch.positions.iter().max().map_or(0, |&last| last as usize + 1));
        let rotate = |x: Var, heads| ops::rope(g, &x, heads, shape.head_dim, &batch.positions, &table);
        let (mut q, mut k) = (ops::linear(g, x, &self.q)?, ops::linear(g, x, &self.k)?);
        let mut v = ops::linear(g, x, &self.v)?;
        if let Some([q_bias, k_bias, v_bias]) = &self.biases {
            (q, k) = (ops::add_bias(g, &q, q_bias)?, ops::add_bias(g, &k, k_bias)?);
            v = ops::add_bias(g, &v, v_bias)?;
        }
        if let Some([q_norm, k_norm]) = &self.norms {
            (q, k) = (ops::rms_norm(g, &q, q_norm, plan.eps)?, ops::rms_norm(g, &k, k_norm, plan.eps)?);
        }
        let (q, k) = (rotate(q, shape.n_heads)?, rotate(k, shape.n_kv_heads)?);
        let attended = match caches {
            None => ops::attention(g, &q, &k, &v, shape, &batch.starts)?,
            Some(caches) => attend_cached(shape, &q, [k.data(), v.data()], batch, caches),
        };
        Ok(ops::linear(g, &attended, &self.o)?)
    }

    pub(crate) fn params(&self) -> impl Iterator<Item = &Param> {
        [&self.q, &self.k, &self.v, &self.o]
            .into_iter()
            .chain(self.norms.iter().flatten())
            .chain(self.biases.iter().flatten())
    }

    pub(crate) fn params_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        let Self { q, k, v, o, norms, biases } = self;
        [q, k, v, o].into_iter().chain(norms.iter_mut().flatten()).chain(biases.iter_mut().flatten())
    }
}

/// Adds each sequence's keys and values to its cache and attends over it.
fn attend_cached(
    shape: &AttentionShape,
    q: &Var,
    [k, v]: [&[f32]; 2],
    batch: &Batch,
    caches: &mut [&mut LayerCache],
) -> Var {
    let width = shape.key_width();
    let sequences: Vec<CachedSequence<'_>> = (caches.iter_mut().zip(batch.starts.windows(2)))
        .map(|(cache, bounds)| {
            let rows = bounds[0] * width..bounds[1] * width;
            cache.push(&k[rows.clone()], &v[rows]);
            CachedSequence { rows: bounds[1] - bounds[0], cache }
        })
        .collect();
    let mut out = Buffer::scratch(q.data().len());
    attention_cached(shape, q.data(), &sequences, &mut out);
    Var::constant(Tensor::new(q.shape(), out))
}
