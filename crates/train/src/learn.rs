//! What training asks of the model: a configuration, a loss, gradients.

use moebius_kernels::parallel::with_team;
use moebius_model::{Batch, Counted, Ffn, LossSettings, Model, ModelConfig, Observer, UniformDecoder};
use moebius_moe::{LoadStatistics, Routing};
use moebius_tensor::{Gradients, Graph};

use crate::data::corpus::Windows;
use crate::data::tokenizer::END_OF_TEXT_ID;
use crate::evaluate::Evaluation;
use crate::metrics::LayerLoad;
use crate::recipe::{Activation, DepthsSection, RecipeQkNorm, RouterSection};
use crate::{Recipe, Result};

/// Rows of a batch at most whose router entropy is taken: it is a figure to watch, not worth a per cent of the step.
const ENTROPY_ROWS: usize = 512;

/// What each layer's router did, summed over batches.
#[derive(Clone, Debug, Default)]
pub struct LoadCounts(Vec<LayerSum>);

#[derive(Clone, Debug, Default)]
struct LayerSum {
    counts: LoadStatistics,
    dropped: u64,
    entropy: f64,
    rows: usize,
}

impl LoadCounts {
    /// Adds what the routers of all sparse layers decided about one batch.
    fn add(&mut self, routing: &[Routing]) {
        self.0.resize_with(routing.len(), LayerSum::default);
        for (sum, layer) in self.0.iter_mut().zip(routing) {
            sum.counts.add(&layer.plan);
            sum.dropped += layer.dropped as u64;
            let experts = layer.plan.n_experts().max(2);
            let rows = layer.probabilities.data().chunks_exact(experts);
            let stride = rows.len().div_ceil(ENTROPY_ROWS).max(1);
            for row in rows.step_by(stride) {
                sum.entropy += entropy(row);
                sum.rows += 1;
            }
        }
    }

    /// Each layer's load.
    pub fn loads(&self) -> Vec<LoadStatistics> {
        self.0.iter().map(|sum| sum.counts.clone()).collect()
    }

    /// Assignments of each expert, layer by layer.
    pub fn counts(&self) -> Vec<&[u64]> {
        self.0.iter().map(|sum| &sum.counts.counts[..]).collect()
    }

    /// Choices that found their expert full, all layers together.
    pub fn dropped(&self) -> u64 {
        self.0.iter().map(|sum| sum.dropped).sum()
    }

    /// The sums, layer by layer.
    pub fn statistics(&self) -> Vec<LayerLoad> {
        let layer = |sum: &LayerSum| LayerLoad::new(&sum.counts, sum.entropy / sum.rows.max(1) as f64);
        self.0.iter().map(layer).collect()
    }
}

/// Entropy of probabilities over its largest value.
fn entropy(probabilities: &[f32]) -> f64 {
    let terms = probabilities.iter().map(|&p| f64::from(p)).filter(|&p| p > 0.0);
    terms.map(|p| -p * p.ln()).sum::<f64>() / (probabilities.len() as f64).ln()
}

/// The parts of a training loss, each with its coefficient.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// Cross-entropy of the next token.
    pub cross_entropy: f64,
    /// Load balancing.
    pub balance: f64,
    /// The router's z-loss.
    pub z: f64,
    /// The routing method's own losses.
    pub method: f64,
}

impl Losses {
    /// Adds `factor` times `other`.
    pub fn add(&mut self, other: &Self, factor: f64) {
        self.cross_entropy += factor * other.cross_entropy;
        self.balance += factor * other.balance;
        self.z += factor * other.z;
        self.method += factor * other.method;
    }
}

