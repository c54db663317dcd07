//! Which experts each layer chose, collected while the model runs.

use moebius_model::Observer;
use moebius_moe::{NO_EXPERT, Routing};

/// One layer's choice for one token, heaviest expert first.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerChoice {
    /// The layer's number among all layers, from 0.
    pub layer: usize,
    /// The experts.
    pub experts: Vec<u32>,
    /// Their weights.
    pub weights: Vec<f32>,
}

/// Listens to the routers of one forward pass.
#[derive(Debug)]
pub struct ExpertTrace {
    wanted: bool,
    layers: Vec<LayerTable>,
}

/// A layer's choices for every row of the pass.
#[derive(Debug)]
struct LayerTable {
    layer: usize,
    top_k: usize,
    /// `[rows, top_k]`
    experts: Vec<u32>,
    /// `[rows, top_k]`
    weights: Vec<f32>,
}

impl ExpertTrace {
    /// A listener; it keeps nothing unless `wanted`.
    pub fn new(wanted: bool) -> Self {
        Self { wanted, layers: Vec::new() }
    }

    /// The choices for one row of the pass, bottom layer first.
    pub fn of_row(&self, row: usize) -> Vec<LayerChoice> {
        let choice = |table: &LayerTable| {
            let slots = row * table.top_k..(row + 1) * table.top_k;
            // Some methods give tokens different numbers of experts.
            let pairs = table.experts[slots.clone()].iter().zip(&table.weights[slots]);
            let (experts, weights) = pairs.filter(|(expert, _)| **expert != NO_EXPERT).unzip();
            LayerChoice { layer: table.layer, experts, weights }
        };
        self.layers.iter().map(choice).collect()
    }
}

impl Observer for ExpertTrace {
    fn routing(&mut self, layer: usize, routing: &Routing) {
        if self.wanted {
            let rows = routing.plan.n_tokens();
            self.layers.push(LayerTable {
                layer,
                top_k: routing.topk_index.len() / rows.max(1),
                experts: routing.topk_index.clone(),
                weights: routing.topk_weight.data().to_vec(),
            });
        }
    }
}
