//! [`ModelConfig`]: what a decoder is made of, whatever family it came from. What families differ in are named parts of
//! it: a list of layers, each a token mixer and a feed-forward part, and what all layers share.

mod attention;
mod feed_forward;
mod position;
mod uniform;
mod validate;

pub use attention::{AttentionConfig, Mixer, QkNorm, Reach};
pub use feed_forward::{DenseFfn, Ffn, MoeFfn, SharedExperts};
pub use position::{Rope, RopePairs, RopeScaling};
pub use uniform::UniformDecoder;
pub(crate) use validate::check_layer_count;

use moebius_moe::routers::{MethodConfig, MethodLayer};

/// A decoder's shape and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family that reads and writes it: a name from [`crate::families::all`].
    pub family: String,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// The layers, first to last.
    pub layers: Vec<LayerConfig>,
    /// The longest sequence.
    pub max_positions: usize,
    /// The norms of the residual stream, those of layers and the last.
    pub norm: Norm,
    /// Where in a layer they stand.
    pub norm_place: NormPlace,
    /// Constant factors.
    pub scales: Scales,
    /// A routing method that stands for the families' router in every layer with experts.
    pub routing: Option<MethodConfig>,
    /// Layers that only some tokens go through.
    pub depths: Option<DepthsConfig>,
    /// Whether the output projection is the embedding.
    pub tie_embeddings: bool,
    /// Weight of the load-balancing loss in training.
    pub router_aux_loss_coef: f64,
    /// The token that begins a text, if any.
    pub bos_token: Option<u32>,
    /// The tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

/// Mixture-of-Depths (Raposo et al. 2024): a router lets only some tokens through a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DepthsConfig {
    /// Share of a sequence's tokens that go through, when training.
    pub share: f64,
    /// Layer i (from 0) is routed around if i + 1 is a multiple of it.
    pub every: usize,
    /// What decides when tokens come one by one.
    pub sampler: DepthSampler,
    /// Weight of the sampler's loss in training.
    pub sampler_loss: f64,
}

/// What lets a token through when later ones are not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DepthSampler {
    /// The router's own score, trained to say it.
    Threshold,
    /// A small network beside it.
    Predictor {
        /// Its inner width.
        width: usize,
    },
    /// A lot: for comparison.
    Random,
}

impl DepthsConfig {
    /// Whether layer `index`, from 0, is routed around.
    pub fn applies(&self, index: usize) -> bool {
        (index + 1).is_multiple_of(self.every.max(1))
    }
}

/// What a layer is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// What carries numbers from token to token.
    pub mixer: Mixer,
    /// What computes on each token by itself.
    pub ffn: Ffn,
}

/// How the residual stream is normed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// Divided by the root of the mean square, times a weight.
    Rms {
        /// Added to the mean square.
        eps: f64,
    },
}

impl Norm {
    /// What is added to the mean square, or the variance.
    pub fn eps(self) -> f64 {
        match self {
            Self::Rms { eps } => eps,
        }
    }
}

/// Where in a layer the norms stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NormPlace {
    /// On what the mixer and the feed-forward part read.
    #[default]
    Before,
    /// On what they answer (OLMo 2, FlexOlmo).
    After,
    /// On both (Grok).
    Both,
}

impl NormPlace {
    /// Whether what is read is normed.
    pub fn is_before(self) -> bool {
        self != Self::After
    }

    /// Whether what is answered is normed.
    pub fn is_after(self) -> bool {
        self != Self::Before
    }
}

/// Constant factors; all one by default.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scales {
    /// Of the embedded tokens.
    pub embedding: f64,
    /// Of what mixers and feed-forward parts add to the residual stream.
    pub residual: f64,
    /// Of the logits.
    pub logits: f64,
}

impl Default for Scales {
    fn default() -> Self {
        Self { embedding: 1.0, residual: 1.0, logits: 1.0 }
    }
}

impl ModelConfig {
    /// Layers there are.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// The attention of the first layer that has one; what families with one kind of it write.
    pub fn attention(&self) -> Option<&AttentionConfig> {
        self.layers.iter().find_map(|layer| layer.mixer.attention())
    }

    /// The layer that a routing method is for, in a feed-forward part with experts.
    pub(crate) fn method_layer(&self, moe: &MoeFfn) -> MethodLayer {
        let (hidden, experts, top_k) = (self.hidden, moe.n_experts, moe.router.top_k);
        MethodLayer { hidden, experts, top_k, vocabulary: self.vocab_size, causal: true }
    }

    /// The first feed-forward part with experts.
    pub fn moe(&self) -> Option<&MoeFfn> {
        self.layers.iter().find_map(|layer| layer.ffn.moe())
    }

    /// The first feed-forward part without experts.
    pub fn dense(&self) -> Option<&DenseFfn> {
        self.layers.iter().find_map(|layer| match &layer.ffn {
            Ffn::Dense(dense) => Some(dense),
            Ffn::Moe(_) => None,
        })
    }
}
