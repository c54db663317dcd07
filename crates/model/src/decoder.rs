//! [`Model`]: a decoder, layers between an embedding and an output projection.

use crate::cache::LayerState;
use crate::layer::Layer;
use crate::norm::StreamNorm;
use crate::weights::{MakeParam, Weights};
use crate::{Batch, Checkpoint, KvCache, ModelConfig, ModelError, Observer};
use moebius_moe::MoeError;
use moebius_tensor::{Graph, Param, Rng, Tensor, Var, ops};

/// A decoder with its weights.
#[derive(Debug)]
pub struct Model {
    /// What it is made of.
    pub config: ModelConfig,
    embedding: Param,
    layers: Vec<Layer>,
    final_norm: StreamNorm,
    head: Option<Param>,
    head_bias: Option<Param>,
}

/// How many weights a model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterCount {
    /// All of them.
    pub total: usize,
    /// Those that take part in one token: everything but the experts that the router leaves out.
    pub active: usize,
}

/// Standard deviation of initial weights.
const INITIAL_DEVIATION: f32 = 0.02;

impl Model {
    /// A model with random weights: normal with deviation 0.02, those that write to the residual stream divided by
    /// sqrt(2 * layers) (Radford et al. 2019), norms one.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn new(config: &ModelConfig, seed: u64) -> Result<Self, ModelError> {
        let mut rng = Rng::new(seed);
        let residual = INITIAL_DEVIATION / (2.0 * config.n_layers() as f32).sqrt();
        let mut model = Self::build(config, &mut |id, name, shape| {
            let mut value = Tensor::zeros(shape);
            match name.rsplit('.').next() {
                Some(name) if name.ends_with("norm") => value.data_mut().fill(1.0),
                Some(name) if name.ends_with("bias") => {}
                Some("o" | "down") => rng.fill_normal(value.data_mut(), residual),
                _ => rng.fill_normal(value.data_mut(), INITIAL_DEVIATION),
            }
            Ok(Param::new(id, name, value))
        })?;
        model.initialise_routers(&mut rng);
        Ok(model)
    }

    /// The weights of routing methods whose papers say how they begin.
    fn initialise_routers(&mut self, rng: &mut Rng) {
        for method in self.layers.iter_mut().filter_map(Layer::method_mut) {
            let deviations: Vec<Option<f32>> =
                method.params().into_iter().map(|param| method.initial_deviation(param)).collect();
            for (param, deviation) in method.params_mut().into_iter().zip(deviations) {
                if let Some(deviation) = deviation {
                    param.update(|weights| rng.fill_truncated_normal(weights, deviation));
                }
            }
        }
    }

    /// Reads a checkpoint's weights.
    ///
    /// # Errors
    /// The tensor that is missing, surplus, of another shape or type.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let mut values = checkpoint.load()?;
        Self::build(checkpoint.config(), &mut |id, name, shape| {
            let value = values.remove(name).expect("a family's tensors make all weights");
            Ok(Param::new(id, name, value.reshape(shape)))
        })
    }

    /// Makes every weight, in the order of their ids, from its name and shape.
    pub(crate) fn build(config: &ModelConfig, make: &mut MakeParam<'_>) -> Result<Self, ModelError> {
        config.validate().map_err(|(key, message)| ModelError::config("configuration", key, message))?;
        let mut weights = Weights::new(make);
        let (hidden, vocab) = (config.hidden, config.vocab_size);
        let embedding = weights.get("embedding", &[vocab, hidden])?;
        let layers = config.layers.iter().enumerate();
        let layers = layers.map(|(index, layer)| {
            weights.within(&format!("layers.{index}."), |weights| Layer::build(config, index, layer, weights))
        });
        let layers = layers.collect::<Result<Vec<Layer>, ModelError>>()?;
        let final_norm =
            StreamNorm::build(config.last_norm.unwrap_or(config.norm), "final_norm", hidden, &mut weights)?;
        let head = weights.get_if(!config.tie_embeddings, "head", &[vocab, hidden])?;
        let head_bias = weights.get_if(config.head_bias, "head_bias", &[vocab])?;
        Ok(Self { config: config.clone(), embedding, layers, final_norm, head, head_bias })
    }

    /// All weights; a weight's id is its place here.
    pub fn params(&self) -> Vec<&Param> {
        let mut all = vec![&self.embedding];
        all.extend(self.layers.iter().flat_map(Layer::params));
        all.extend(self.final_norm.params());
        all.extend(self.head.iter().chain(&self.head_bias));
        all
    }

    /// All weights, to be changed.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        let mut all = vec![&mut self.embedding];
        all.extend(self.layers.iter_mut().flat_map(Layer::params_mut));
        all.extend(self.final_norm.params_mut());
        all.extend(self.head.iter_mut().chain(&mut self.head_bias));
        all
    }

    /// Total and active weights, embeddings included (a tied one once).
    pub fn count_params(&self) -> ParameterCount {
        let inventory = self.config.inventory().expect("a model's configuration was looked at when it was made");
        ParameterCount { total: inventory.total() as usize, active: inventory.active() as usize }
    }

    /// Tells each layer's routing method, once an optimiser step, how many assignments each expert had in all of the step's
    /// batches; families' routers hear nothing.
    ///
    /// # Shapes
    /// counts: `[experts]` of each layer with experts.
    ///
    /// # Panics
    /// If layers with a method are more than counts.
    pub fn after_step(&mut self, counts: &[&[u64]]) {
        let methods = self.layers.iter_mut().filter_map(Layer::method_mut);
        for (place, method) in methods.enumerate() {
            method.after_step(counts[place]);
        }
    }

    /// An error unless all ids are in the vocabulary.
    ///
    /// # Errors
    /// The first that is not, and where it stands.
    pub fn check_tokens(&self, tokens: &[u32]) -> Result<(), ModelError> {
        let vocabulary = self.config.vocab_size;
        match tokens.iter().position(|&token| token as usize >= vocabulary) {
            Some(position) => Err(ModelError::Token { token: tokens[position], position, vocabulary }),
            None => Ok(()),
        }
    }

    /// The hidden states after the final norm, `[tokens, hidden]`. With caches, one for each sequence of the batch, each
    /// sequence goes on where its cache ends; its bits do not depend on the others.
    ///
    /// # Errors
    /// A token or position that the model lacks.
    pub fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        batch: &Batch,
        caches: Option<&mut [&mut KvCache]>,
        observer: &mut dyn Observer,
    ) -> Result<Var, ModelError> {
        self.forward_with(g, batch, caches, observer, false)
    }

    /// As [`Model::forward`]; with `recompute`, layers keep nothing for the backward but their input and run twice.
    pub(crate) fn forward_with<'p>(
        &'p self,
        g: &Graph<'p>,
        batch: &Batch,
        mut caches: Option<&mut [&mut KvCache]>,
        observer: &mut dyn Observer,
        recompute: bool,
    ) -> Result<Var, ModelError> {
        self.check(batch, caches.as_deref())?;
        let mut routers = self.config.layers.iter().filter_map(|layer| layer.ffn.moe());
        if g.is_recording() && self.config.routing.is_none() && routers.any(|moe| moe.router.has_no_gradient()) {
            // The router says so too, but when layers are recomputed it would say it in the middle of the backward.
            return Err(MoeError::NoRouterGradient.into());
        }
        let mut x = ops::embedding(g, &batch.tokens, &self.embedding)?;
        if self.config.scales.embedding != 1.0 {
            x = ops::scale(g, &x, self.config.scales.embedding as f32);
        }
        observer.hidden(0, &x);
        for (index, layer) in self.layers.iter().enumerate() {
            let notes;
            (x, notes) = if recompute && caches.is_none() {
                layer.forward_recomputed(g, &x, batch)?
            } else {
                let mut states: Option<Vec<&mut LayerState>> =
                    caches.as_deref_mut().map(|caches| caches.iter_mut().map(|cache| cache.layer(index)).collect());
                layer.forward(g, &x, batch, states.as_deref_mut())?
            };
            if let Some(routing) = &notes.mixer {
                observer.mixer_routing(index, routing);
            }
            if let Some(routing) = &notes.routing {
                observer.routing(index, routing);
            }
            if let Some(depth) = &notes.depth {
                observer.depth(index, depth);
            }
            if index + 1 < self.layers.len() {
                observer.hidden(index + 1, &x);
            }
        }
        let x = self.final_norm.forward(g, &x)?;
        observer.hidden(self.layers.len(), &x);
        Ok(x)
    }

    fn check(&self, batch: &Batch, caches: Option<&[&mut KvCache]>) -> Result<(), ModelError> {
        self.check_tokens(&batch.tokens)?;
        let (found, context) = (batch.end_position(), self.config.max_positions);
        if found > context {
            return Err(ModelError::Context { found, context });
        }
        if let Some(caches) = caches {
            assert_eq!(batch.starts.len(), caches.len() + 1, "a cache for each sequence");
            for (cache, bounds) in caches.iter().zip(batch.starts.windows(2)) {
                let first = batch.positions[bounds[0]..bounds[1]].first().map_or(cache.len(), |&first| first as usize);
                assert_eq!(first, cache.len(), "a sequence goes on where its cache ends");
            }
        }
        Ok(())
    }

    /// The output projection.
    pub(crate) fn head(&self) -> &Param {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// The bias of the logits.
    pub(crate) fn head_bias(&self) -> Option<&Param> {
        self.head_bias.as_ref()
    }

    /// What the output projection reads of hidden states after the final norm: they are scaled instead of the logits,
    /// which are many more.
    pub(crate) fn head_input<'p>(&self, g: &Graph<'p>, hidden: &Var) -> Var {
        let scale = self.config.scales.logits;
        if scale == 1.0 { hidden.clone() } else { ops::scale(g, hidden, scale as f32) }
    }

    /// The scores of the next token, `[rows, vocab]`, of hidden states `[rows, hidden]`.
    ///
    /// # Panics
    /// If `hidden` has another width.
    pub fn logits<'p>(&'p self, g: &Graph<'p>, hidden: &Var) -> Var {
        let logits = ops::linear(g, &self.head_input(g, hidden), self.head()).expect("hidden states of this model");
        match &self.head_bias {
            None => logits,
            Some(bias) => ops::add_bias(g, &logits, bias).expect("a bias for each token of the vocabulary"),
        }
    }
}
