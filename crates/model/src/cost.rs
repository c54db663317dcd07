//! What a forward pass costs: bytes of weights and cache that it must read, arithmetic that it must do.
//!
//! Counted from the configuration, the weights as they are held, and the experts that the routers chose; each byte once
//! a pass, each multiply-add as two operations. Norms, softmax and activations are left out: they are a few
//! operations for each number that the products make.

use crate::config::{HeadMixture, Mixer, Reach};
use crate::{Batch, Model, Numerics, Observer};
use moebius_kernels::attention::CacheFormat;
use moebius_kernels::gemm::{Packed, Precision};
use moebius_moe::Routing;
use moebius_tensor::Param;
use std::collections::BTreeMap;
use std::ops::AddAssign;

/// The least that some forward passes read and compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Weights read, as the products read them.
    pub weight_bytes: u64,
    /// Keys and values read.
    pub cache_bytes: u64,
    /// Multiplications and additions of the products and of attention.
    pub operations: u64,
}

impl Cost {
    /// Everything that is read.
    pub fn bytes(&self) -> u64 {
        self.weight_bytes + self.cache_bytes
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.weight_bytes += other.weight_bytes;
        self.cache_bytes += other.cache_bytes;
        self.operations += other.operations;
    }
}

/// What the routers of one pass chose; listens as an [`Observer`].
#[derive(Clone, Debug, Default)]
pub struct ExpertUse {
    layers: BTreeMap<usize, LayerUse>,
    /// Of attention heads.
    mixers: BTreeMap<usize, LayerUse>,
}

#[derive(Clone, Copy, Debug, Default)]
struct LayerUse {
    /// Experts with at least one row: each is read once.
    distinct: u64,
    /// Rows of all experts.
    assignments: u64,
}

impl Observer for ExpertUse {
    fn routing(&mut self, layer: usize, routing: &Routing) {
        self.layers.insert(layer, LayerUse::of(routing));
    }

    fn mixer_routing(&mut self, layer: usize, routing: &Routing) {
        self.mixers.insert(layer, LayerUse::of(routing));
    }
}

impl LayerUse {
    fn of(routing: &Routing) -> Self {
        let plan = &routing.plan;
        let distinct = plan.offsets().windows(2).filter(|bounds| bounds[1] > bounds[0]).count() as u64;
        Self { distinct, assignments: plan.n_assignments() as u64 }
    }
}

impl ExpertUse {
    /// Experts with work, the mean over layers; none without MoE layers.
    pub fn mean_distinct(&self) -> Option<f64> {
        let sum: u64 = self.layers.values().map(|layer| layer.distinct).sum();
        (!self.layers.is_empty()).then(|| sum as f64 / self.layers.len() as f64)
    }
}

impl Model {
    /// The cost of one forward pass of `batch`, of which `logit_rows` rows went through the head, with the experts that
    /// were seen choosing.
    pub fn cost(&self, numerics: impl Into<Numerics>, batch: &Batch, logit_rows: usize, experts: &ExpertUse) -> Cost {
        let Numerics { precision, cache } = numerics.into();
        let (rows, logit_rows) = (batch.tokens.len() as u64, logit_rows as u64);
        let mut cost = Cost::default();
        self.config.layers.iter().for_each(|layer| cost += layer.mixer.cost(self.config.hidden, batch, cache));
        for param in self.params() {
            let elements = param.shape().iter().product::<usize>() as u64;
            let bytes = held_bytes(param, precision);
            cost += match (param.name(), param.shape().len()) {
                // A tied embedding is read whole by the head; its rows are then among what is read.
                ("embedding", _) if self.config.tie_embeddings && logit_rows > 0 => {
                    product(elements, bytes, logit_rows)
                }
                ("embedding", _) => {
                    let row = size_of::<f32>() * self.config.hidden;
                    Cost { weight_bytes: rows * row as u64, ..Cost::default() }
                }
                ("head", _) if logit_rows == 0 => Cost::default(),
                ("head", _) => product(elements, bytes, logit_rows),
                (name, _) if name.ends_with("bias") => Cost { weight_bytes: bytes, ..Cost::default() },
                (name, 3) if name.contains(".moe.") || name.contains(".heads.") => {
                    let layers = if name.contains(".moe.") { &experts.layers } else { &experts.mixers };
                    let chosen = layers.get(&layer_of(name)).copied().unwrap_or_default();
                    let n_experts = param.shape()[0] as u64;
                    let operations = 2 * elements / n_experts * chosen.assignments;
                    Cost { weight_bytes: bytes / n_experts * chosen.distinct, operations, cache_bytes: 0 }
                }
                (_, 1) => Cost { weight_bytes: bytes, ..Cost::default() },
                _ => product(elements, bytes, rows),
            };
        }
        cost
    }

