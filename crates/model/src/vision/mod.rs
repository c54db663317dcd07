//! [`VisionModel`]: a vision transformer (Dosovitskiy et al. 2021) whose last blocks may be mixtures, routed (V-MoE,
//! Riquelme et al. 2021) or soft (Puigcerver et al. 2023).
//!
//! Patches of an image become tokens by one linear map; a learned vector stands for each place. Blocks are pre-norm,
//! attention then feed-forward, each added to the residual stream; attention sees the whole image. The class is read off
//! the mean of the tokens or off a token of its own. Blocks are the decoder's: RMSNorm and SwiGLU, where the papers have
//! LayerNorm and GELU.
//!
//! Letters: `images` of a batch, `tokens` an image has (patches, and one if the class has a token), rows are images ×
//! tokens, `hidden` the width of the residual stream.

mod config;
mod embed;
mod files;

pub use config::{Mixture, Pooling, VisionConfig};

use crate::{ModelError, methods};
use moebius_kernels::attention::AttentionShape;
use moebius_moe::routers::{Context, Decision, MethodLayer, RoutingMethod, SoftMoe};
use moebius_moe::{ExpertBank, MoeLayer};
use moebius_tensor::{Graph, Param, Rng, Tensor, Var, ops};

/// Added to the mean square in the norms.
const NORM_EPSILON: f32 = 1e-6;
/// Standard deviation of initial weights that should hardly speak at first.
const SMALL_DEVIATION: f32 = 0.02;

/// A vision transformer with its weights.
#[derive(Debug)]
pub struct VisionModel {
    /// What it is made of.
    pub config: VisionConfig,
    /// `[hidden, channels * patch * patch]`
    patch: Param,
    /// `[hidden]`
    patch_bias: Param,
    /// `[tokens, hidden]`
    positions: Param,
    /// `[1, hidden]`, if the class has a token.
    token: Option<Param>,
    blocks: Vec<Block>,
    final_norm: Param,
    /// `[classes, hidden]`
    head: Param,
}

#[derive(Debug)]
struct Block {
    attention_norm: Param,
    q: Param,
    k: Param,
    v: Param,
    o: Param,
    ffn_norm: Param,
    ffn: FeedForward,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few of them in a model, beside megabytes of weights")]
enum FeedForward {
    /// gate_up `[2 * width, hidden]` (the gate's rows first), down `[hidden, width]`.
    Dense {
        gate_up: Param,
        down: Param,
    },
    Routed(MoeLayer<Box<dyn RoutingMethod>>),
    Soft(SoftMoe),
}

/// What a batch of images came to.
#[derive(Debug)]
pub struct VisionLoss {
    /// Cross entropy plus the routers' weighted losses: what is differentiated.
    pub total: Var,
    /// Mean cross entropy of an image in nats.
    pub cross_entropy: f32,
    /// The routers' losses, each weighted, summed over blocks (mean over the routed blocks).
    pub auxiliary: f32,
    /// What each routed block's router decided.
    pub decisions: Vec<Decision>,
}

/// Makes the weight of an id, a name and a shape.
type MakeParam<'s> = dyn FnMut(usize, &str, &[usize]) -> Result<Param, ModelError> + 's;
/// Gives a weight of the name and shape asked for.
type Make<'s> = dyn FnMut(&str, &[usize]) -> Result<Param, ModelError> + 's;

impl VisionModel {
    /// A model with random weights: normal with deviation 1 / sqrt(inputs), those that write to the residual stream divided
    /// by sqrt(2 * layers); routers, places and the class's token 0.02; the head zero, norms one.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn new(config: &VisionConfig, seed: u64) -> Result<Self, ModelError> {
        let mut rng = Rng::new(seed);
        let residual = (2.0 * config.layers as f32).powf(-0.5);
        Self::build(config, &mut |id, name, shape| {
            let mut value = Tensor::zeros(shape);
            let deviation = (*shape.last().unwrap_or(&1) as f32).powf(-0.5);
            match name.rsplit('.').next().unwrap_or(name) {
                name if name.ends_with("norm") || name == "scale" => value.data_mut().fill(1.0),
                name if name.ends_with("bias") || name == "head" => {}
                "o" | "down" => rng.fill_normal(value.data_mut(), residual * deviation),
                "patch" | "slots" | "q" | "k" | "v" | "gate_up" => rng.fill_normal(value.data_mut(), deviation),
                _ => rng.fill_normal(value.data_mut(), SMALL_DEVIATION),
            }
            Ok(Param::new(id, name, value))
        })
    }

