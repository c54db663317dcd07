//! The layers of an encoder or a decoder: attention with T5's distance biases, attention to the encoder's answer, a network
//! or Switch's experts, each normed before and added to the residual stream.

use super::config::{EncoderDecoderConfig, StackConfig};
use super::state::{DecodingState, LayerMemory};
use crate::weights::Weights;
use crate::{Batch, ModelError, Observer};
use moebius_kernels::attention_biased::{Attending, BiasedShape, DistanceBias, biased_attention};
use moebius_kernels::memory::Buffer;
use moebius_moe::grouped::{Rows, combine, grouped_linear};
use moebius_moe::{Router, Routing, TopKRouter, limit_by_sequence};
use moebius_tensor::ops::{self, BucketBias, Function};
use moebius_tensor::{Graph, Param, Tensor, Var};
use std::sync::Arc;

/// An encoder's or a decoder's layers.
#[derive(Debug)]
pub(super) struct Stack {
    blocks: Vec<Block>,
    /// `[buckets, heads]`: what distances add to the scores, in all layers.
    bias: Param,
    final_norm: Param,
    shape: BiasedShape,
    capacity: usize,
    eps: f32,
}

#[derive(Debug)]
struct Block {
    norm: Param,
    attention: Attention,
    cross: Option<(Param, Attention)>,
    ffn_norm: Param,
    ffn: Network,
}

/// Projections `[heads * head_dim, hidden]`, and `[hidden, heads * head_dim]` back.
#[derive(Debug)]
struct Attention {
    q: Param,
    k: Param,
    v: Param,
    o: Param,
}

/// One network, or experts of which each token has one.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few of them in a model, beside megabytes of weights")]
enum Network {
    /// `[width, hidden]` and `[hidden, width]`.
    Dense([Param; 2]),
    /// `[experts, width, hidden]` and `[experts, hidden, width]` behind a router.
    Switch(TopKRouter, [Param; 2]),
}

/// What a decoder attends to: the encoder's answer, or what was made of it once.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// Rows of all sequences, and where each begins.
    Encoded(&'a Var, &'a [usize]),
    /// Nothing: an encoder.
    None,
}

impl Stack {
    pub(super) fn build(
        config: &EncoderDecoderConfig,
        stack: StackConfig,
        is_decoder: bool,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        let blocks = (0..stack.n_layers).map(|layer| {
            weights.within(&format!("{layer}."), |weights| {
                Block::build(config, is_decoder, stack.is_sparse(layer), weights)
            })
        });
        let shape = BiasedShape { n_heads: config.n_heads, head_dim: config.head_dim, scale: 1.0, causal: is_decoder };
        Ok(Self {
            blocks: blocks.collect::<Result<_, _>>()?,
            bias: weights.get("distances", &[config.buckets, config.n_heads])?,
            final_norm: weights.get("final_norm", &[config.hidden])?,
            shape,
            capacity: config.capacity,
            eps: config.eps as f32,
        })
    }

