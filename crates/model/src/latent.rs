//! Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1).
//!
//! Keys and values of a head are products of one latent a token. Instead of making them, a head's query is multiplied
//! with its key matrix, so that it meets the latents themselves, and what it gathers of latents with its value matrix.
//! The cache then holds latents alone, and a token's arithmetic is the same with a cache and without.

use crate::attention::attend_cached;
use crate::cache::LayerState;
use crate::config::{LatentConfig, ModelConfig};
use crate::position::RotaryAngles;
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_kernels::attention::AttentionShape;
use moebius_tensor::{Graph, Param, Var, ops};
use std::sync::Arc;

/// One layer's latent attention.
#[derive(Debug)]
pub(crate) struct LatentAttention {
    /// What queries are made from, if not from the residual stream: `[q_rank, hidden]` and the norm's weights.
    query_latent: Option<[Param; 2]>,
    /// `[n_heads * nope_dim, hidden or q_rank]`.
    q_nope: Param,
    /// `[n_heads * rope_dim, hidden or q_rank]`.
    q_rope: Param,
    /// `[kv_rank, hidden]`.
    kv_a: Param,
    /// `[kv_rank]`.
    kv_norm: Param,
    /// `[rope_dim, hidden]`.
    k_rope: Param,
    /// `[n_heads, kv_rank, nope_dim]`: a head's keys from latents, transposed.
    k_up: Param,
    /// `[n_heads, value_dim, kv_rank]`.
    v_up: Param,
    /// `[hidden, n_heads * value_dim]`.
    o: Param,
    shape: AttentionShape,
    rotation: Arc<RotaryAngles>,
    eps: f32,
}

impl LatentAttention {
    pub(crate) fn build(
        model: &ModelConfig,
        config: &LatentConfig,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        let hidden = model.hidden;
        let LatentConfig { n_heads, q_rank, kv_rank, nope_dim, rope_dim, value_dim, .. } = *config;
        let rotation = weights.rotations.of(&config.rope);
        let query_inputs = q_rank.unwrap_or(hidden);
        let shape = AttentionShape {
            value_dim: kv_rank,
            ..AttentionShape::grouped([n_heads, 1, kv_rank + rope_dim], config.scale as f32)
        };
        weights.within("attention.", |weights| {
            Ok(Self {
                query_latent: match q_rank {
                    None => None,
                    Some(rank) => Some([weights.get("q_a", &[rank, hidden])?, weights.get("q_norm", &[rank])?]),
                },
                q_nope: weights.get("q_nope", &[n_heads * nope_dim, query_inputs])?,
                q_rope: weights.get("q_rope", &[n_heads * rope_dim, query_inputs])?,
                kv_a: weights.get("kv_a", &[kv_rank, hidden])?,
                kv_norm: weights.get("kv_norm", &[kv_rank])?,
                k_rope: weights.get("k_rope", &[rope_dim, hidden])?,
                k_up: weights.get("k_up", &[n_heads, kv_rank, nope_dim])?,
                v_up: weights.get("v_up", &[n_heads, value_dim, kv_rank])?,
                o: weights.get("o", &[hidden, n_heads * value_dim])?,
                shape,
                rotation,
                eps: config.eps as f32,
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
        let (shape, heads) = (&self.shape, self.shape.n_heads);
        let rope_dim = shape.head_dim - shape.value_dim;
        let table = self.rotation.covering(batch.end_position());
        let turn = |x: Var, heads| ops::rope(g, x, heads, rope_dim, &batch.positions, &table);

        let query_input = match &self.query_latent {
            None => x.clone(),
            Some([q_a, q_norm]) => ops::rms_norm(g, &ops::linear(g, x, q_a)?, q_norm, self.eps)?,
        };
        let q_nope = ops::linear_by_head(g, &ops::linear(g, &query_input, &self.q_nope)?, &self.k_up)?;
        let q_rope = turn(ops::linear(g, &query_input, &self.q_rope)?, heads)?;
        let q = ops::join_heads(g, &q_nope, &q_rope, heads)?;

        let latent = ops::rms_norm(g, &ops::linear(g, x, &self.kv_a)?, &self.kv_norm, self.eps)?;
        let k = ops::join_heads(g, &latent, &turn(ops::linear(g, x, &self.k_rope)?, 1)?, 1)?;
        let attended = match states {
            None => ops::attention(g, &q, &k, &latent, shape, &batch.starts)?,
            Some(states) => attend_cached(shape, &q, [k.data(), latent.data()], None, batch, states),
        };
        Ok(ops::linear(g, &ops::linear_by_head(g, &attended, &self.v_up)?, &self.o)?)
    }

    pub(crate) fn params(&self) -> Vec<&Param> {
        let Self { query_latent, q_nope, q_rope, kv_a, kv_norm, k_rope, k_up, v_up, o, .. } = self;
        query_latent.iter().flatten().chain([q_nope, q_rope, kv_a, kv_norm, k_rope, k_up, v_up, o]).collect()
    }

    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        let Self { query_latent, q_nope, q_rope, kv_a, kv_norm, k_rope, k_up, v_up, o, .. } = self;
        query_latent.iter_mut().flatten().chain([q_nope, q_rope, kv_a, kv_norm, k_rope, k_up, v_up, o]).collect()
    }
}
