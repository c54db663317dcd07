//! The figures of a model, as tables or as one JSON object.

use std::fmt::Write;

use moebius_kernels::attention::CacheFormat;
use moebius_model::{CacheBytes, Inventory, LayerKind, StoredType, StoredWeights, Survey, SurveySource};
use serde_json::{Map, Value, json};

use super::layers;
use crate::output::count;

/// What is told of a model.
pub struct Report<'s> {
    survey: &'s Survey,
    inventory: Inventory,
    kinds: Vec<LayerKind<'s>>,
    /// By the format of keys and values.
    caches: [(&'static str, CacheBytes); 3],
    context: usize,
    /// Of the products with weights, and of the mixers at `context` tokens.
    operations: [u64; 2],
}

impl<'s> Report<'s> {
    /// Counts what there is to count.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn new(survey: &'s Survey, context: usize) -> anyhow::Result<Self> {
        let config = &survey.config;
        let cache = |(name, format)| (name, config.cache_bytes(format));
        Ok(Self {
            survey,
            inventory: config.inventory()?,
            kinds: config.layer_kinds()?,
            caches: [("f32", CacheFormat::F32), ("bf16", CacheFormat::Bf16), ("q8", CacheFormat::Q8)].map(cache),
            context,
            operations: config.operations(context)?,
        })
    }

    /// All parameters of the layers and the last norm, and the active ones: neither embedding nor head.
    fn without_embeddings(&self) -> [u64; 2] {
        let i = &self.inventory;
        [i.total() - i.embedding - i.head, i.active_layers()]
    }

    /// Tables for a terminal.
    pub fn text(&self) -> String {
        let config = &self.survey.config;
        let mut text = format!(
            "{}: {} layers, hidden {}, vocabulary {}, context {}\n\nlayers\n",
            config.family,
            config.n_layers(),
            config.hidden,
            config.vocab_size,
            config.max_positions
        );
        for kind in &self.kinds {
            let LayerKind { layers: numbers, config: layer, is_routed, each } = kind;
            let around = if *is_routed { ", only some tokens" } else { "" };
            line(&mut text, &layers::numbers(numbers), &format!("{}{around}", layers::mixer(&layer.mixer)));
            let sizes = format!("{} parameters each, {} active", short(each.total()), short(each.active()));
            line(&mut text, "", &format!("{}; {sizes}", layers::ffn(config, &layer.ffn)));
        }
        let _ = writeln!(text, "\n{:<26}{:>12}{:>12}", "parameters", "all", "active");
        for (name, all, active) in parts(&self.inventory) {
            if all > 0 {
                parameters_row(&mut text, name, all, active);
            }
        }
        if self.inventory.head == 0 {
            text += "  head                     the embedding\n";
        }
        parameters_row(&mut text, "total", self.inventory.total(), self.inventory.active());
        let [all, active] = self.without_embeddings();
        parameters_row(&mut text, "less embedding and head", all, active);
        weights(&mut text, self.survey.stored.as_ref(), self.survey.source, self.inventory.total());
        self.cache(&mut text);
        let [products, mixers] = self.operations;
        text += "\nFLOPs of a token's forward pass\n";
        line(&mut text, "with weights", &short(products));
        line(
            &mut text,
            &format!("at {} tokens", self.context),
            &format!("{} more in attention and states", short(mixers)),
        );
        text
    }

    fn cache(&self, text: &mut String) {
        let _ = writeln!(text, "\n{:<26}{:>12}{:>12}{:>12}", "cache bytes", "f32", "bf16", "q8");
        let each = self.caches.each_ref().map(|(_, bytes)| {
            let CacheBytes { unlimited, limited, latents, states } = *bytes;
            [bytes.of_token(), unlimited, limited, latents, states]
        });
        let names = ["a token", "  keys and values", "  in windows or chunks", "  latents", "a sequence's states"];
        for (row, name) in names.into_iter().enumerate() {
            let [f32, bf16, q8] = each.map(|numbers| numbers[row]);
            // Where all layers are of the common kind, they need no line of their own.
            let repeats = row == 1 && f32 == each[0][0];
            if f32 > 0 && !repeats {
                let _ = writeln!(text, "  {name:<24}{f32:>12}{bf16:>12}{q8:>12}");
            }
        }
    }

    /// One object; counts are numbers, bytes and parameters alike.
    pub fn json(&self) -> Value {
        let config = &self.survey.config;
        let layers = self.kinds.iter().map(|kind| {
            json!({
                "layers": kind.layers,
                "mixer": layers::mixer(&kind.config.mixer),
                "feed_forward": layers::ffn(config, &kind.config.ffn),
                "some_tokens_only": kind.is_routed,
                "parameters": {"all": kind.each.total(), "active": kind.each.active()},
            })
        });
        let cache = |(name, bytes): &(&str, CacheBytes)| {
            let CacheBytes { unlimited, limited, latents, states } = bytes;
            let kinds = json!({"token": bytes.of_token(), "keys_and_values": unlimited, "in_windows_or_chunks": limited,
                "latents": latents, "sequence_states": states});
            (name.to_string(), kinds)
        };
        let [all, active] = self.without_embeddings();
        let mut parameters = parts_json(&parts(&self.inventory));
        parameters.extend(parts_json(&[
            ("total", self.inventory.total(), self.inventory.active()),
            ("without_embeddings", all, active),
        ]));
        json!({
            "family": config.family,
            "source": source_name(self.survey.source),
            "n_layers": config.n_layers(),
            "hidden": config.hidden,
            "vocabulary": config.vocab_size,
            "context": config.max_positions,
            "layers": layers.collect::<Vec<_>>(),
            "parameters": parameters,
            "weights": self.survey.stored.as_ref().map(weights_json),
            "cache_bytes": self.caches.iter().map(cache).collect::<Map<_, _>>(),
            "flops": {"weights": self.operations[0], "context": self.context, "mixers_at_context": self.operations[1]},
        })
    }
}

