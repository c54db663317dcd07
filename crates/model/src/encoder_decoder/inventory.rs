//! What an encoder-decoder's configuration is made of, counted without its weights.

use super::{EncoderDecoder, EncoderDecoderConfig, StackConfig};
use crate::{Inventory, ModelError};
use moebius_tensor::Param;

/// Parameters of an encoder-decoder, by what they are for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncoderDecoderInventory {
    /// The table of tokens, which encoder and decoder share.
    pub embedding: u64,
    /// The output projection; none if it is the embedding.
    pub head: u64,
    /// What each token that is read passes.
    pub encoder: StackInventory,
    /// What each token that is written passes.
    pub decoder: StackInventory,
}

/// Parameters of an encoder or a decoder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StackInventory {
    /// Of each layer; attention to the encoder's answer is a mixer too.
    pub layers: Vec<Inventory>,
    /// Of all layers, what distances add to the scores (a mixer), and the last norm.
    pub sum: Inventory,
}

impl EncoderDecoderInventory {
    /// All parameters.
    pub fn total(&self) -> u64 {
        self.embedding + self.head + self.encoder.sum.total() + self.decoder.sum.total()
    }

    /// Those that take part in one token read and one written, embedding and head among them.
    pub fn active(&self) -> u64 {
        self.embedding + self.head + self.active_layers()
    }

    /// As [`EncoderDecoderInventory::active`], but neither embedding nor head.
    pub fn active_layers(&self) -> u64 {
        self.encoder.sum.active_layers() + self.decoder.sum.active_layers()
    }
}

impl EncoderDecoderConfig {
    /// Counts the parameters that the model is built of.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn inventory(&self) -> Result<EncoderDecoderInventory, ModelError> {
        let stack = |of: StackConfig| StackInventory {
            layers: vec![Inventory::default(); of.n_layers],
            sum: Inventory::default(),
        };
        let mut found = EncoderDecoderInventory {
            encoder: stack(self.encoder),
            decoder: stack(self.decoder),
            ..EncoderDecoderInventory::default()
        };
        EncoderDecoder::build(self, &mut |_, name, shape| {
            let elements = shape.iter().map(|&n| n as u64).product::<u64>();
            let (stack, part) = match name.split_once('.') {
                Some(("encoder", part)) => (&mut found.encoder, part),
                Some((_, part)) => (&mut found.decoder, part),
                None if name == "head" => {
                    found.head += elements;
                    return Ok(Param::shaped(name, shape));
                }
                None => {
                    found.embedding += elements;
                    return Ok(Param::shaped(name, shape));
                }
            };
            let layer = part.split_once('.').and_then(|(layer, part)| Some((layer.parse::<usize>().ok()?, part)));
            let (of, part) = match layer {
                Some((layer, part)) => (&mut stack.layers[layer], part),
                None => (&mut stack.sum, part),
            };
            match (part, shape.len()) {
                ("router", _) => of.routers += elements,
                ("up" | "down", 3) => {
                    of.experts += elements;
                    of.chosen_experts += elements / self.n_experts as u64;
                }
                ("up" | "down", _) => of.dense += elements,
                _ if part.ends_with("norm") => of.norms += elements,
                _ => of.mixers += elements,
            }
            Ok(Param::shaped(name, shape))
        })?;
        for stack in [&mut found.encoder, &mut found.decoder] {
            stack.layers.iter().for_each(|layer| stack.sum.add(layer, 1));
        }
        Ok(found)
    }

    /// Bytes of the keys and values (f32) that the decoder keeps of each token it has written; of each token of the input
    /// it keeps as many, which are made of the encoder's answer once.
    pub fn cache_bytes(&self) -> usize {
        2 * size_of::<f32>() * self.decoder.n_layers * self.n_heads * self.head_dim
    }

    /// Operations (multiplications and additions) of a token that is read, of an input of `read` tokens: of the products
    /// with weights, the decoder's keys and values of the encoder's answer among them, and of attention. Norms, softmax,
    /// activations and what distances add are left out.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn encoder_operations(&self, read: usize) -> Result<[u64; 2], ModelError> {
        let weights = self.products(&self.inventory()?.encoder) + self.cross_products();
        Ok([2 * weights, self.attention_operations(self.encoder, read)])
    }

    /// As [`EncoderDecoderConfig::encoder_operations`], of a token that is the `written`th of an answer to `read` tokens;
    /// the head is among the products.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn decoder_operations(&self, read: usize, written: usize) -> Result<[u64; 2], ModelError> {
        let head = (self.vocab_size * self.hidden) as u64;
        let weights = self.products(&self.inventory()?.decoder) - self.cross_products() + head;
        Ok([2 * weights, self.attention_operations(self.decoder, read + written)])
    }

    /// Weights that a token is multiplied with.
    fn products(&self, stack: &StackInventory) -> u64 {
        let distances = self.buckets * self.n_heads;
        stack.sum.active_layers() - stack.sum.norms - distances as u64
    }

    /// The weights that make keys and values of the encoder's answer.
    fn cross_products(&self) -> u64 {
        (2 * self.decoder.n_layers * self.hidden * self.n_heads * self.head_dim) as u64
    }

    /// Scores of `seen` tokens and the sum of their values.
    fn attention_operations(&self, stack: StackConfig, seen: usize) -> u64 {
        4 * (stack.n_layers * self.n_heads * self.head_dim) as u64 * seen as u64
    }
}
