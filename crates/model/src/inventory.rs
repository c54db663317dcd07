//! What a configuration is made of, counted without its weights: parameters by part, bytes of cache, arithmetic a token.
//!
//! The parts are those that [`Model::build`](crate::Model) asks for, so that a count cannot differ from the model.

use crate::config::{Ffn, HeadMixture, LayerConfig, Mixer, ModelConfig, Reach};
use crate::layer::Layer;
use crate::weights::Weights;
use crate::{Batch, ModelError};
use moebius_kernels::attention::CacheFormat;
use moebius_tensor::Param;

/// Parameters of a model, by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// The table of tokens.
    pub embedding: u64,
    /// The output projection, its bias too; none if it is the embedding.
    pub head: u64,
    /// Attention and its norms, or whatever else mixes tokens.
    pub mixers: u64,
    /// Of those, what one token leaves out: attention heads that a router chooses from.
    pub idle_mixers: u64,
    /// Feed-forward parts without a router.
    pub dense: u64,
    /// Routers.
    pub routers: u64,
    /// Experts that routers choose from.
    pub experts: u64,
    /// Of those, what one token passes.
    pub chosen_experts: u64,
    /// What every token passes besides.
    pub shared_experts: u64,
    /// Norms of the residual stream.
    pub norms: u64,
}

impl Inventory {
    /// All parameters.
    pub fn total(&self) -> u64 {
        self.active() + self.idle_mixers + self.experts - self.chosen_experts
    }

    /// Those that take part in one token, embedding and head among them.
    pub fn active(&self) -> u64 {
        self.embedding + self.head + self.active_layers()
    }

    /// Those of the layers that take part in one token: neither embedding nor head.
    pub fn active_layers(&self) -> u64 {
        let mixers = self.mixers - self.idle_mixers;
        mixers + self.dense + self.routers + self.chosen_experts + self.shared_experts + self.norms
    }

    /// Those whose product with a token is computed: the active ones less the embedding's rows, the head always.
    pub fn multiplied(&self) -> u64 {
        self.active_layers() + if self.head == 0 { self.embedding } else { self.head }
    }
}

