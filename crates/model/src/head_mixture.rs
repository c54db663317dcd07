//! Attention whose query heads are experts (Zhang et al. 2022; Shen et al. 2024, "JetMoE"): a router gives each token a few
//! pairs of query and output projections, which share the keys and values.

use crate::attention::attend_cached;
use crate::cache::LayerState;
use crate::config::HeadMixture;
use crate::position::RotaryAngles;
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_kernels::attention::AttentionShape;
use moebius_moe::{HeadBank, Router, Routing, TopKRouter};
use moebius_tensor::{Graph, Param, Var, ops};
use std::sync::Arc;

/// One layer's attention.
#[derive(Debug)]
pub(crate) struct MixedAttention {
    router: TopKRouter,
    heads: HeadBank,
    /// `[2 * n_kv_heads * head_dim, hidden]`: keys, then values.
    kv: Param,
    /// `[hidden]`.
    bias: Param,
    shape: AttentionShape,
    rotation: Option<Arc<RotaryAngles>>,
}

impl MixedAttention {
    pub(crate) fn build(
        hidden: usize,
        config: &HeadMixture,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        let HeadMixture { n_experts, router, n_kv_heads, head_dim, .. } = *config;
        let width = n_kv_heads * head_dim;
        let rotation = config.rope.as_ref().map(|rope| weights.rotations.of(rope));
        let heads = [router.top_k * n_kv_heads, n_kv_heads, head_dim];
        let shape = AttentionShape::grouped(heads, config.scale as f32);
        weights.within("heads.", |weights| {
            let score = weights.get("router", &[n_experts, hidden])?;
            let query = weights.get("q", &[n_experts, width, hidden])?;
            let output = weights.get("o", &[n_experts, hidden, width])?;
            Ok(Self {
                router: TopKRouter::with(score, [None, None], router)?,
                heads: HeadBank::new(query, output, n_kv_heads)?,
                kv: weights.get("kv", &[2 * width, hidden])?,
                bias: weights.get("o_bias", &[hidden])?,
                shape,
                rotation,
            })
        })
    }

    /// Also gives what the router decided.
    ///
    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub(crate) fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        batch: &Batch,
        states: Option<&mut [&mut LayerState]>,
    ) -> Result<(Var, Routing), ModelError> {
        let (shape, routing) = (&self.shape, self.router.route(g, x)?);
        let mut q = self.heads.queries(g, x, &routing.plan)?;
        let (kv, width) = (ops::linear(g, x, &self.kv)?, shape.key_width());
        let mut k = ops::columns(g, &kv, 2 * width, 0..width)?;
        let v = ops::columns(g, &kv, 2 * width, width..2 * width)?;
        if let Some(rotation) = &self.rotation {
            let table = rotation.covering(batch.end_position());
            let turn = |x: Var, heads| ops::rope(g, x, heads, shape.head_dim, &batch.positions, &table);
            (q, k) = (turn(q, shape.n_heads)?, turn(k, shape.n_kv_heads)?);
        }
        let attended = match states {
            None => ops::attention(g, &q, &k, &v, shape, &batch.starts)?,
            Some(states) => attend_cached(shape, &q, [k.data(), v.data()], None, batch, states),
        };
        let y = self.heads.outputs(g, &attended, &routing.plan, &routing.weights)?;
        Ok((ops::add_bias(g, &y, &self.bias)?, routing))
    }

    pub(crate) fn params(&self) -> Vec<&Param> {
        let Self { router, heads, kv, bias, .. } = self;
        router.params().into_iter().chain(heads.params()).chain([kv, bias]).collect()
    }

    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        let Self { router, heads, kv, bias, .. } = self;
        router.params_mut().into_iter().chain(heads.params_mut()).chain([kv, bias]).collect()
    }
}
