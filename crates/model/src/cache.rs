//! [`KvCache`]: the keys and values of what a sequence has read.

use crate::ModelConfig;

/// Keys and values of one sequence, layer by layer; grows with the sequence.
#[derive(Clone, Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    width: usize,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct LayerCache {
    /// `[positions, n_kv_heads * head_dim]`, rotated.
    pub(crate) keys: Vec<f32>,
    /// `[positions, n_kv_heads * head_dim]`.
    pub(crate) values: Vec<f32>,
}

impl KvCache {
    /// An empty cache for a model.
    pub fn new(config: &ModelConfig) -> Self {
        let width = config.n_kv_heads * config.head_dim;
        Self { layers: vec![LayerCache::default(); config.n_layers], width }
    }

    /// Bytes that one position takes in a cache for this model, all layers together.
    pub fn position_bytes(config: &ModelConfig) -> usize {
        2 * config.n_layers * config.n_kv_heads * config.head_dim * size_of::<f32>()
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.layers.last().map_or(0, |layer| layer.keys.len() / self.width)
    }

    /// Whether nothing was read yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all but the first `positions`.
    pub fn truncate(&mut self, positions: usize) {
        for layer in &mut self.layers {
            layer.keys.truncate(positions * self.width);
            layer.values.truncate(positions * self.width);
        }
    }

    pub(crate) fn layer(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }
}
