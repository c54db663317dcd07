//! [`KvCache`]: what a model remembers of what a sequence has read, layer by layer.

use crate::ModelConfig;
use crate::config::{
    AttentionConfig, DeltaNet, HeadMixture, LatentConfig, LayerConfig, Mamba, Mixer, ShortConvolution,
};
use moebius_kernels::attention::{CacheFormat, Cached, LatentCache, LayerCache};
use moebius_kernels::gemm::Precision;
use moebius_kernels::memory::Buffer;

/// What a model that is run computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numerics {
    /// Precision of matrix products.
    pub precision: Precision,
    /// What keys and values are held in.
    pub cache: CacheFormat,
}

impl From<Precision> for Numerics {
    /// Keys and values are held as exactly as they are made.
    fn from(precision: Precision) -> Self {
        let cache = match precision {
            Precision::F32 => CacheFormat::F32,
            Precision::Bf16 => CacheFormat::Bf16,
        };
        Self { precision, cache }
    }
}

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
    /// The latent of every position.
    Latents(LatentCache),
    /// Numbers that stand for all positions together.
    Recurrent(RecurrentState),
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

/// A state that each token replaces; it knows no earlier one.
#[derive(Clone, Debug)]
pub(crate) struct RecurrentState {
    positions: usize,
    /// What the parts of the mixer carry, in their order; always f32, for errors add up.
    parts: Vec<Buffer<f32>>,
}

impl LayerState {
    /// The state of a layer that tokens may go around.
    fn selecting(mixer: &Mixer, hidden: usize, format: CacheFormat) -> Self {
        match Self::new(mixer, hidden, format) {
            Self::KeysValues(cache) => Self::Selected(SelectedKeys { cache, positions: Vec::new(), read: 0 }),
            other => other,
        }
    }

    /// Notes that `rows` more positions were read, of which those at `positions` went through.
    pub(crate) fn note(&mut self, positions: &[u32], rows: usize) {
        match self {
            Self::Selected(selected) => {
                selected.positions.extend_from_slice(positions);
                selected.read += rows;
            }
            // Those that went through are counted already.
            Self::Recurrent(state) => state.positions += rows - positions.len(),
            Self::KeysValues(_) | Self::Latents(_) => {}
        }
    }

    fn new(mixer: &Mixer, hidden: usize, format: CacheFormat) -> Self {
        match mixer {
            Mixer::Attention(AttentionConfig { n_kv_heads, head_dim, .. })
            | Mixer::HeadMixture(HeadMixture { n_kv_heads, head_dim, .. }) => {
                Self::KeysValues(LayerCache::new(*n_kv_heads, *head_dim, format))
            }
            Mixer::Latent(LatentConfig { kv_rank, rope_dim, .. }) => {
                Self::Latents(LatentCache::new(kv_rank + rope_dim, format))
            }
            recurrent => {
                let parts = recurrent.state_numbers(hidden).into_iter().map(Buffer::zeroed).collect();
                Self::Recurrent(RecurrentState { positions: 0, parts })
            }
        }
    }

    /// Positions that it has seen.
    fn len(&self) -> usize {
        match self {
            Self::KeysValues(cache) => cache.len(),
            Self::Latents(cache) => cache.len(),
            Self::Recurrent(state) => state.positions,
            Self::Selected(selected) => selected.read,
        }
    }

    /// The fewest positions that it can go back to, from where it is.
    fn earliest(&self) -> usize {
        match self {
            Self::KeysValues(_) | Self::Latents(_) | Self::Selected(_) => 0,
            Self::Recurrent(state) => state.positions,
        }
    }

    fn truncate(&mut self, positions: usize) {
        match self {
            Self::KeysValues(cache) => cache.truncate(positions),
            Self::Latents(cache) => cache.truncate(positions),
            Self::Recurrent(_) => {} // `earliest` lets it come to nothing but where it is.
            Self::Selected(selected) => {
                let kept = selected.positions.partition_point(|&position| (position as usize) < positions);
                selected.cache.truncate(kept);
                selected.positions.truncate(kept);
                selected.read = selected.read.min(positions);
            }
        }
    }