/// Parameters by part: all of them, and those that take part in one token.
pub fn parts(inventory: &Inventory) -> [(&'static str, u64, u64); 8] {
    let i = inventory;
    [
        ("embedding", i.embedding, i.embedding),
        ("mixers", i.mixers, i.mixers - i.idle_mixers),
        ("routers", i.routers, i.routers),
        ("experts", i.experts, i.chosen_experts),
        ("shared experts", i.shared_experts, i.shared_experts),
        ("dense networks", i.dense, i.dense),
        ("norms", i.norms, i.norms),
        ("head", i.head, i.head),
    ]
}

/// Parts by name, each with all of its parameters and the active ones.
pub fn parts_json(parts: &[(&str, u64, u64)]) -> Map<String, Value> {
    let part = |(name, all, active): &(&str, u64, u64)| (name.replace(' ', "_"), json!({"all": all, "active": active}));
    parts.iter().map(part).collect()
}

/// A part and its parameters.
pub fn parameters_row(text: &mut String, name: &str, all: u64, active: u64) {
    let _ = writeln!(text, "  {name:<24}{:>12}{:>12}", short(all), short(active));
}

/// What files hold of a model of `total` parameters, or would.
pub fn weights(text: &mut String, stored: Option<&StoredWeights>, source: SurveySource, total: u64) {
    let Some(stored) = stored else {
        *text += "\nweights\n";
        line(text, "none here", "what they are stored in is not in the configuration");
        return line(text, "in bf16", &format!("they would take {}", bytes_of(total * 2)));
    };
    let what = match source {
        SurveySource::Gguf => "GGUF",
        SurveySource::Packed => "packed",
        SurveySource::Folder | SurveySource::Config => "safetensors",
    };
    let files = if stored.files == 1 { "one file".to_string() } else { format!("{} files", stored.files) };
    let _ = writeln!(text, "\nweights, {what}, {files}");
    for (name, of) in &stored.types {
        line(text, name, &format!("{} in {} tensors", bytes_of(of.bytes), of.tensors));
    }
    line(text, "total", &bytes_of(stored.bytes()));
    for (what, of) in &stored.left_out {
        let found = format!("{what}, {} in {} tensors", bytes_of(of.bytes), of.tensors);
        line(text, "left out", &found);
    }
    if let Some(more) = difference(stored, total) {
        line(text, "note", &more);
    }
}

/// Said of tensors that have another number of elements than the model has parameters.
fn difference(stored: &StoredWeights, total: u64) -> Option<String> {
    let elements: u64 = stored.types.iter().filter(|(name, _)| *name != "scales").map(|(_, of)| of.elements).sum();
    (elements != total)
        .then(|| format!("they hold {} numbers, the configuration asks for {}", short(elements), short(total)))
}

/// Where a model was read, in one word.
pub fn source_name(source: SurveySource) -> String {
    format!("{source:?}").to_lowercase()
}

/// What files hold, by type.
pub fn weights_json(stored: &StoredWeights) -> Value {
    let of = |of: &StoredType| json!({"tensors": of.tensors, "elements": of.elements, "bytes": of.bytes});
    json!({
        "files": stored.files,
        "bytes": stored.bytes(),
        "types": stored.types.iter().map(|(name, found)| (name.clone(), of(found))).collect::<Map<_, _>>(),
        "left_out": stored.left_out.iter().map(|(what, found)| (what.to_string(), of(found))).collect::<Map<_, _>>(),
    })
}

/// A name and what is said of it.
pub fn line(text: &mut String, name: &str, what: &str) {
    let _ = writeln!(text, "  {name:<24}  {what}");
}

/// A count as people read it.
pub fn short(number: u64) -> String {
    count(number as usize)
}

/// Bytes as people read them.
fn bytes_of(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.2} MB", n / 1e6),
        n if n >= 1e4 => format!("{:.1} kB", n / 1e3),
        n => format!("{n} bytes"),
    }
}