    /// Makes every weight, in the order of their ids, from its name and shape.
    fn build(config: &VisionConfig, make: &mut MakeParam<'_>) -> Result<Self, ModelError> {
        config.validate().map_err(|(key, message)| ModelError::config("configuration", key, message))?;
        let mut next_id = 0;
        let mut param = |name: &str, shape: &[usize]| -> Result<Param, ModelError> {
            next_id += 1;
            make(next_id - 1, name, shape)
        };
        let hidden = config.hidden;
        let patch = param("patch", &[hidden, config.patch_len()])?;
        let patch_bias = param("patch_bias", &[hidden])?;
        let positions = param("position_embedding", &[config.tokens(), hidden])?;
        let token = match config.pooling {
            Pooling::Mean => None,
            Pooling::Token => Some(param("class_embedding", &[1, hidden])?),
        };
        let mut blocks = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let mut param = |name: &str, shape: &[usize]| param(&format!("layers.{layer}.{name}"), shape);
            blocks.push(Block {
                attention_norm: param("attention_norm", &[hidden])?,
                q: param("attention.q", &[hidden, hidden])?,
                k: param("attention.k", &[hidden, hidden])?,
                v: param("attention.v", &[hidden, hidden])?,
                o: param("attention.o", &[hidden, hidden])?,
                ffn_norm: param("ffn_norm", &[hidden])?,
                ffn: build_feed_forward(config, layer, &mut param)?,
            });
        }
        let final_norm = param("final_norm", &[hidden])?;
        let head = param("head", &[config.classes, hidden])?;
        Ok(Self { config: config.clone(), patch, patch_bias, positions, token, blocks, final_norm, head })
    }

    /// All weights; a weight's id is its place here.
    pub fn params(&self) -> Vec<&Param> {
        let mut all = vec![&self.patch, &self.patch_bias, &self.positions];
        all.extend(&self.token);
        for block in &self.blocks {
            all.extend([&block.attention_norm, &block.q, &block.k, &block.v, &block.o, &block.ffn_norm]);
            match &block.ffn {
                FeedForward::Dense { gate_up, down } => all.extend([gate_up, down]),
                FeedForward::Routed(layer) => {
                    all.extend(layer.router.params().into_iter().chain(layer.experts.params()));
                }
                FeedForward::Soft(layer) => all.extend(layer.params()),
            }
        }
        all.extend([&self.final_norm, &self.head]);
        all
    }

    /// All weights, to be changed.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        let mut all = vec![&mut self.patch, &mut self.patch_bias, &mut self.positions];
        all.extend(&mut self.token);
        for block in &mut self.blocks {
            let Block { attention_norm, q, k, v, o, ffn_norm, ffn } = block;
            all.extend([attention_norm, q, k, v, o, ffn_norm]);
            match ffn {
                FeedForward::Dense { gate_up, down } => all.extend([gate_up, down]),
                FeedForward::Routed(layer) => {
                    all.extend(layer.router.params_mut().into_iter().chain(layer.experts.params_mut()));
                }
                FeedForward::Soft(layer) => all.extend(layer.params_mut()),
            }
        }
        all.extend([&mut self.final_norm, &mut self.head]);
        all
    }

    /// The features that the class is read off, and what routed blocks decided.
    ///
    /// # Shapes
    /// pixels `[images, channels * height * width]`, result `[images, hidden]`.
    ///
    /// # Errors
    /// Pixels that are no whole images; a router's.
    pub fn forward<'p>(&'p self, g: &Graph<'p>, pixels: &[f32], seed: u64) -> Result<(Var, Vec<Decision>), ModelError> {
        let config = &self.config;
        let pixels = Var::constant(embed::patches(config, pixels)?);
        let embedded = ops::add_bias(g, &ops::linear(g, &pixels, &self.patch)?, &self.patch_bias)?;
        let mut x = embed::place(g, &embedded, &self.positions, self.token.as_ref())?;
        let images = x.shape()[0] / config.tokens();
        let starts: Vec<usize> = (0..=images).map(|image| image * config.tokens()).collect();
        let mut decisions = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            let context = Context { token_ids: &[], starts: &starts, seed: methods::mixed(seed, layer as u64) };
            let (y, decision) = block.forward(g, &x, config, &context)?;
            x = y;
            decisions.extend(decision);
        }
        let x = ops::rms_norm(g, &x, &self.final_norm, NORM_EPSILON)?;
        let pooled = match config.pooling {
            Pooling::Mean => embed::mean_of_groups(g, &x, config.tokens()),
            Pooling::Token => embed::first_of_groups(g, &x, config.tokens()),
        };
        Ok((pooled, decisions))
    }

    /// The scores of the classes, `[images, classes]`, of features `[images, hidden]`.
    ///
    /// # Errors
    /// Features of another width.
    pub fn logits<'p>(&'p self, g: &Graph<'p>, features: &Var) -> Result<Var, ModelError> {
        Ok(ops::linear(g, features, &self.head)?)
    }

    /// The objective of a batch: mean cross entropy, and the mean over routed blocks of their own losses.
    ///
    /// # Shapes
    /// pixels as in [`VisionModel::forward`], labels `[images]`. `seed` decides the routers' noise.
    ///
    /// # Errors
    /// A label that is no class; as [`VisionModel::forward`].
    pub fn loss<'p>(
        &'p self,
        g: &Graph<'p>,
        pixels: &[f32],
        labels: &[u32],
        seed: u64,
    ) -> Result<VisionLoss, ModelError> {
        let classes = self.config.classes;
        if let Some(position) = labels.iter().position(|&label| label as usize >= classes) {
            return Err(ModelError::Token { token: labels[position], position, vocabulary: classes });
        }
        let (features, decisions) = self.forward(g, pixels, seed)?;
        let cross_entropy = ops::linear_cross_entropy(g, &features, &self.head, labels)?;
        let each: Vec<Var> = decisions.iter().map(|decision| decision.auxiliary(g)).collect();
        let auxiliary = ops::mean(g, &each.iter().collect::<Vec<_>>());
        let total = ops::sum(g, &[&cross_entropy, &auxiliary]);
        let value = |loss: &Var| loss.data()[0];
        Ok(VisionLoss { cross_entropy: value(&cross_entropy), auxiliary: value(&auxiliary), total, decisions })
    }

    /// Tells each routed block's router, once an optimiser step, how many assignments each expert had in all of it.
    ///
    /// # Panics
    /// Without counts for every routed block.
    pub fn after_step(&mut self, counts: &[Vec<u64>]) {
        let routers = self.blocks.iter_mut().filter_map(|block| match &mut block.ffn {
            FeedForward::Routed(layer) => Some(&mut layer.router),
            FeedForward::Dense { .. } | FeedForward::Soft(_) => None,
        });
        let mut counts = counts.iter();
        routers.for_each(|router| router.after_step(counts.next().expect("counts of every routed block")));
    }
}