    /// Whole sequences, from the embedded tokens x `[tokens, hidden]` to what the final norm gives.
    pub(super) fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        config: &EncoderDecoderConfig,
        x: Var,
        batch: &Batch,
        source: Source<'_>,
        observer: &mut dyn Observer,
    ) -> Result<Var, ModelError> {
        let bias = Arc::new(self.bias(config, batch.end_position())?);
        let mut x = x;
        for (layer, block) in self.blocks.iter().enumerate() {
            observer.hidden(layer, &x);
            let normed = ops::rms_norm(g, &x, &block.norm, self.eps)?;
            let bias = Some((&self.bias, &bias));
            let attended = block.attention.whole(g, &normed, &normed, &self.shape, bias, [&batch.starts; 2])?;
            x = ops::add(g, &x, attended)?;
            if let (Some((norm, cross)), Source::Encoded(encoded, starts)) = (&block.cross, source) {
                let normed = ops::rms_norm(g, &x, norm, self.eps)?;
                let shape = BiasedShape { causal: false, ..self.shape };
                let read = cross.whole(g, &normed, encoded, &shape, None, [&batch.starts, starts])?;
                x = ops::add(g, &x, read)?;
            }
            x = self.network(g, layer, x, batch, &mut [], observer)?;
        }
        self.finish(g, x, observer)
    }

    /// More tokens of sequences, each with what it carries.
    pub(super) fn forward_cached<'p>(
        &'p self,
        g: &Graph<'p>,
        config: &EncoderDecoderConfig,
        x: Var,
        batch: &Batch,
        states: &mut [&mut DecodingState],
        observer: &mut dyn Observer,
    ) -> Result<Var, ModelError> {
        let bias = self.bias(config, batch.end_position())?;
        let mut x = x;
        for (layer, block) in self.blocks.iter().enumerate() {
            observer.hidden(layer, &x);
            let mut memories: Vec<&mut LayerMemory> = states.iter_mut().map(|state| &mut state.layers[layer]).collect();
            let normed = ops::rms_norm(g, &x, &block.norm, self.eps)?;
            let attended =
                block.attention.remembered(g, &normed, &self.shape, &bias.by_distance(), batch, &mut memories)?;
            x = ops::add(g, &x, attended)?;
            if let Some((norm, cross)) = &block.cross {
                let normed = ops::rms_norm(g, &x, norm, self.eps)?;
                x = ops::add(g, &x, cross.known(g, &normed, &self.shape, batch, &memories)?)?;
            }
            let mut counts: Vec<&mut [u32]> = memories.into_iter().map(|memory| &mut memory.counts[..]).collect();
            x = self.network(g, layer, x, batch, &mut counts, observer)?;
        }
        self.finish(g, x, observer)
    }

    /// The keys and values that each layer makes of the encoder's answer, `[tokens, heads * head_dim]` each.
    pub(super) fn cross_memories<'p>(&'p self, g: &Graph<'p>, encoded: &Var) -> Result<Vec<[Var; 2]>, ModelError> {
        let crosses = self.blocks.iter().filter_map(|block| block.cross.as_ref());
        crosses.map(|(_, cross)| Ok([ops::linear(g, encoded, &cross.k)?, ops::linear(g, encoded, &cross.v)?])).collect()
    }

    fn bias(&self, config: &EncoderDecoderConfig, length: usize) -> Result<BucketBias, ModelError> {
        let causal = self.shape.causal;
        let after = if causal { 1 } else { length.max(1) };
        Ok(BucketBias::new(&self.bias, length, after, |distance| config.bucket(distance, !causal))?)
    }

    fn network<'p>(
        &'p self,
        g: &Graph<'p>,
        layer: usize,
        x: Var,
        batch: &Batch,
        counts: &mut [&mut [u32]],
        observer: &mut dyn Observer,
    ) -> Result<Var, ModelError> {
        let block = &self.blocks[layer];
        let normed = ops::rms_norm(g, &x, &block.ffn_norm, self.eps)?;
        let (y, routing) = block.ffn.forward(g, &normed, batch, self.capacity, counts)?;
        if let Some(routing) = &routing {
            observer.routing(layer, routing);
        }
        Ok(ops::add(g, &x, y)?)
    }

    fn finish<'p>(&'p self, g: &Graph<'p>, x: Var, observer: &mut dyn Observer) -> Result<Var, ModelError> {
        let x = ops::rms_norm(g, &x, &self.final_norm, self.eps)?;
        observer.hidden(self.blocks.len(), &x);
        Ok(x)
    }

    pub(super) fn params(&self) -> Vec<&Param> {
        let mut all: Vec<&Param> = self.blocks.iter().flat_map(Block::params).collect();
        all.extend([&self.bias, &self.final_norm]);
        all
    }

    pub(super) fn params_mut(&mut self) -> Vec<&mut Param> {
        let mut all: Vec<&mut Param> = self.blocks.iter_mut().flat_map(Block::params_mut).collect();
        all.extend([&mut self.bias, &mut self.final_norm]);
        all
    }
}

impl Block {
    fn build(
        config: &EncoderDecoderConfig,
        is_decoder: bool,
        is_sparse: bool,
        weights: &mut Weights<'_, '_>,
    ) -> Result<Self, ModelError> {
        let (hidden, width, experts) = (config.hidden, config.width, config.n_experts);
        let norm = weights.get("norm", &[hidden])?;
        let attention = weights.within("attention.", |weights| Attention::build(config, weights))?;
        let cross = if is_decoder {
            let norm = weights.get("cross_norm", &[hidden])?;
            Some((norm, weights.within("cross.", |weights| Attention::build(config, weights))?))
        } else {
            None
        };
        let ffn_norm = weights.get("ffn_norm", &[hidden])?;
        let ffn = if is_sparse {
            let router = TopKRouter::new(weights.get("router", &[experts, hidden])?, 1, false)?;
            let up = weights.get("up", &[experts, width, hidden])?;
            Network::Switch(router, [up, weights.get("down", &[experts, hidden, width])?])
        } else {
            Network::Dense([weights.get("up", &[width, hidden])?, weights.get("down", &[hidden, width])?])
        };
        Ok(Self { norm, attention, cross, ffn_norm, ffn })
    }

    fn params(&self) -> Vec<&Param> {
        let Self { norm, attention, cross, ffn_norm, ffn } = self;
        let mut all = vec![norm];
        all.extend(attention.params());
        if let Some((norm, cross)) = cross {
            all.push(norm);
            all.extend(cross.params());
        }
        all.push(ffn_norm);
        match ffn {
            Network::Dense(both) => all.extend(both),
            Network::Switch(router, both) => all.extend(router.params().into_iter().chain(both)),
        }
        all
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        let Self { norm, attention, cross, ffn_norm, ffn } = self;
        let mut all = vec![norm];
        all.extend(attention.params_mut());
        if let Some((norm, cross)) = cross {
            all.push(norm);
            all.extend(cross.params_mut());
        }
        all.push(ffn_norm);
        match ffn {
            Network::Dense(both) => all.extend(both),
            Network::Switch(router, both) => all.extend(router.params_mut().into_iter().chain(both)),
        }
        all
    }
}

