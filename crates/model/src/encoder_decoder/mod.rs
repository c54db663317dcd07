//! [`EncoderDecoder`]: T5 with Switch layers (Raffel et al. 2020; Fedus et al. 2021), as Hugging Face's Switch Transformers
//! compute it.
//!
//! The encoder reads a whole sequence, each position seeing all; the decoder writes another, each position seeing those
//! before it and all that the encoder made. Scores are not scaled; what stands between query and key adds a learned bias.
//! Each sequence's experts take a fixed number of its tokens, counted from its beginning, however it is cut into calls: so
//! decoding token by token gives the bits of decoding at once. (transformers counts each call anew.)

mod checkpoint;
mod config;
mod inventory;
mod stack;
mod state;

pub use config::{EncoderDecoderConfig, StackConfig};
pub use inventory::{EncoderDecoderInventory, StackInventory};
pub use state::DecodingState;

pub(crate) use checkpoint::is_copy;

use crate::weights::{MakeParam, Weights};
use crate::{Batch, ModelError, Observer, Silent};
use moebius_kernels::select::argmax;
use moebius_moe::Routing;
use moebius_tensor::{Graph, Param, Rng, Tensor, Var, ops};
use stack::{Source, Stack};
use state::LayerMemory;

/// What `config.json` calls the family.
pub const MODEL_TYPE: &str = "switch_transformers";

/// An encoder-decoder with its weights.
#[derive(Debug)]
pub struct EncoderDecoder {
    /// What it is made of.
    pub config: EncoderDecoderConfig,
    embedding: Param,
    encoder: Stack,
    decoder: Stack,
    head: Option<Param>,
}

/// What the encoder made of a batch.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// `[tokens, hidden]`
    pub hidden: Var,
    /// `[sequences + 1]`: the first row of each sequence, and the end.
    pub starts: Vec<usize>,
}

