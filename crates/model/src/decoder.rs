//! [`Model`]: a decoder of pre-norm layers, attention then feed-forward, each added to the residual stream.

use crate::attention::{Attention, AttentionPlan};
use crate::feed_forward::FeedForward;
use crate::{Batch, Checkpoint, Ffn, KvCache, ModelConfig, ModelError, Observer};
use moebius_kernels::attention::LayerCache;
use moebius_moe::{ExpertBank, MoeError, MoeLayer, Routing, TopKRouter};
use moebius_tensor::{Graph, Param, Rng, Tensor, Var, ops};

/// A decoder with its weights.
#[derive(Debug)]
pub struct Model {
    /// What it is made of.
    pub config: ModelConfig,
    embedding: Param,
    layers: Vec<Layer>,
    final_norm: Param,
    head: Option<Param>,
    attention_plan: AttentionPlan,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Param,
    attention: Attention,
    ffn_norm: Param,
    ffn: FeedForward,
}

/// How many weights a model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterCount {
    /// All of them.
    pub total: usize,
    /// Those that take part in one token: everything but the experts that the router leaves out.
    pub active: usize,
}

/// Makes the weight of an id, a name and a shape.
pub(crate) type MakeParam<'s> = dyn FnMut(usize, &str, &[usize]) -> Result<Param, ModelError> + 's;
/// Gives a weight of the name and shape asked for.
type Make<'s, T> = dyn FnMut(&str, &[usize]) -> Result<T, ModelError> + 's;

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
        let residual = INITIAL_DEVIATION / (2.0 * config.n_layers as f32).sqrt();
        Self::build(config, &mut |id, name, shape| {
            let mut value = Tensor::zeros(shape);
            match name.rsplit('.').next() {
                Some(name) if name.ends_with("norm") => value.data_mut().fill(1.0),
                Some(name) if name.ends_with("bias") => {}
                Some("o" | "down") => rng.fill_normal(value.data_mut(), residual),
                _ => rng.fill_normal(value.data_mut(), INITIAL_DEVIATION),
            }
            Ok(Param::new(id, name, value))
        })
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
        let mut next_id = 0;
        let mut param = |name: String, shape: &[usize]| -> Result<Param, ModelError> {
            next_id += 1;
            make(next_id - 1, &name, shape)
        };
        let (hidden, vocab) = (config.hidden, config.vocab_size);
        let (queries, keys) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
        let embedding = param("embedding".into(), &[vocab, hidden])?;
        let mut layers = Vec::with_capacity(config.n_layers);
        for layer in 0..config.n_layers {
            let mut param = |name: &str, shape: &[usize]| param(format!("layers.{layer}.{name}"), shape);
            layers.push(Layer {
                attention_norm: param("attention_norm", &[hidden])?,
                attention: Attention {
                    q: param("attention.q", &[queries, hidden])?,
                    k: param("attention.k", &[keys, hidden])?,
                    v: param("attention.v", &[keys, hidden])?,
                    o: param("attention.o", &[hidden, queries])?,
                    norms: build_norms(config, &mut param)?,
                    biases: build_biases(config, [queries, keys, keys], &mut param)?,
                },
                ffn_norm: param("ffn_norm", &[hidden])?,
                ffn: build_feed_forward(config, &mut param)?,
            });
        }
        let final_norm = param("final_norm".into(), &[hidden])?;
        let head = if config.tie_embeddings { None } else { Some(param("head".into(), &[vocab, hidden])?) };
        let attention_plan = AttentionPlan::new(config);
        Ok(Self { config: config.clone(), embedding, layers, final_norm, head, attention_plan })
    }

    /// All weights; a weight's id is its place here.
    pub fn params(&self) -> Vec<&Param> {
        let mut all = vec![&self.embedding];
        for layer in &self.layers {
            all.push(&layer.attention_norm);
            all.extend(layer.attention.params());
            all.push(&layer.ffn_norm);
            all.extend(layer.ffn.params());
        }
        all.push(&self.final_norm);
        all.extend(&self.head);
        all
    }

    /// All weights, to be changed.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        let mut all = vec![&mut self.embedding];
        for layer in &mut self.layers {
            all.push(&mut layer.attention_norm);
            all.extend(layer.attention.params_mut());
            all.push(&mut layer.ffn_norm);
            all.extend(layer.ffn.params_mut());
        }
        all.push(&mut self.final_norm);
        all.extend(&mut self.head);
        all
    }

    /// Total and active weights, embeddings included (a tied one once).
    pub fn count_params(&self) -> ParameterCount {
        let total = self.params().iter().map(|param| param.n_elements()).sum();
        let idle = match self.config.ffn {
            Ffn::Dense { .. } => 0,
            Ffn::Moe { n_experts, top_k, width, .. } => {
                self.config.n_layers * (n_experts - top_k) * 3 * width * self.config.hidden
            }
        };
        ParameterCount { total, active: total - idle }
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
        if let Ffn::Moe { top_k: 1, renormalise: true, .. } = self.config.ffn
            && g.is_recording()
        {
            // The router says so too, but when layers are recomputed it would say it in the middle of the backward.
            return Err(MoeError::NoRouterGradient.into());
        }
        let mut x = ops::embedding(g, &batch.tokens, &self.embedding)?;
        observer.hidden(0, &x);
        for (index, layer) in self.layers.iter().enumerate() {
            let routing;
            (x, routing) = if recompute && caches.is_none() {
                layer.forward_recomputed(g, &x, &self.attention_plan, batch, self.config.rms_eps as f32)?
            } else {
                let mut caches: Option<Vec<&mut LayerCache>> =
                    caches.as_deref_mut().map(|caches| caches.iter_mut().map(|cache| cache.layer(index)).collect());
                layer.forward(g, &x, &self.attention_plan, batch, caches.as_deref_mut(), self.config.rms_eps as f32)?
            };
            if let Some(routing) = &routing {
                observer.routing(index, routing);
            }
            if index + 1 < self.layers.len() {
                observer.hidden(index + 1, &x);
            }
        }
        let x = ops::rms_norm(g, &x, &self.final_norm, self.config.rms_eps as f32)?;
        observer.hidden(self.layers.len(), &x);
        Ok(x)
    }

    fn check(&self, batch: &Batch, caches: Option<&[&mut KvCache]>) -> Result<(), ModelError> {
        self.check_tokens(&batch.tokens)?;
        let (found, context) =
            (batch.positions.iter().max().map_or(0, |&last| last as usize + 1), self.config.max_positions);
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

    /// The scores of the next token, `[rows, vocab]`, of hidden states `[rows, hidden]`.
    ///
    /// # Panics
    /// If `hidden` has another width.
    pub fn logits<'p>(&'p self, g: &Graph<'p>, hidden: &Var) -> Var {
        ops::linear(g, hidden, self.head()).expect("hidden states of this model")
    }
}

