//! [`KvCache`]: the keys and values of what a sequence has read.

use crate::ModelConfig;
use moebius_kernels::attention::{CacheFormat, LayerCache};
use moebius_kernels::gemm::Precision;

/// Keys and values of one sequence, layer by layer; grows with the sequence.
#[derive(Clone, Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
}

impl KvCache {
    /// An empty cache for a model.
    pub fn new(config: &ModelConfig, format: CacheFormat) -> Self {
        let layer = || LayerCache::new(config.n_kv_heads, config.head_dim, format);
        Self { layers: std::iter::repeat_with(layer).take(config.n_layers).collect() }
    }

    /// What goes with products in a precision: keys and values are held as exactly as they are made.
    pub fn format_for(precision: Precision) -> CacheFormat {
        match precision {
            Precision::F32 => CacheFormat::F32,
            Precision::Bf16 => CacheFormat::Bf16,
        }
    }

    /// Bytes that one position takes in a cache for this model, all layers together.
    pub fn position_bytes(config: &ModelConfig, format: CacheFormat) -> usize {
        2 * config.n_layers * config.n_kv_heads * format.row_bytes(config.head_dim)
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.layers.last().map_or(0, LayerCache::len)
    }

    /// Whether nothing was read yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all but the first `positions`.
    pub fn truncate(&mut self, positions: usize) {
        self.layers.iter_mut().for_each(|layer| layer.truncate(positions));
    }

    pub(crate) fn layer(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }
}