fn build_feed_forward(config: &VisionConfig, layer: usize, param: &mut Make<'_>) -> Result<FeedForward, ModelError> {
    let (hidden, width) = (config.hidden, config.ffn);
    let Some(mixture) = config.mixture.as_ref().filter(|_| layer + config.sparse_layers >= config.layers) else {
        let gate_up = param("mlp.gate_up", &[2 * width, hidden])?;
        return Ok(FeedForward::Dense { gate_up, down: param("mlp.down", &[hidden, width])? });
    };
    let experts = mixture.experts();
    let bank = |param: &mut Make<'_>| -> Result<ExpertBank, ModelError> {
        let gate_up = param("moe.gate_up", &[experts, 2 * width, hidden])?;
        Ok(ExpertBank::new(gate_up, param("moe.down", &[experts, hidden, width])?)?)
    };
    match mixture {
        Mixture::Soft { slots, .. } => {
            let vectors = param("moe.slots", &[experts * slots, hidden])?;
            let scale = param("moe.scale", &[1])?;
            Ok(FeedForward::Soft(SoftMoe::new(vectors, scale, bank(param)?, experts)?))
        }
        Mixture::Routed { method, top_k, .. } => {
            let layer = MethodLayer { hidden, experts, top_k: *top_k, vocabulary: 0, causal: false };
            let router = methods::build(method, &layer, &mut |name, shape| param(&format!("moe.{name}"), shape))?;
            Ok(FeedForward::Routed(MoeLayer::by(router, bank(param)?)))
        }
    }
}

impl Block {
    fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        config: &VisionConfig,
        context: &Context<'_>,
    ) -> Result<(Var, Option<Decision>), ModelError> {
        let normed = ops::rms_norm(g, x, &self.attention_norm, NORM_EPSILON)?;
        let x = ops::add(g, x, self.attend(g, &normed, config, context.starts)?)?;
        let normed = ops::rms_norm(g, &x, &self.ffn_norm, NORM_EPSILON)?;
        let (y, decision) = match &self.ffn {
            FeedForward::Dense { gate_up, down } => {
                let inner = ops::swiglu(g, &ops::linear(g, &normed, gate_up)?)?;
                (ops::linear(g, &inner, down)?, None)
            }
            FeedForward::Routed(layer) => {
                let (y, decision) = layer.forward_by(g, &normed, context)?;
                (y, Some(decision))
            }
            FeedForward::Soft(layer) => (layer.forward_groups(g, &normed, context.starts.len() - 1)?, None),
        };
        Ok((ops::add(g, &x, y)?, decision))
    }

    fn attend<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        config: &VisionConfig,
        starts: &[usize],
    ) -> Result<Var, ModelError> {
        let head_dim = config.hidden / config.heads;
        let heads = [config.heads, config.heads, head_dim];
        let causal = AttentionShape::grouped(heads, (head_dim as f32).powf(-0.5));
        let shape = AttentionShape { bidirectional: true, ..causal };
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|weight| ops::linear(g, x, weight));
        let attended = ops::attention(g, &q?, &k?, &v?, &shape, starts)?;
        Ok(ops::linear(g, &attended, &self.o)?)
    }
}

#[cfg(test)]
mod tests;