impl ModelConfig {
    /// Counts the parameters.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn inventory(&self) -> Result<Inventory, ModelError> {
        self.validate().map_err(|(key, message)| ModelError::config("configuration", key, message))?;
        let (hidden, vocab) = (self.hidden as u64, self.vocab_size as u64);
        let table = hidden * vocab;
        let head = if self.tie_embeddings { 0 } else { table };
        let head_bias = if self.head_bias { vocab } else { 0 };
        let mut sum = Inventory { embedding: table, head: head + head_bias, ..Inventory::default() };
        self.layer_kinds()?.iter().for_each(|kind| sum.add(&kind.each, kind.layers.len() as u64));
        sum.norms += hidden * self.norm_vectors();
        Ok(sum)
    }

    /// The kinds of layers there are, in the order in which they come first.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn layer_kinds(&self) -> Result<Vec<LayerKind<'_>>, ModelError> {
        let mut kinds: Vec<LayerKind<'_>> = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let is_routed = self.depths.is_some_and(|depths| depths.applies(index));
            match kinds.iter_mut().find(|kind| (kind.is_routed, kind.config) == (is_routed, layer)) {
                Some(kind) => kind.layers.push(index),
                None => {
                    let each = self.layer_inventory(index, layer)?;
                    kinds.push(LayerKind { layers: vec![index], config: layer, is_routed, each });
                }
            }
        }
        Ok(kinds)
    }

    /// Vectors of the last norm.
    fn norm_vectors(&self) -> u64 {
        match self.last_norm.unwrap_or(self.norm) {
            crate::config::Norm::Layer { bias: true, .. } => 2,
            _ => 1,
        }
    }

    fn layer_inventory(&self, index: usize, layer: &LayerConfig) -> Result<Inventory, ModelError> {
        let mut sum = Inventory::default();
        let mut count = |_: usize, name: &str, shape: &[usize]| {
            let elements = shape.iter().map(|&n| n as u64).product::<u64>();
            let chosen = |[n_experts, top_k]: [usize; 2]| elements / n_experts as u64 * top_k as u64;
            match (name.split_once('.'), &layer.mixer, &layer.ffn) {
                (None, ..) if name.starts_with("depth") => sum.routers += elements,
                (None, ..) => sum.norms += elements,
                (Some(("mlp", _)), ..) => sum.dense += elements,
                (Some(("moe", "gate_up" | "down" | "gate_up_bias" | "down_bias")), _, Ffn::Moe(moe)) => {
                    sum.experts += elements;
                    sum.chosen_experts += chosen([moe.n_experts, moe.router.top_k]);
                }
                (Some(("moe", part)), ..) if part.starts_with("shared.") || part == "output_bias" => {
                    sum.shared_experts += elements;
                }
                (Some(("moe", _)), ..) => sum.routers += elements,
                (Some(("heads", "q" | "o")), Mixer::HeadMixture(HeadMixture { n_experts, router, .. }), _) => {
                    sum.mixers += elements;
                    sum.idle_mixers += elements - chosen([*n_experts, router.top_k]);
                }
                _ => sum.mixers += elements,
            }
            // Of the shape, nothing is needed but that it is one.
            Ok(Param::shaped(name, shape))
        };
        Layer::build(self, index, layer, &mut Weights::new(&mut count))?;
        Ok(sum)
    }

    /// What a cache in this format takes.
    pub fn cache_bytes(&self, format: CacheFormat) -> CacheBytes {
        let mut sum = CacheBytes::default();
        for layer in &self.layers {
            let position = layer.mixer.position_bytes(format);
            match (&layer.mixer, layer.mixer.reach()) {
                (Mixer::Latent(_), _) => sum.latents += position,
                (_, Reach::All) => sum.unlimited += position,
                (_, Reach::Window(_) | Reach::Chunk(_)) => sum.limited += position,
            }
            sum.states += size_of::<f32>() * layer.mixer.state_numbers(self.hidden).iter().sum::<usize>();
        }
        sum
    }

    /// Operations (multiplications and additions) of a token that is the `seen`th of its text: of the products with
    /// weights, and of attention and the states of other mixers. Norms, softmax and activations are left out.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn operations(&self, seen: usize) -> Result<[u64; 2], ModelError> {
        let of_mixer = |layer: &LayerConfig| {
            layer.mixer.cost(self.hidden, &Batch::continuing(&[0], seen.saturating_sub(1)), CacheFormat::F32).operations
        };
        Ok([2 * self.inventory()?.multiplied(), self.layers.iter().map(of_mixer).sum()])
    }
}

/// Bytes of a cache, by what becomes of them as the text grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheBytes {
    /// For each token: keys and values of layers that see all tokens before.
    pub unlimited: usize,
    /// For each token: keys and values of layers that see a window or a chunk. They are kept, though read no longer.
    pub limited: usize,
    /// For each token: the latents from which keys and values are made.
    pub latents: usize,
    /// For each sequence, however long it is: the states of recurrent mixers, in f32.
    pub states: usize,
}

impl CacheBytes {
    /// For each token.
    pub fn of_token(&self) -> usize {
        self.unlimited + self.limited + self.latents
    }
}

/// Layers that are alike.
#[derive(Clone, Debug)]
pub struct LayerKind<'c> {
    /// Their numbers.
    pub layers: Vec<usize>,
    /// What each is made of.
    pub config: &'c LayerConfig,
    /// Whether a router lets only some tokens through.
    pub is_routed: bool,
    /// Parameters of each.
    pub each: Inventory,
}

impl Inventory {
    /// Adds what `count` layers have.
    pub(crate) fn add(&mut self, other: &Self, count: u64) {
        self.mixers += count * other.mixers;
        self.idle_mixers += count * other.idle_mixers;
        self.dense += count * other.dense;
        self.routers += count * other.routers;
        self.experts += count * other.experts;
        self.chosen_experts += count * other.chosen_experts;
        self.shared_experts += count * other.shared_experts;
        self.norms += count * other.norms;
    }
}