/// The configuration that a recipe asks for: Llama's family if dense, Mixtral's if it can express the routing, else our
/// own.
pub fn model_config(recipe: &Recipe, vocab_size: usize) -> ModelConfig {
    let model = &recipe.model;
    let sparse = model.experts.zip(model.experts_per_token);
    let routing = recipe.router.as_ref().map(RouterSection::method);
    let depths = recipe.depths.as_ref().map(DepthsSection::config);
    let (gate, dense_gate) = (model.activation, model.dense_activation.unwrap_or(model.activation));
    let is_plain = model.experts_every == 1 && gate == Activation::Silu && model.qk_norm == RecipeQkNorm::None;
    let is_ours = routing.is_some() || depths.is_some() || !is_plain;
    let (family, ffn) = match sparse {
        Some((n_experts, top_k)) => ("mixtral", Ffn::moe_of(n_experts, top_k, model.ffn, true)),
        None => ("llama", Ffn::dense(model.ffn)),
    };
    let (family, ffn) = (if is_ours { "moebius" } else { family }, ffn.with_gate(gate.into()));
    let decoder = UniformDecoder {
        family,
        vocab_size,
        hidden: model.hidden,
        n_layers: model.layers,
        n_heads: model.heads,
        n_kv_heads: model.kv_heads.unwrap_or(model.heads),
        head_dim: model.hidden / model.heads,
        max_positions: model.context,
        rope_theta: model.rope_theta,
        rms_eps: model.norm_epsilon,
        tie_embeddings: model.tied_embeddings,
        qk_norm: model.qk_norm.into(),
        ffn,
        ..UniformDecoder::default()
    };
    let mut config = ModelConfig {
        router_aux_loss_coef: recipe.balance.load_balancing,
        bos_token: Some(END_OF_TEXT_ID),
        eos_tokens: vec![END_OF_TEXT_ID],
        routing,
        depths,
        ..decoder.config()
    };
    for (index, layer) in config.layers.iter_mut().enumerate() {
        if sparse.is_some() && !(index + 1).is_multiple_of(model.experts_every) {
            layer.ffn = Ffn::dense(model.dense_ffn.unwrap_or(model.ffn)).with_gate(dense_gate.into());
        }
    }
    config
}

/// Windows as sequences of a batch; attention does not cross from one to the next.
fn batch_of(windows: &Windows) -> Batch {
    Batch::of_sequences(&windows.sequences())
}

/// The mean cross-entropy of `windows`, in nats a token.
///
/// # Errors
/// The model's.
pub fn measure(model: &Model, windows: &Windows, what: &Evaluation, load: &mut LoadCounts) -> Result<f64> {
    let graph = Graph::inference(what.precision).with_routers_in(what.router_precision);
    let loss = model.loss(&graph, &batch_of(windows), &windows.targets, &LossSettings::default())?;
    load.add(&loss.routing);
    Ok(f64::from(loss.cross_entropy))
}

/// What the routers of a micro-batch will decide in [`gradients`], added to `load`.
///
/// # Errors
/// The model's.
pub fn count(model: &Model, windows: &Windows, recipe: &Recipe, seed: u64, load: &mut LoadCounts) -> Result<()> {
    let graph = set_up(Graph::rehearsal(recipe.train.precision.into()), recipe, seed);
    let mut routers = Routers::default();
    with_team(|| model.forward(&graph, &batch_of(windows), None, &mut routers))?;
    load.add(&routers.0);
    Ok(())
}

/// Keeps what all layers' routers decide.
#[derive(Default)]
struct Routers(Vec<Routing>);

impl Observer for Routers {
    fn routing(&mut self, _: usize, routing: &Routing) {
        self.0.push(routing.clone());
    }
}

/// A graph as the recipe has it in training.
fn set_up<'p>(graph: Graph<'p>, recipe: &Recipe, seed: u64) -> Graph<'p> {
    let train = &recipe.train;
    graph.with_routers_in(train.router_precision.into()).with_expert_dropout(train.expert_dropout as f32).seeded(seed)
}

/// The losses of one micro-batch; adds their gradient to `gradients`. `seed` decides what routers draw by lot.
///
/// # Errors
/// The model's.
pub fn gradients(
    model: &Model,
    windows: &Windows,
    recipe: &Recipe,
    seed: u64,
    gradients: &mut Gradients,
    counted: Counted<'_>,
    load: &mut LoadCounts,
) -> Result<Losses> {
    let settings = LossSettings {
        counted,
        balance_coefficient: recipe.balance.load_balancing as f32,
        z_coefficient: recipe.balance.z as f32,
        recompute: recipe.train.checkpoint_activations,
    };
    let graph = set_up(Graph::training(recipe.train.precision.into()), recipe, seed);
    let uses_once = recipe.train.accumulation == 1 && !settings.recompute;
    let graph = if uses_once { graph.with_weights_used_once() } else { graph };
    let batch = batch_of(windows);
    let loss = with_team(|| -> Result<_> {
        let loss = model.loss(&graph, &batch, &windows.targets, &settings)?;
        graph.backward(&loss.total, gradients);
        Ok(loss)
    })?;
    load.add(&loss.routing);
    Ok(Losses {
        cross_entropy: f64::from(loss.cross_entropy),
        balance: f64::from(loss.balance) * recipe.balance.load_balancing,
        z: f64::from(loss.z) * recipe.balance.z,
        method: f64::from(loss.method),
    })
}