impl EncoderDecoder {
    /// A model with random weights: normal, each matrix by the root of what it reads, norms one.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn new(config: &EncoderDecoderConfig, seed: u64) -> Result<Self, ModelError> {
        let mut rng = Rng::new(seed);
        Self::build(config, &mut |id, name, shape| {
            let mut value = Tensor::zeros(shape);
            if name.ends_with("norm") {
                value.data_mut().fill(1.0);
            } else {
                let inputs = shape.last().copied().unwrap_or(1) as f32;
                // Unscaled scores: queries are smaller by the root of a head (Raffel et al. 2020).
                let heads = if name.ends_with(".q") { (config.head_dim as f32).sqrt() } else { 1.0 };
                let deviation = if name == "embedding" { 1.0 } else { 1.0 / (inputs.sqrt() * heads) };
                rng.fill_normal(value.data_mut(), deviation);
            }
            Ok(Param::new(id, name, value))
        })
    }

    fn build(config: &EncoderDecoderConfig, make: &mut MakeParam<'_>) -> Result<Self, ModelError> {
        config.validate().map_err(|(key, message)| ModelError::config("configuration", key, message))?;
        let mut weights = Weights::new(make);
        let (vocab, hidden) = (config.vocab_size, config.hidden);
        let embedding = weights.get("embedding", &[vocab, hidden])?;
        let encoder = weights.within("encoder.", |weights| Stack::build(config, config.encoder, false, weights))?;
        let decoder = weights.within("decoder.", |weights| Stack::build(config, config.decoder, true, weights))?;
        let head = weights.get_if(!config.tie_embeddings, "head", &[vocab, hidden])?;
        Ok(Self { config: config.clone(), embedding, encoder, decoder, head })
    }

    /// All weights; a weight's id is its place here.
    pub fn params(&self) -> Vec<&Param> {
        let stacks = self.encoder.params().into_iter().chain(self.decoder.params());
        [&self.embedding].into_iter().chain(stacks).chain(&self.head).collect()
    }

    /// All weights, to be changed.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        let Self { embedding, encoder, decoder, head, .. } = self;
        let stacks = encoder.params_mut().into_iter().chain(decoder.params_mut());
        [embedding].into_iter().chain(stacks).chain(head).collect()
    }

    /// Reads whole sequences, none of them empty.
    ///
    /// # Errors
    /// A token that the model lacks; a sequence without tokens.
    pub fn encode<'p>(
        &'p self,
        g: &Graph<'p>,
        batch: &Batch,
        observer: &mut dyn Observer,
    ) -> Result<Encoded, ModelError> {
        if batch.starts.windows(2).any(|bounds| bounds[0] == bounds[1]) {
            return Err(ModelError::file("encoder", "wanted at least one token to read, found none"));
        }
        let x = self.embed(g, batch)?;
        let hidden = self.encoder.forward(g, &self.config, x, batch, Source::None, observer)?;
        Ok(Encoded { hidden, starts: batch.starts.clone() })
    }

    /// The hidden states behind the final norm, `[tokens, hidden]`, of whole sequences that are written of what was read,
    /// one for each.
    ///
    /// # Errors
    /// A token that the model lacks.
    ///
    /// # Panics
    /// If there are not as many sequences as were read.
    pub fn decode<'p>(
        &'p self,
        g: &Graph<'p>,
        encoded: &Encoded,
        batch: &Batch,
        observer: &mut dyn Observer,
    ) -> Result<Var, ModelError> {
        assert_eq!(batch.starts.len(), encoded.starts.len(), "a sequence for each that was read");
        let x = self.embed(g, batch)?;
        let source = Source::Encoded(&encoded.hidden, &encoded.starts);
        self.decoder.forward(g, &self.config, x, batch, source, observer)
    }

    /// States in which nothing is written yet of each sequence that was read; keys and values of the encoder's answer are
    /// made here, once.
    ///
    /// # Errors
    /// Those of the products.
    pub fn begin(&self, g: &Graph<'_>, encoded: &Encoded) -> Result<Vec<DecodingState>, ModelError> {
        let inference = Graph::inference(g.precision());
        let memories = self.decoder.cross_memories(&inference, &encoded.hidden.detach())?;
        let width = self.config.n_heads * self.config.head_dim;
        let layers = |bounds: &[usize]| {
            let rows = bounds[0] * width..bounds[1] * width;
            let layer = |memory: &[Var; 2]| LayerMemory {
                keys: Vec::new(),
                values: Vec::new(),
                cross: [0, 1].map(|i| memory[i].data()[rows.clone()].to_vec()),
                counts: vec![0; self.config.n_experts],
            };
            memories.iter().map(layer).collect()
        };
        Ok(encoded.starts.windows(2).map(|bounds| DecodingState { positions: 0, layers: layers(bounds) }).collect())
    }

    /// As [`EncoderDecoder::decode`], of more tokens of sequences, each going on where its state is; the same bits. States
    /// are spoilt by an error.
    ///
    /// # Errors
    /// A token that the model lacks.
    ///
    /// # Panics
    /// If there are not as many states as sequences, or a sequence begins elsewhere than where its state is.
    pub fn decode_on<'p>(
        &'p self,
        g: &Graph<'p>,
        states: &mut [&mut DecodingState],
        batch: &Batch,
        observer: &mut dyn Observer,
    ) -> Result<Var, ModelError> {
        assert_eq!(batch.starts.len(), states.len() + 1, "a state for each sequence");
        for (state, bounds) in states.iter().zip(batch.starts.windows(2)) {
            let first = batch.positions[bounds[0]..bounds[1]].first().map_or(state.positions, |&first| first as usize);
            assert_eq!(first, state.positions, "a sequence goes on where its state is");
        }
        let x = self.embed(g, batch)?;
        let hidden = self.decoder.forward_cached(g, &self.config, x, batch, states, observer)?;
        for (state, bounds) in states.iter_mut().zip(batch.starts.windows(2)) {
            state.positions += bounds[1] - bounds[0];
        }
        Ok(hidden)
    }

    /// The scores of the next token, `[rows, vocab]`, of hidden states `[rows, hidden]`.
    ///
    /// # Panics
    /// If `hidden` has another width.
    pub fn logits<'p>(&'p self, g: &Graph<'p>, hidden: &Var) -> Var {
        ops::linear(g, &self.head_input(g, hidden), self.head()).expect("hidden states of this model")
    }

    /// The mean cross entropy in nats of the tokens that should follow those of `target`, and what the routers decided,
    /// the encoder's first.
    ///
    /// # Shapes
    /// next `[tokens of target]`; `u32::MAX` counts for nothing.
    ///
    /// # Errors
    /// A token that the model lacks.
    pub fn loss<'p>(
        &'p self,
        g: &Graph<'p>,
        source: &Batch,
        target: &Batch,
        next: &[u32],
    ) -> Result<(Var, Vec<Routing>), ModelError> {
        self.check_tokens(&next.iter().copied().filter(|&token| token != u32::MAX).collect::<Vec<_>>())?;
        let mut heard = Heard::default();
        let encoded = self.encode(g, source, &mut heard)?;
        let hidden = self.decode(g, &encoded, target, &mut heard)?;
        let loss = ops::linear_cross_entropy(g, &self.head_input(g, &hidden), self.head(), next)?;
        Ok((loss, heard.0))
    }

    /// What follows the start token when the likeliest token is written each time, up to `most` tokens or one that ends the
    /// text.
    ///
    /// # Errors
    /// A token that the model lacks; a prompt without tokens.
    pub fn generate(&self, g: &Graph<'_>, prompt: &[u32], most: usize) -> Result<Vec<u32>, ModelError> {
        let inference = Graph::inference(g.precision());
        let encoded = self.encode(&inference, &Batch::of_sequences(&[prompt]), &mut Silent)?;
        let mut states = self.begin(&inference, &encoded)?;
        let (mut token, mut written) = (self.config.start_token, Vec::new());
        while written.len() < most {
            let batch = Batch::continuing(&[token], states[0].len());
            let hidden = self.decode_on(&inference, &mut [&mut states[0]], &batch, &mut Silent)?;
            token = argmax(self.logits(&inference, &hidden).data()).map_or(0, |token| token as u32);
            written.push(token);
            if self.config.eos_tokens.contains(&token) {
                break;
            }
        }
        Ok(written)
    }

    fn head(&self) -> &Param {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// A tied head reads hidden states divided by the root of their width.
    fn head_input<'p>(&self, g: &Graph<'p>, hidden: &Var) -> Var {
        if self.config.tie_embeddings {
            ops::scale(g, hidden, (self.config.hidden as f32).powf(-0.5))
        } else {
            hidden.clone()
        }
    }

    fn embed<'p>(&'p self, g: &Graph<'p>, batch: &Batch) -> Result<Var, ModelError> {
        self.check_tokens(&batch.tokens)?;
        Ok(ops::embedding(g, &batch.tokens, &self.embedding)?)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<(), ModelError> {
        let vocabulary = self.config.vocab_size;
        match tokens.iter().position(|&token| token as usize >= vocabulary) {
            Some(position) => Err(ModelError::Token { token: tokens[position], position, vocabulary }),
            None => Ok(()),
        }
    }
}

#[derive(Default)]
struct Heard(Vec<Routing>);

impl Observer for Heard {
    fn routing(&mut self, _: usize, routing: &Routing) {
        self.0.push(routing.clone());
    }
}