    /// Bytes of all weights, as the products read them.
    pub fn held_weight_bytes(&self, precision: Precision) -> u64 {
        self.params().into_iter().map(|param| held_bytes(param, precision)).sum()
    }

    /// Experts that a token is sent to and experts there are, if there is a choice.
    pub fn experts(&self) -> Option<(usize, usize)> {
        self.config.moe().map(|moe| (moe.router.top_k, moe.n_experts))
    }
}

impl Mixer {
    /// Keys and values that the batch's tokens see: each sequence's once, and the arithmetic on them.
    pub(crate) fn cost(&self, hidden: usize, batch: &Batch, format: CacheFormat) -> Cost {
        let a_pair = match self {
            Self::Attention(config) => 2 * config.n_heads * config.head_dim,
            Self::Latent(config) => config.n_heads * (2 * config.kv_rank + config.rope_dim),
            Self::HeadMixture(HeadMixture { router, n_kv_heads, head_dim, .. }) => {
                2 * router.top_k * n_kv_heads * head_dim
            }
            Self::DeltaNet(_) | Self::ShortConvolution(_) | Self::Mamba(_) => {
                return state_cost(self.state_numbers(hidden).iter().sum(), batch);
            }
        };
        attention_cost(a_pair, self.position_bytes(format), self.reach(), batch)
    }
}

/// What one layer reads of the states of its sequences, of so many numbers each, and computes on them: about a
/// multiplication and an addition when it fades, when it is changed and when it is read.
fn state_cost(numbers: usize, batch: &Batch) -> Cost {
    let (sequences, tokens) = (batch.starts.len().saturating_sub(1), batch.tokens.len());
    let read = sequences * numbers * size_of::<f32>();
    Cost { weight_bytes: 0, cache_bytes: read as u64, operations: 6 * (tokens * numbers) as u64 }
}

/// What one layer's attention reads and computes, of numbers that meet for each pair of positions (by key, by value,
/// all heads) and bytes that the cache holds for each position.
fn attention_cost(a_pair: usize, position_bytes: usize, reach: Reach, batch: &Batch) -> Cost {
    let seen = |position: u32| {
        let all = position as usize + 1;
        let seen = match reach {
            Reach::All => all,
            Reach::Window(window) => all.min(window),
            Reach::Chunk(chunk) => position as usize % chunk + 1,
        };
        seen as u64
    };
    let (mut read, mut pairs) = (0, 0);
    for bounds in batch.starts.windows(2) {
        let positions = &batch.positions[bounds[0]..bounds[1]];
        let Some((&first, &last)) = positions.first().zip(positions.last()) else { continue };
        read += u64::from(last) + 1 - (u64::from(first) + 1 - seen(first));
        pairs += positions.iter().map(|&position| seen(position)).sum::<u64>();
    }
    Cost { weight_bytes: 0, cache_bytes: read * position_bytes as u64, operations: 2 * pairs * a_pair as u64 }
}

fn product(elements: u64, bytes: u64, rows: u64) -> Cost {
    Cost { weight_bytes: bytes, cache_bytes: 0, operations: 2 * elements * rows }
}