/// The norms of queries and keys, if the model has them.
fn build_norms(config: &ModelConfig, param: &mut Make<'_, Param>) -> Result<Option<[Param; 2]>, ModelError> {
    let width = |heads| config.qk_norm.width(heads, config.head_dim);
    match (width(config.n_heads), width(config.n_kv_heads)) {
        (Some(q), Some(k)) => Ok(Some([param("attention.q_norm", &[q])?, param("attention.k_norm", &[k])?])),
        _ => Ok(None),
    }
}

/// The biases of queries, keys and values, if the model has them.
fn build_biases(
    config: &ModelConfig,
    [q, k, v]: [usize; 3],
    param: &mut Make<'_, Param>,
) -> Result<Option<[Param; 3]>, ModelError> {
    let mut bias = |letter: &str, width| param(&format!("attention.{letter}_bias"), &[width]);
    Ok(if config.qkv_bias { Some([bias("q", q)?, bias("k", k)?, bias("v", v)?]) } else { None })
}

fn build_feed_forward(config: &ModelConfig, param: &mut Make<'_, Param>) -> Result<FeedForward, ModelError> {
    let hidden = config.hidden;
    Ok(match config.ffn {
        Ffn::Dense { width } => FeedForward::Dense {
            gate_up: param("mlp.gate_up", &[2 * width, hidden])?,
            down: param("mlp.down", &[hidden, width])?,
        },
        Ffn::Moe { n_experts, top_k, width, renormalise } => FeedForward::Moe(MoeLayer {
            router: TopKRouter::new(param("moe.router", &[n_experts, hidden])?, top_k, renormalise)?,
            experts: ExpertBank::new(
                param("moe.gate_up", &[n_experts, 2 * width, hidden])?,
                param("moe.down", &[n_experts, hidden, width])?,
            )?,
        }),
    })
}

impl Layer {
    fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        plan: &AttentionPlan,
        batch: &Batch,
        caches: Option<&mut [&mut LayerCache]>,
        eps: f32,
    ) -> Result<(Var, Option<Routing>), ModelError> {
        let normed = ops::rms_norm(g, x, &self.attention_norm, eps)?;
        let x = ops::add(g, x, &self.attention.forward(g, &normed, plan, batch, caches)?)?;
        let normed = ops::rms_norm(g, &x, &self.ffn_norm, eps)?;
        let (y, routing) = self.ffn.forward(g, &normed)?;
        Ok((ops::add(g, &x, &y)?, routing))
    }

    /// As [`Layer::forward`] without a cache, its inner activations made anew in the backward.
    fn forward_recomputed<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        plan: &'p AttentionPlan,
        batch: &Batch,
        eps: f32,
    ) -> Result<(Var, Option<Routing>), ModelError> {
        let (batch, decided) = (batch.clone(), std::rc::Rc::new(std::cell::RefCell::new(None)));
        let slot = decided.clone();
        let outputs = g.checkpoint(x, move |g, x| {
            let (y, routing) = self.forward(g, x, plan, &batch, None, eps)?;
            let mut outputs = vec![y];
            if let Some(routing) = &routing {
                outputs.extend([routing.logits.clone(), routing.probabilities.clone()]);
            }
            slot.borrow_mut().get_or_insert(routing);
            Ok::<_, ModelError>(outputs)
        })?;
        let mut routing = decided.borrow_mut().take().flatten();
        if let Some(routing) = &mut routing {
            // Losses on the routing must flow into the recomputation.
            (routing.logits, routing.probabilities) = (outputs[1].clone(), outputs[2].clone());
        }
        Ok((outputs[0].clone(), routing))
    }
}
