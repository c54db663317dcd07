//! [`KvCache`]: what a model remembers of what a sequence has read, layer by layer.

use crate::ModelConfig;
use crate::config::{AttentionConfig, LayerConfig, Mixer};
use moebius_kernels::attention::{CacheFormat, LayerCache};
use moebius_kernels::gemm::Precision;

/// What the layers remember of one sequence; grows with it. A clone goes its own way from there.
#[derive(Clone, Debug)]
pub struct KvCache {
    layers: Vec<LayerState>,
}

/// What one layer remembers of one sequence, one variant for each kind of mixer's memory.
#[derive(Clone, Debug)]
pub(crate) enum LayerState {
    /// Keys and values of every position.
    KeysValues(LayerCache),
    /// Keys and values of the tokens that went through the layer, and none of those that went around it.
    Selected(SelectedKeys),
}

/// What a layer with a router around it holds.
#[derive(Clone, Debug)]
pub(crate) struct SelectedKeys {
    cache: LayerCache,
    /// Of each token in the cache, rising.
    positions: Vec<u32>,
    /// Positions read, with those that went around.
    read: usize,
}

impl LayerState {
    /// The state of a layer that tokens may go around.
    fn selecting(mixer: &Mixer, format: CacheFormat) -> Self {
        match Self::new(mixer, format) {
            Self::KeysValues(cache) => Self::Selected(SelectedKeys { cache, positions: Vec::new(), read: 0 }),
            other => other,
        }
    }

    /// Notes that `rows` more positions were read, of which those at `positions` went through.
    pub(crate) fn note(&mut self, positions: &[u32], rows: usize) {
        if let Self::Selected(selected) = self {
            selected.positions.extend_from_slice(positions);
            selected.read += rows;
        }
    }

    fn new(mixer: &Mixer, format: CacheFormat) -> Self {
        match mixer {
            Mixer::Attention(AttentionConfig { n_kv_heads, head_dim, .. }) => {
                Self::KeysValues(LayerCache::new(*n_kv_heads, *head_dim, format))
            }
        }
    }

    /// Positions that it has seen.
    fn len(&self) -> usize {
        match self {
            Self::KeysValues(cache) => cache.len(),
            Self::Selected(selected) => selected.read,
        }
    }

    /// The fewest positions that it can go back to, from where it is.
    fn earliest(&self) -> usize {
        match self {
            Self::KeysValues(_) | Self::Selected(_) => 0,
        }
    }

    fn truncate(&mut self, positions: usize) {
        match self {
            Self::KeysValues(cache) => cache.truncate(positions),
            Self::Selected(selected) => {
                let kept = selected.positions.partition_point(|&position| (position as usize) < positions);
                selected.cache.truncate(kept);
                selected.positions.truncate(kept);
                selected.read = selected.read.min(positions);
            }
        }
    }

    /// The keys and values.
    ///
    /// # Panics
    /// If it is of another kind: a model's mixers and states are made from one configuration.
    pub(crate) fn keys_values(&mut self) -> &mut LayerCache {
        match self {
            Self::KeysValues(cache) => cache,
            Self::Selected(selected) => &mut selected.cache,
        }
    }
}

impl KvCache {
    /// An empty cache for a model.
    pub fn new(config: &ModelConfig, format: CacheFormat) -> Self {
        let state = |(index, layer): (usize, &LayerConfig)| match &config.depths {
            Some(depths) if depths.applies(index) => LayerState::selecting(&layer.mixer, format),
            _ => LayerState::new(&layer.mixer, format),
        };
        Self { layers: config.layers.iter().enumerate().map(state).collect() }
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
        config.layers.iter().map(|layer| layer.mixer.position_bytes(format)).sum()
    }

    /// Positions read.
    pub fn len(&self) -> usize {
        self.layers.last().map_or(0, LayerState::len)
    }

    /// Whether nothing was read yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The fewest positions that [`KvCache::truncate`] can go back to: none for keys and values, the whole length for a
    /// state that holds only where it is (a clone made there can be kept instead).
    pub fn earliest(&self) -> usize {
        self.layers.iter().map(LayerState::earliest).max().unwrap_or(0)
    }

    /// Forgets all but the first `positions`.
    ///
    /// # Panics
    /// If `positions` is fewer than [`KvCache::earliest`].
    pub fn truncate(&mut self, positions: usize) {
        assert!(positions >= self.earliest(), "a cache that cannot go back to position {positions}");
        self.layers.iter_mut().for_each(|layer| layer.truncate(positions));
    }

    pub(crate) fn layer(&mut self, layer: usize) -> &mut LayerState {
        &mut self.layers[layer]
    }
}

impl Mixer {
    /// Bytes that a cache holds for each position.
    fn position_bytes(&self, format: CacheFormat) -> usize {
        match self {
            Self::Attention(AttentionConfig { n_kv_heads, head_dim, .. }) => {
                2 * n_kv_heads * format.row_bytes(*head_dim)
            }
        }
    }
}