/// The bytes of a weight in the form that the forward pass reads. A form of weights that is not packed at its first use
/// answers here.
fn held_bytes(param: &Param, precision: Precision) -> u64 {
    // The small weights that carry states are read as they are.
    let is_read_plain = |name: &str| [".taps", ".rates", "bias"].iter().any(|end| name.ends_with(end));
    if param.is_frozen() || param.shape().len() < 2 || is_read_plain(param.name()) {
        return param.bytes() as u64;
    }
    // The router computes in f32, whatever the rest does.
    let precision = if param.name().ends_with(".router") { Precision::F32 } else { precision };
    param.packed_forward(precision).iter().map(|packed: &Packed| packed.bytes() as u64).sum()
}

/// The number in `layers.N.…`.
fn layer_of(name: &str) -> usize {
    name.split('.').nth(1).and_then(|number| number.parse().ok()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Ffn, ModelConfig, UniformDecoder};
    use moebius_tensor::Graph;

    fn config(window: Option<usize>, tie_embeddings: bool) -> ModelConfig {
        let ffn = Ffn::moe_of(4, 2, 32, true);
        let sizes = UniformDecoder { family: "mixtral", vocab_size: 48, hidden: 32, ..UniformDecoder::default() };
        let heads = UniformDecoder { n_heads: 2, n_kv_heads: 1, head_dim: 16, ..sizes };
        UniformDecoder { max_positions: 64, window, tie_embeddings, ffn, ..heads }.config()
    }

    fn cost(model: &Model, tokens: &[u32], precision: Precision) -> Cost {
        let (batch, mut experts) = (Batch::of_sequences(&[tokens]), ExpertUse::default());
        let g = Graph::inference(precision);
        model.forward(&g, &batch, None, &mut experts).unwrap();
        model.cost(precision, &batch, 1, &experts)
    }

    #[test]
    fn one_token_costs_its_active_weights() {
        let model = Model::new(&config(None, false), 1).unwrap();
        let found = cost(&model, &[7], Precision::F32);
        // q, k, v, o, router, two of four experts, two norms a layer; head, one embedding row, the final norm.
        let matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 4 * 32 + 2 * 3 * 32 * 32) + 48 * 32;
        let vectors = 2 * 2 * 32 + 32 + 32;
        // Each layer's router has 4 rows in a panel of 16.
        let padding = 2 * 12 * 32;
        assert_eq!(found.weight_bytes, 4 * (matrices + vectors + padding));
        assert_eq!(found.operations, 2 * matrices + 2 * 4 * 32);
        assert_eq!(found.cache_bytes, 2 * 2 * 16 * 4);
        let halved = cost(&model, &[7], Precision::Bf16);
        assert_eq!(halved.operations, found.operations);
        let kept = 4 * (vectors + 2 * (4 * 32) + padding);
        assert_eq!(halved.weight_bytes, kept + 2 * (matrices - 2 * 4 * 32));
    }

    #[test]
    fn experts_are_read_once_and_computed_for_each_token() {
        let model = Model::new(&config(None, false), 1).unwrap();
        let (one, many) = (cost(&model, &[7], Precision::F32), cost(&model, &[7; 5], Precision::F32));
        // The same token five times may choose otherwise at another position, so only the bounds are known.
        assert!(many.weight_bytes >= one.weight_bytes);
        assert!(many.weight_bytes <= model.held_weight_bytes(Precision::F32));
        let head = 2 * 48 * 32;
        let attention = |pairs: u64| 2 * 4 * 32 * pairs;
        assert_eq!(many.operations, 5 * (one.operations - head - attention(1)) + head + attention(15));
    }

    #[test]
    fn a_window_bounds_what_is_read_of_the_cache() {
        let model = Model::new(&config(Some(3), true), 1).unwrap();
        let batch = Batch::continuing_together(&[([1, 2].as_slice(), 10), ([3].as_slice(), 0)]);
        let found = model.cost(Precision::F32, &batch, 0, &ExpertUse::default());
        // Positions 8 to 11 of the one, position 0 of the other.
        assert_eq!(found.cache_bytes, 5 * 2 * 2 * 16 * 4);
    }
}