    /// Adds positions: keys `[positions, key width]`, values `[positions, value width]`. Latents are keys, and their
    /// first features the values.
    pub(crate) fn push(&mut self, keys: &[f32], values: &[f32]) {
        match self {
            Self::KeysValues(cache) => cache.push(keys, values),
            Self::Latents(cache) => cache.push(keys),
            Self::Selected(selected) => selected.cache.push(keys, values),
            Self::Recurrent(_) => panic!("keys and values of a mixer that has none"),
        }
    }

    /// What attention reads.
    pub(crate) fn cached(&self) -> Cached<'_> {
        match self {
            Self::KeysValues(cache) => Cached::KeysValues(cache),
            Self::Latents(cache) => Cached::Latents(cache),
            Self::Selected(selected) => Cached::KeysValues(&selected.cache),
            Self::Recurrent(_) => panic!("keys and values of a mixer that has none"),
        }
    }

    /// What one part of a mixer carries.
    ///
    /// # Panics
    /// As [`LayerState::keys_values`].
    fn part(&mut self, part: usize) -> &mut [f32] {
        match self {
            Self::Recurrent(state) => &mut state.parts[part],
            Self::KeysValues(_) | Self::Latents(_) | Self::Selected(_) => {
                panic!("a carried state of a mixer that has none")
            }
        }
    }

    /// Tells how many positions more the state stands for.
    pub(crate) fn advance(&mut self, positions: usize) {
        if let Self::Recurrent(state) = self {
            state.positions += positions;
        }
    }
}

/// What one part of a mixer carries for each sequence; nothing without states.
pub(crate) fn carried<'a>(states: &'a mut Option<&mut [&mut LayerState]>, part: usize) -> Vec<&'a mut [f32]> {
    states.iter_mut().flat_map(|states| states.iter_mut()).map(|state| state.part(part)).collect()
}

impl KvCache {
    /// An empty cache for a model.
    pub fn new(config: &ModelConfig, format: CacheFormat) -> Self {
        let state = |(index, layer): (usize, &LayerConfig)| match &config.depths {
            Some(depths) if depths.applies(index) => LayerState::selecting(&layer.mixer, config.hidden, format),
            _ => LayerState::new(&layer.mixer, config.hidden, format),
        };
        Self { layers: config.layers.iter().enumerate().map(state).collect() }
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
    pub(crate) fn position_bytes(&self, format: CacheFormat) -> usize {
        match self {
            Self::Attention(AttentionConfig { n_kv_heads, head_dim, .. })
            | Self::HeadMixture(HeadMixture { n_kv_heads, head_dim, .. }) => {
                2 * n_kv_heads * format.row_bytes(*head_dim)
            }
            Self::Latent(LatentConfig { kv_rank, rope_dim, .. }) => LatentCache::row_bytes(kv_rank + rope_dim, format),
            Self::DeltaNet(_) | Self::ShortConvolution(_) | Self::Mamba(_) => 0,
        }
    }

    /// Numbers that each part carries for a sequence of any length: the convolution's inputs, then the state.
    pub(crate) fn state_numbers(&self, hidden: usize) -> Vec<usize> {
        match self {
            Self::Attention(_) | Self::Latent(_) | Self::HeadMixture(_) => Vec::new(),
            Self::DeltaNet(net) => {
                let DeltaNet { value_heads, key_dim, value_dim, taps, .. } = *net;
                vec![(taps - 1) * net.mixed_width(), value_heads * key_dim * value_dim]
            }
            Self::ShortConvolution(ShortConvolution { taps, .. }) => vec![(taps - 1) * hidden],
            Self::Mamba(Mamba { width, states, taps, .. }) => vec![(taps - 1) * width, width * states],
        }
    }
}
