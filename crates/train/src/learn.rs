//! What training asks of the model: a configuration, a loss, gradients.

use moebius_kernels::gemm::Precision;
use moebius_model::{Batch, Ffn, LossSettings, Model, ModelConfig};
use moebius_moe::{LoadStatistics, Routing, load_balancing_loss};
use moebius_tensor::{Gradients, Graph, Var};

use crate::data::corpus::Windows;
use crate::data::tokenizer::END_OF_TEXT_ID;
use crate::metrics::LayerLoad;
use crate::{Recipe, Result};

/// Assignments of each layer's experts, summed over batches.
#[derive(Clone, Debug, Default)]
pub struct LoadCounts(Vec<LoadStatistics>);

impl LoadCounts {
    /// Adds what the routers of all sparse layers decided about one batch.
    fn add(&mut self, routing: &[Routing]) {
        self.0.resize_with(routing.len(), LoadStatistics::default);
        self.0.iter_mut().zip(routing).for_each(|(sum, layer)| sum.add(&layer.plan));
    }

    /// The sums, layer by layer.
    pub fn statistics(&self) -> Vec<LayerLoad> {
        self.0.iter().map(LayerLoad::from).collect()
    }
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
}

impl Losses {
    /// Adds `factor` times `other`.
    pub fn add(&mut self, other: &Self, factor: f64) {
        self.cross_entropy += factor * other.cross_entropy;
        self.balance += factor * other.balance;
        self.z += factor * other.z;
    }
}

/// The configuration that a recipe asks for: Mixtral's family if sparse, Llama's if dense.
pub fn model_config(recipe: &Recipe, vocab_size: usize) -> ModelConfig {
    let model = &recipe.model;
    let (family, ffn) = match (model.experts, model.experts_per_token) {
        (Some(n_experts), Some(top_k)) => {
            ("mixtral", Ffn::Moe { n_experts, top_k, width: model.ffn, renormalise: true })
        }
        _ => ("llama", Ffn::Dense { width: model.ffn }),
    };
    ModelConfig {
        family: family.to_owned(),
        vocab_size,
        hidden: model.hidden,
        n_layers: model.layers,
        n_heads: model.heads,
        n_kv_heads: model.kv_heads.unwrap_or(model.heads),
        head_dim: model.hidden / model.heads,
        max_positions: model.context,
        rope_theta: model.rope_theta,
        rms_eps: model.norm_epsilon,
        window: None,
        tie_embeddings: model.tied_embeddings,
        ffn,
        router_aux_loss_coef: recipe.balance.load_balancing,
        bos_token: Some(END_OF_TEXT_ID),
        eos_tokens: vec![END_OF_TEXT_ID],
    }
}

/// Windows of `length` tokens as sequences of a batch; attention does not cross from one to the next.
fn batch_of(windows: &Windows, length: usize) -> Batch {
    Batch::of_sequences(&windows.tokens.chunks(length).collect::<Vec<_>>())
}

/// The mean cross-entropy of `windows`, in nats a token.
///
/// # Errors
/// The model's.
pub fn measure(
    model: &Model,
    windows: &Windows,
    length: usize,
    precision: Precision,
    load: &mut LoadCounts,
) -> Result<f64> {
    let graph = Graph::inference(precision);
    let loss = model.loss(&graph, &batch_of(windows, length), &windows.targets, &LossSettings::default())?;
    load.add(&loss.routing);
    Ok(f64::from(loss.cross_entropy))
}

/// The losses of one micro-batch; adds their gradient to `gradients`.
///
/// # Errors
/// The model's.
pub fn gradients(
    model: &Model,
    windows: &Windows,
    recipe: &Recipe,
    gradients: &mut Gradients,
    load: &mut LoadCounts,
) -> Result<Losses> {
    // The model's own balance loss pools all layers, as transformers does; ours is a layer's, so it is added here.
    let settings = LossSettings {
        balance_coefficient: 0.0,
        z_coefficient: recipe.balance.z as f32,
        recompute: recipe.train.checkpoint_activations,
    };
    let graph = Graph::training(recipe.train.precision.into());
    let batch = batch_of(windows, recipe.train.sequence_length);
    let loss = model.loss(&graph, &batch, &windows.targets, &settings)?;
    load.add(&loss.routing);
    let (total, balance) = add_balance(&graph, loss.total, &loss.routing, recipe.balance.load_balancing);
    graph.backward(&total, gradients);
    Ok(Losses { cross_entropy: f64::from(loss.cross_entropy), balance, z: f64::from(loss.z) * recipe.balance.z })
}

/// Adds `coefficient` times the mean over layers of each layer's load-balancing loss E Σ_e f_e P_e (Fedus et al. 2021);
/// returns the sum and what was added.
///
/// transformers counts f and P over all layers together: then every layer may send all to a few experts, as long as the
/// layers choose different ones, and small models do: at the last of 1000 steps of `recipes/tiny.toml` the fullest expert
/// of a layer had 3.5 times the mean (4 is the most possible), with a layer's own loss 1.3 times. The validation loss
/// was no better for it there (3.398 pooled, 3.404 by layer; one seed each, the spread over seeds not measured).
fn add_balance<'p>(graph: &Graph<'p>, total: Var, routing: &[Routing], coefficient: f64) -> (Var, f64) {
    if coefficient == 0.0 || routing.is_empty() {
        return (total, 0.0);
    }
    let share = coefficient / routing.len() as f64;
    let losses = routing.iter().map(|layer| load_balancing_loss(graph, &[layer])).collect::<Vec<_>>();
    let mut terms = vec![(1.0, &total)];
    terms.extend(losses.iter().map(|loss| (share as f32, loss)));
    let balance = losses.iter().map(|loss| share * f64::from(loss.data()[0])).sum();
    (moebius_tensor::ops::weighted_sum(graph, &terms), balance)
}