impl Attention {
    fn build(config: &EncoderDecoderConfig, weights: &mut Weights<'_, '_>) -> Result<Self, ModelError> {
        let (hidden, width) = (config.hidden, config.n_heads * config.head_dim);
        Ok(Self {
            q: weights.get("q", &[width, hidden])?,
            k: weights.get("k", &[width, hidden])?,
            v: weights.get("v", &[width, hidden])?,
            o: weights.get("o", &[hidden, width])?,
        })
    }

    /// Queries of x over the keys and values of `source`, sequence by sequence.
    fn whole<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        source: &Var,
        shape: &BiasedShape,
        bias: Option<(&'p Param, &Arc<BucketBias>)>,
        starts: [&[usize]; 2],
    ) -> Result<Var, ModelError> {
        let q = ops::linear(g, x, &self.q)?;
        let (k, v) = (ops::linear(g, source, &self.k)?, ops::linear(g, source, &self.v)?);
        let attended = ops::biased_attention(g, [&q, &k, &v], shape, bias, starts)?;
        Ok(ops::linear(g, &attended, &self.o)?)
    }

    /// Queries of x over the keys and values of what each sequence has read, to which those of x are added.
    fn remembered<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        shape: &BiasedShape,
        bias: &DistanceBias<'_>,
        batch: &Batch,
        memories: &mut [&mut LayerMemory],
    ) -> Result<Var, ModelError> {
        let (k, v) = (ops::linear(g, x, &self.k)?, ops::linear(g, x, &self.v)?);
        for (memory, bounds) in memories.iter_mut().zip(batch.starts.windows(2)) {
            let rows = bounds[0] * shape.width()..bounds[1] * shape.width();
            memory.keys.extend_from_slice(&k.data()[rows.clone()]);
            memory.values.extend_from_slice(&v.data()[rows]);
        }
        let read: Vec<[&[f32]; 2]> = memories.iter().map(|memory| [&memory.keys[..], &memory.values[..]]).collect();
        self.attend(g, x, shape, Some(bias), batch, &read)
    }

    /// Queries of x over what was made of the encoder's answer.
    fn known<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        shape: &BiasedShape,
        batch: &Batch,
        memories: &[&mut LayerMemory],
    ) -> Result<Var, ModelError> {
        let read: Vec<[&[f32]; 2]> =
            memories.iter().map(|memory| [&memory.cross[0][..], &memory.cross[1][..]]).collect();
        self.attend(g, x, &BiasedShape { causal: false, ..*shape }, None, batch, &read)
    }

    fn attend<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        shape: &BiasedShape,
        bias: Option<&DistanceBias<'_>>,
        batch: &Batch,
        read: &[[&[f32]; 2]],
    ) -> Result<Var, ModelError> {
        let q = ops::linear(g, x, &self.q)?;
        let sequences: Vec<Attending<'_>> = (read.iter().zip(batch.starts.windows(2)))
            .map(|(&[k, v], bounds)| Attending {
                q: &q.data()[bounds[0] * shape.width()..bounds[1] * shape.width()],
                first_position: batch.positions.get(bounds[0]).map_or(0, |&first| first as usize),
                k,
                v,
            })
            .collect();
        let mut out = Buffer::scratch(q.data().len());
        biased_attention(shape, bias, &sequences, &mut out);
        Ok(ops::linear(g, &Var::constant(Tensor::new(q.shape(), out)), &self.o)?)
    }

    fn params(&self) -> [&Param; 4] {
        [&self.q, &self.k, &self.v, &self.o]
    }

    fn params_mut(&mut self) -> [&mut Param; 4] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o]
    }
}

impl Network {
    /// Also gives what the router decided, if there is one; `counts` has the tokens that each sequence's experts took
    /// before.
    fn forward<'p>(
        &'p self,
        g: &Graph<'p>,
        x: &Var,
        batch: &Batch,
        capacity: usize,
        counts: &mut [&mut [u32]],
    ) -> Result<(Var, Option<Routing>), ModelError> {
        match self {
            Self::Dense([up, down]) => {
                let inner = ops::apply(g, &ops::linear(g, x, up)?, Function::Relu);
                Ok((ops::linear(g, &inner, down)?, None))
            }
            Self::Switch(router, [up, down]) => {
                let routing = limit_by_sequence(g, router.route(g, x)?, &batch.starts, capacity, counts)?;
                let inner = grouped_linear(g, x, Rows::OfTokens, &routing.plan, up)?;
                let inner = ops::apply(g, &inner, Function::Relu);
                let y = grouped_linear(g, &inner, Rows::OfPlan, &routing.plan, down)?;
                Ok((combine(g, &y, &routing.plan, &routing.weights)?, Some(routing)))
            }
        }
    }
}
