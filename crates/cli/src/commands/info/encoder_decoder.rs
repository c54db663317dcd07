//! The figures of an encoder-decoder, as tables or as one JSON object: a token that is read passes the encoder, one that is
//! written the decoder.

use std::fmt::Write;

use moebius_model::encoder_decoder::{
    EncoderDecoderConfig, EncoderDecoderInventory, MODEL_TYPE, StackConfig, StackInventory,
};
use moebius_model::{Inventory, Survey};
use serde_json::{Map, Value, json};

use super::layers;
use super::report::{line, parameters_row, parts, parts_json, short, source_name, weights, weights_json};

/// Tokens of input and answer, if it is not said of how many FLOPs are to be counted: what the published models were
/// trained on (Raffel et al. 2020).
pub const TRAINED_ON: usize = 512;

/// What is told of an encoder-decoder.
pub struct EncoderDecoderReport<'s> {
    survey: &'s Survey<EncoderDecoderConfig>,
    inventory: EncoderDecoderInventory,
    context: usize,
    /// Of the products with weights, and of attention at `context` tokens.
    encoder_operations: [u64; 2],
    /// As the encoder's, at `context` tokens of input and as many written.
    decoder_operations: [u64; 2],
}

/// Layers of a stack that are alike.
struct Kind<'i> {
    layers: Vec<usize>,
    attention: &'static str,
    feed_forward: String,
    each: &'i Inventory,
}

