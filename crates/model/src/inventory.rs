//! What a configuration is made of, counted without its weights: parameters by part, bytes of cache, arithmetic a token.
//!
//! The parts are those that [`Model::build`](crate::Model) asks for, so that a count cannot differ from the model.

use crate::config::{LayerConfig, Mixer, ModelConfig, Reach};
use crate::layer::Layer;
use crate::weights::Weights;
use crate::{KvCache, ModelError};
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
        self.embedding + self.head + self.active_layers() - self.chosen_experts + self.experts
    }

    /// Those that take part in one token, embedding and head among them.
    pub fn active(&self) -> u64 {
        self.embedding + self.head + self.active_layers()
    }

    /// Those of the layers that take part in one token: neither embedding nor head.
    pub fn active_layers(&self) -> u64 {
        self.mixers + self.dense + self.routers + self.chosen_experts + self.shared_experts + self.norms
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
        // Most layers are as one before.
        let mut known: Vec<(&LayerConfig, Inventory)> = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let is_plain = self.depths.is_none_or(|depths| !depths.applies(index));
            let counted = match known.iter().find(|(other, _)| is_plain && *other == layer) {
                Some((_, counted)) => *counted,
                None => {
                    let counted = self.layer_inventory(index, layer)?;
                    if is_plain {
                        known.push((layer, counted));
                    }
                    counted
                }
            };
            sum.add(&counted);
        }
        sum.norms += hidden * self.norm_vectors();
        Ok(sum)
    }

    /// Vectors of one norm.
    fn norm_vectors(&self) -> u64 {
        match self.norm {
            crate::config::Norm::Layer { bias: true, .. } => 2,
            _ => 1,
        }
    }

    fn layer_inventory(&self, index: usize, layer: &LayerConfig) -> Result<Inventory, ModelError> {
        let mut sum = Inventory::default();
        let mut count = |_: usize, name: &str, shape: &[usize]| {
            let elements = shape.iter().map(|&n| n as u64).product::<u64>();
            let chosen = layer.ffn.moe().map_or(0, |moe| elements / moe.n_experts as u64 * moe.router.top_k as u64);
            match name.split_once('.') {
                Some(("mlp", _)) => sum.dense += elements,
                Some(("moe", part)) if part.starts_with("shared.") => sum.shared_experts += elements,
                Some(("moe", "router" | "router_bias" | "selection_bias")) => sum.routers += elements,
                Some(("moe", _)) => {
                    sum.experts += elements;
                    sum.chosen_experts += chosen;
                }
                Some(_) => sum.mixers += elements,
                None => sum.norms += elements,
            }
            // Of the shape, nothing is needed but that it is one.
            Ok(Param::shaped(name, shape))
        };
        Layer::build(self, index, layer, &mut Weights::new(&mut count))?;
        Ok(sum)
    }

    /// Bytes that a position adds to a cache of bf16, and layers that stop growing at some length.
    pub fn cache_bytes(&self) -> usize {
        KvCache::position_bytes(self, CacheFormat::Bf16)
    }

    /// Operations (multiplications and additions) of one token's products, and of its attention for each position that
    /// it sees, summed over the layers that see all.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn operations(&self) -> Result<[u64; 2], ModelError> {
        let seen = |layer: &LayerConfig| match &layer.mixer {
            Mixer::Attention(attention) if attention.reach == Reach::All => {
                4 * (attention.n_heads * attention.head_dim) as u64
            }
            Mixer::Attention(_) => 0,
            Mixer::Latent(latent) => 2 * (latent.n_heads * (2 * latent.kv_rank + latent.rope_dim)) as u64,
            Mixer::HeadMixture(mixture) => 4 * (mixture.router.top_k * mixture.n_kv_heads * mixture.head_dim) as u64,
            Mixer::DeltaNet(_) | Mixer::ShortConvolution(_) | Mixer::Mamba(_) => 0,
        };
        Ok([2 * self.inventory()?.multiplied(), self.layers.iter().map(seen).sum()])
    }
}

impl Inventory {
    fn add(&mut self, other: &Self) {
        self.mixers += other.mixers;
        self.dense += other.dense;
        self.routers += other.routers;
        self.experts += other.experts;
        self.chosen_experts += other.chosen_experts;
        self.shared_experts += other.shared_experts;
        self.norms += other.norms;
    }
}
