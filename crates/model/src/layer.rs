//! A layer: a token mixer, then a feed-forward part, each normed and added to the residual stream.

use crate::cache::LayerState;
use crate::config::{LayerConfig, ModelConfig};
use crate::feed_forward::FeedForward;
use crate::mixer::TokenMixer;
use crate::norm::StreamNorm;
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_moe::Routing;
use moebius_tensor::{Graph, Param, Var, ops};

/// A layer with its weights.
#[derive(Debug)]
pub(crate) struct Layer {
    mixer_norms: Norms,
    mixer: TokenMixer,
    ffn_norms: Norms,
    ffn: FeedForward,
    /// What the parts' answers are multiplied with.
    residual_scale: f32,
}

/// What the routers of a layer decided.
#[derive(Clone, Debug, Default)]
pub(crate) struct LayerRouting {
    pub(crate) mixer: Option<Routing>,
    pub(crate) ffn: Option<Routing>,
}

impl LayerRouting {
    fn each(&self) -> impl Iterator<Item = &Routing> {
        self.mixer.iter().chain(&self.ffn)
    }

    fn each_mut(&mut self) -> impl Iterator<Item = &mut Routing> {
        self.mixer.iter_mut().chain(&mut self.ffn)
    }
}

/// The norms of a part: of what it reads, of what it answers.
#[derive(Debug)]
struct Norms {
    before: Option<StreamNorm>,
    after: Option<StreamNorm>,
}

impl Layer {
    pub(crate) fn build(
        config: &ModelConfig,
        layer: &LayerConfig,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        // Ids are given in the order in which the parts work, the norms behind each part after it.
        let norm = |wanted: bool, name: &str, weights: &mut Weights<'_, '_>| {
            if wanted { StreamNorm::build(config.norm, name, config.hidden, weights).map(Some) } else { Ok(None) }
        };
        let (is_before, is_after) = (config.norm_place.is_before(), config.norm_place.is_after());
        let before = norm(is_before, "attention_norm", weights)?;
        let mixer = TokenMixer::build(config, &layer.mixer, weights)?;
        let mixer_norms = Norms { before, after: norm(is_after, "attention_out_norm", weights)? };
        let before = norm(is_before, "ffn_norm", weights)?;
        let ffn = FeedForward::build(&layer.ffn, config.hidden, weights)?;
        let ffn_norms = Norms { before, after: norm(is_after, "ffn_out_norm", weights)? };
        Ok(Self { mixer_norms, mixer, ffn_norms, ffn, residual_scale: config.scales.residual as f32 })
    }

    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub(crate) fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        batch: &Batch,
        states: Option<&mut [&mut LayerState]>,
    ) -> Result<(Var, LayerRouting), ModelError> {
        let normed = self.mixer_norms.before(g, x)?;
        let (mixed, mixer) = self.mixer.forward(g, &normed, batch, states)?;
        let x = self.add(g, x, &self.mixer_norms.after(g, mixed)?)?;
        let normed = self.ffn_norms.before(g, &x)?;
        let (y, ffn) = self.ffn.forward(g, &normed)?;
        Ok((self.add(g, &x, &self.ffn_norms.after(g, y)?)?, LayerRouting { mixer, ffn }))
    }

    /// The residual stream and a part's answer.
    fn add<'p>(&self, g: &Graph<'p>, x: &Var, y: &Var) -> Result<Var, ModelError> {
        if self.residual_scale == 1.0 {
            return Ok(ops::add(g, x, y)?);
        }
        Ok(ops::add(g, x, &ops::scale(g, y, self.residual_scale))?)
    }

    /// As [`Layer::forward`] without a cache, its inner activations made anew in the backward.
    pub(crate) fn forward_recomputed<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        batch: &Batch,
    ) -> Result<(Var, LayerRouting), ModelError> {
        let (batch, decided) = (batch.clone(), std::rc::Rc::new(std::cell::RefCell::new(None)));
        let slot = decided.clone();
        let outputs = g.checkpoint(x, move |g, x| {
            let (y, routing) = self.forward(g, x, &batch, None)?;
            let mut outputs = vec![y];
            for routing in routing.each() {
                outputs.extend([routing.logits.clone(), routing.probabilities.clone()]);
            }
            slot.borrow_mut().get_or_insert(routing);
            Ok::<_, ModelError>(outputs)
        })?;
        let mut routing: LayerRouting = decided.borrow_mut().take().unwrap_or_default();
        // Losses on the routing must flow into the recomputation.
        for (routing, scores) in routing.each_mut().zip(outputs[1..].chunks_exact(2)) {
            (routing.logits, routing.probabilities) = (scores[0].clone(), scores[1].clone());
        }
        Ok((outputs[0].clone(), routing))
    }

    /// All weights, in the order of their ids.
    pub(crate) fn params(&self) -> Vec<&Param> {
        let Self { mixer_norms, mixer, ffn_norms, ffn, .. } = self;
        let of = |norm| Option::<&StreamNorm>::into_iter(norm).flat_map(StreamNorm::params);
        let mut all: Vec<&Param> = of(mixer_norms.before.as_ref()).collect();
        all.extend(mixer.params());
        all.extend(of(mixer_norms.after.as_ref()).chain(of(ffn_norms.before.as_ref())));
        all.extend(ffn.params());
        all.extend(of(ffn_norms.after.as_ref()));
        all
    }

    /// All weights, to be changed.
    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        let Self { mixer_norms, mixer, ffn_norms, ffn, .. } = self;
        let of = |norm| Option::<&mut StreamNorm>::into_iter(norm).flat_map(StreamNorm::params_mut);
        let mut all: Vec<&mut Param> = of(mixer_norms.before.as_mut()).collect();
        all.extend(mixer.params_mut());
        all.extend(of(mixer_norms.after.as_mut()).chain(of(ffn_norms.before.as_mut())));
        all.extend(ffn.params_mut());
        all.extend(of(ffn_norms.after.as_mut()));
        all
    }
}

impl Norms {
    fn before<'p>(&'p self, g: &Graph<'p>, x: &Var) -> Result<Var, ModelError> {
        self.before.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(g, x))
    }

    fn after<'p>(&'p self, g: &Graph<'p>, x: Var) -> Result<Var, ModelError> {
        match &self.after {
            None => Ok(x),
            Some(norm) => norm.forward(g, &x),
        }
    }
}