impl<'s> EncoderDecoderReport<'s> {
    /// Counts what there is to count.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn new(survey: &'s Survey<EncoderDecoderConfig>, context: usize) -> anyhow::Result<Self> {
        let config = &survey.config;
        Ok(Self {
            survey,
            inventory: config.inventory()?,
            context,
            encoder_operations: config.encoder_operations(context)?,
            decoder_operations: config.decoder_operations(context, context)?,
        })
    }

    fn stacks(&self) -> [(&'static str, StackConfig, &StackInventory); 2] {
        let (config, found) = (&self.survey.config, &self.inventory);
        [("encoder", config.encoder, &found.encoder), ("decoder", config.decoder, &found.decoder)]
    }

    fn kinds<'i>(&self, name: &str, stack: StackConfig, inventory: &'i StackInventory) -> Vec<Kind<'i>> {
        let config = &self.survey.config;
        let kind = |is_sparse: bool| {
            let layers: Vec<usize> = (0..stack.n_layers).filter(|&layer| stack.is_sparse(layer) == is_sparse).collect();
            let each = &inventory.layers[*layers.first()?];
            let feed_forward = match is_sparse {
                true => format!("{} experts of {}, 1 a token", config.n_experts, config.width),
                false => format!("dense {}", config.width),
            };
            let attention = if name == "encoder" { "attention" } else { "attention and cross-attention" };
            Some(Kind { layers, attention, feed_forward, each })
        };
        [false, true].into_iter().filter_map(kind).collect()
    }

    /// Tables for a terminal.
    pub fn text(&self) -> String {
        let (config, found) = (&self.survey.config, &self.inventory);
        let mut text = format!(
            "{MODEL_TYPE}: {} layers of encoder, {} of decoder, hidden {}, vocabulary {}\n",
            config.encoder.n_layers, config.decoder.n_layers, config.hidden, config.vocab_size
        );
        for (name, stack, inventory) in self.stacks() {
            let _ = writeln!(text, "\n{name}'s layers");
            for Kind { layers: numbers, attention, feed_forward, each } in self.kinds(name, stack, inventory) {
                let heads = format!("{attention}, {} heads of {}", config.n_heads, config.head_dim);
                line(&mut text, &layers::numbers(&numbers), &heads);
                let sizes = format!("{} parameters each, {} active", short(each.total()), short(each.active()));
                line(&mut text, "", &format!("{feed_forward}; {sizes}"));
            }
        }
        let _ = writeln!(text, "\n{:<26}{:>12}{:>12}", "parameters", "all", "active");
        parameters_row(&mut text, "embedding", found.embedding, found.embedding);
        for (stack, _, inventory) in self.stacks() {
            for (part, all, active) in parts(&inventory.sum) {
                if all > 0 {
                    parameters_row(&mut text, &format!("{stack}'s {part}"), all, active);
                }
            }
        }
        match found.head {
            0 => text += "  head                     the embedding\n",
            head => parameters_row(&mut text, "head", head, head),
        }
        parameters_row(&mut text, "total", found.total(), found.active());
        let [all, active] = self.without_embeddings();
        parameters_row(&mut text, "less embedding and head", all, active);
        weights(&mut text, self.survey.stored.as_ref(), self.survey.source, found.total());
        let _ = writeln!(text, "\n{:<26}{:>12}", "cache bytes", "f32");
        let _ = writeln!(text, "  {:<24}{:>12}", "a token written", config.cache_bytes());
        let _ = writeln!(text, "  {:<24}{:>12}", "a token read (cross)", config.cache_bytes());
        let context = self.context;
        for (what, at, [weights, attention]) in [
            (
                "read: the encoder, keys and values for the decoder",
                format!("at {context} tokens"),
                self.encoder_operations,
            ),
            ("written: the decoder, the head", format!("at {context} after {context}"), self.decoder_operations),
        ] {
            let _ = writeln!(text, "\nFLOPs of a token {what}");
            line(&mut text, "with weights", &short(weights));
            line(&mut text, &at, &format!("{} more in attention", short(attention)));
        }
        text
    }

    /// All parameters of the layers and the last norms, and the active ones: neither embedding nor head.
    fn without_embeddings(&self) -> [u64; 2] {
        let found = &self.inventory;
        [found.total() - found.embedding - found.head, found.active_layers()]
    }

    /// One object; counts are numbers, bytes and parameters alike.
    pub fn json(&self) -> Value {
        let (config, found) = (&self.survey.config, &self.inventory);
        let [all, active] = self.without_embeddings();
        let mut parameters = parts_json(&[
            ("embedding", found.embedding, found.embedding),
            ("head", found.head, found.head),
            ("total", found.total(), found.active()),
            ("without_embeddings", all, active),
        ]);
        let mut stacks = Map::new();
        for (name, stack, inventory) in self.stacks() {
            let layers = self.kinds(name, stack, inventory).into_iter().map(|kind| {
                json!({
                    "layers": kind.layers,
                    "mixer": format!("{}, {} heads of {}", kind.attention, config.n_heads, config.head_dim),
                    "feed_forward": kind.feed_forward,
                    "parameters": {"all": kind.each.total(), "active": kind.each.active()},
                })
            });
            stacks.insert(name.into(), layers.collect());
            let sum = &inventory.sum;
            let mut of_stack = parts_json(&parts(sum).into_iter().filter(|(_, all, _)| *all > 0).collect::<Vec<_>>());
            of_stack.extend(parts_json(&[("total", sum.total(), sum.active())]));
            parameters.insert(name.into(), of_stack.into());
        }
        let operations = |[weights, attention]: [u64; 2]| json!({"weights": weights, "mixers_at_context": attention});
        json!({
            "family": MODEL_TYPE,
            "source": source_name(self.survey.source),
            "n_layers": {"encoder": config.encoder.n_layers, "decoder": config.decoder.n_layers},
            "hidden": config.hidden,
            "vocabulary": config.vocab_size,
            "layers": stacks,
            "parameters": parameters,
            "weights": self.survey.stored.as_ref().map(weights_json),
            "cache_bytes": {"f32": {"token_written": config.cache_bytes(), "token_read": config.cache_bytes()}},
            "flops": {
                "context": self.context,
                "token_read": operations(self.encoder_operations),
                "token_written": operations(self.decoder_operations),
            },
        })
    }
}
