//! A layer: a token mixer, then a feed-forward part, each normed and added to the residual stream.

use crate::cache::LayerState;
use crate::config::{DepthSampler, DepthsConfig, LayerConfig, ModelConfig};
use crate::feed_forward::FeedForward;
use crate::methods;
use crate::mixer::TokenMixer;
use crate::norm::StreamNorm;
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_moe::Routing;
use moebius_moe::routers::{CausalSampler, Context, DepthDecision, MixtureOfDepths, RoutingMethod};
use moebius_tensor::{Graph, Param, Var, ops};

/// A layer with its weights.
#[derive(Debug)]
pub(crate) struct Layer {
    /// Lets only some tokens through.
    depths: Option<MixtureOfDepths>,
    mixer_norms: Norms,
    mixer: TokenMixer,
    ffn_norms: Norms,
    ffn: FeedForward,
    /// What the parts' answers are multiplied with.
    residual_scale: f32,
    /// Its place among the layers: each draws random numbers of its own.
    index: u64,
}

/// What was decided on the way through a layer.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    /// Which attention heads its tokens went to, where those are experts.
    pub(crate) mixer: Option<Routing>,
    /// Which experts its tokens went to.
    pub(crate) routing: Option<Routing>,
    /// Which tokens went through it at all.
    pub(crate) depth: Option<DepthDecision>,
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
        index: usize,
        layer: &LayerConfig,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        // Ids are given in the order in which the parts work, the norms behind each part after it.
        let norm = |wanted: bool, name: &str, weights: &mut Weights<'_, '_>| {
            if wanted { StreamNorm::build(config.norm, name, config.hidden, weights).map(Some) } else { Ok(None) }
        };
        let depths = config.depths.filter(|depths| depths.applies(index));
        let depths = depths.map(|depths| build_depths(&depths, config.hidden, weights)).transpose()?;
        let (is_before, is_after) = (config.norm_place.is_before(), config.norm_place.is_after());
        let before = norm(is_before, "attention_norm", weights)?;
        let mixer = TokenMixer::build(config, &layer.mixer, weights)?;
        let mixer_norms = Norms { before, after: norm(is_after, "attention_out_norm", weights)? };
        let before = norm(is_before, "ffn_norm", weights)?;
        let ffn = FeedForward::build(config, &layer.ffn, weights)?;
        let ffn_norms = Norms { before, after: norm(is_after, "ffn_out_norm", weights)? };
        Ok(Self {
            depths,
            mixer_norms,
            mixer,
            ffn_norms,
            ffn,
            residual_scale: config.scales.residual as f32,
            index: index as u64,
        })
    }

    /// # Shapes
    /// x and result `[tokens, hidden]`.
    pub(crate) fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        batch: &Batch,
        states: Option<&mut [&mut LayerState]>,
    ) -> Result<(Var, Notes), ModelError> {
        if let Some(depths) = &self.depths {
            return self.forward_some(depths, g, x, batch, states);
        }
        let (mixed, mixer) = self.mix(g, x, batch, states)?;
        let x = self.add(g, x, mixed)?;
        let (y, routing) = self.feed_forward(g, &x, batch)?;
        Ok((self.add(g, &x, y)?, Notes { mixer, routing, depth: None }))
    }

    /// What the mixer adds to the residual stream, and what its router decided, if it has one.
    fn mix<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        batch: &Batch,
        states: Option<&mut [&mut LayerState]>,
    ) -> Result<(Var, Option<Routing>), ModelError> {
        let normed = self.mixer_norms.before(g, x)?;
        let (mixed, routing) = self.mixer.forward(g, &normed, batch, states)?;
        Ok((self.mixer_norms.after(g, mixed)?, routing))
    }

    /// What the feed-forward part adds to the residual stream.
    fn feed_forward<'p>(&'p self, g: &Graph<'p>, x: &Var, batch: &Batch) -> Result<(Var, Option<Routing>), ModelError> {
        let normed = self.ffn_norms.before(g, x)?;
        let seed = methods::mixed(g.seed(), self.index);
        let context = Context { token_ids: &batch.tokens, starts: &batch.starts, seed };
        let (y, routing) = self.ffn.forward(g, &normed, &context)?;
        Ok((self.ffn_norms.after(g, y)?, routing))
    }

    /// The tokens that `depths` lets through get what the layer adds to them, times their score; the others pass. Chosen
    /// by rank in training, each by itself otherwise.
    fn forward_some<'p>(
        &'p self,
        depths: &'p MixtureOfDepths,
        g: &Graph<'p>,
        x: &Var,
        batch: &Batch,
        mut states: Option<&mut [&mut LayerState]>,
    ) -> Result<(Var, Notes), ModelError> {
        let (mut mixer, mut routing) = (None, None);
        let through = |g: &Graph<'p>, rows: &Var, chosen: &[usize]| -> Result<Var, ModelError> {
            let part = batch.select(chosen);
            let (mixed, by_mixer) = self.mix(g, rows, &part, states.as_deref_mut())?;
            let between = self.add(g, rows, mixed.clone())?;
            let (y, decided) = self.feed_forward(g, &between, &part)?;
            (mixer, routing) = (by_mixer, decided);
            self.add(g, &mixed, y)
        };
        let (y, decision) = if g.is_training() {
            // Another number than the experts' router draws from.
            let seed = methods::mixed(!g.seed(), self.index);
            depths.forward(g, x, &batch.starts, seed, through)?
        } else {
            depths.forward_causal(g, x, &batch.positions, through)?
        };
        for (sequence, state) in states.into_iter().flatten().enumerate() {
            let rows = batch.starts[sequence]..batch.starts[sequence + 1];
            let mine = decision.chosen.iter().filter(|token| rows.contains(token));
            state.note(&mine.map(|&token| batch.positions[token]).collect::<Vec<_>>(), rows.len());
        }
        Ok((y, Notes { mixer, routing, depth: Some(decision) }))
    }

    /// The residual stream and a part's answer.
    fn add<'p>(&self, g: &Graph<'p>, x: &Var, y: Var) -> Result<Var, ModelError> {
        if self.residual_scale == 1.0 {
            return Ok(ops::add(g, x, y)?);
        }
        Ok(ops::add(g, x, ops::scale(g, &y, self.residual_scale))?)
    }

    /// As [`Layer::forward`] without a cache, its inner activations made anew in the backward.
    pub(crate) fn forward_recomputed<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        batch: &Batch,
    ) -> Result<(Var, Notes), ModelError> {
        let (batch, decided) = (batch.clone(), std::rc::Rc::new(std::cell::RefCell::new(None)));
        let slot = decided.clone();
        let outputs = g.checkpoint(x, move |g, x| {
            let (y, mut notes) = self.forward(g, x, &batch, None)?;
            let mut outputs = vec![y];
            outputs.extend(notes.values().into_iter().map(|value| value.clone()));
            slot.borrow_mut().get_or_insert(notes);
            Ok::<_, ModelError>(outputs)
        })?;
        let mut notes = decided.borrow_mut().take().unwrap_or_default();
        // Losses on what was decided must flow into the recomputation.
        notes.values().into_iter().zip(&outputs[1..]).for_each(|(value, output)| *value = output.clone());
        Ok((outputs[0].clone(), notes))
    }

    /// The routing method, if one stands for the family's router.
    pub(crate) fn method_mut(&mut self) -> Option<&mut dyn RoutingMethod> {
        self.ffn.method_mut()
    }

    /// All weights, in the order of their ids.
    pub(crate) fn params(&self) -> Vec<&Param> {
        let Self { depths, mixer_norms, mixer, ffn_norms, ffn, .. } = self;
        let of = |norm| Option::<&StreamNorm>::into_iter(norm).flat_map(StreamNorm::params);
        let mut all: Vec<&Param> = depths.iter().flat_map(MixtureOfDepths::params).collect();
        all.extend(of(mixer_norms.before.as_ref()));
        all.extend(mixer.params());
        all.extend(of(mixer_norms.after.as_ref()).chain(of(ffn_norms.before.as_ref())));
        all.extend(ffn.params());
        all.extend(of(ffn_norms.after.as_ref()));
        all
    }

    /// All weights, to be changed.
    pub(crate) fn params_mut(&mut self) -> Vec<&mut Param> {
        let Self { depths, mixer_norms, mixer, ffn_norms, ffn, .. } = self;
        let of = |norm| Option::<&mut StreamNorm>::into_iter(norm).flat_map(StreamNorm::params_mut);
        let mut all: Vec<&mut Param> = depths.iter_mut().flat_map(MixtureOfDepths::params_mut).collect();
        all.extend(of(mixer_norms.before.as_mut()));
        all.extend(mixer.params_mut());
        all.extend(of(mixer_norms.after.as_mut()).chain(of(ffn_norms.before.as_mut())));
        all.extend(ffn.params_mut());
        all.extend(of(ffn_norms.after.as_mut()));
        all
    }
}

impl Notes {
    /// The values that losses are taken of.
    fn values(&mut self) -> Vec<&mut Var> {
        let mut all = Vec::new();
        for Routing { logits, probabilities, losses, .. } in self.mixer.iter_mut().chain(&mut self.routing) {
            all.extend([logits, probabilities]);
            all.extend(losses.iter_mut().map(|loss| &mut loss.value));
        }
        all.extend(self.depth.iter_mut().map(|depth| &mut depth.sampler_loss));
        all
    }
}

fn build_depths(
    config: &DepthsConfig,
    hidden: usize,
    weights: &mut Weights<'_, '_>,
) -> Result<MixtureOfDepths, ModelError> {
    let score = weights.get("depth_router", &[1, hidden])?;
    let sampler = match config.sampler {
        DepthSampler::Threshold => CausalSampler::Threshold,
        DepthSampler::Random => CausalSampler::Random,
        DepthSampler::Predictor { width } => CausalSampler::Predictor {
            inner: weights.get("depth_inner", &[width, hidden])?,
            outer: weights.get("depth_outer", &[1, width])?,
        },
    };
    Ok(MixtureOfDepths::new(score, config.share, sampler)?)
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
