//! Shapes by name, and the values of keys that a recipe leaves out.
//!
//! A preset is a set of values that a recipe may leave out: what the file says goes before what its preset says, and that
//! before the general defaults. Once filled, a recipe no longer depends on what its preset means.

use super::Recipe;
use super::locate::Located;

/// A model shape with a vocabulary and a learning rate that suit it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preset {
    /// What `model.preset` says.
    pub name: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Heads of queries, keys and values.
    pub heads: usize,
    /// Inner width of an expert or of the dense block.
    pub ffn: usize,
    /// Experts a layer and experts a token; `None`: dense.
    pub experts: Option<[usize; 2]>,
    /// Positions.
    pub context: usize,
    /// Vocabulary.
    pub vocab_size: usize,
    /// Peak of AdamW's learning rate.
    pub learning_rate: f64,
}

/// Dense shapes, and mixtures with the same active size (routers aside): `moe-X` is `dense-X` with its feed-forward part
/// cut into two halves of which there are eight, `fine-X` into four quarters of which there are 32.
pub const PRESETS: [Preset; 12] = [
    Preset { name: "dense-nano", experts: None, ..NANO },
    Preset { name: "moe-nano", experts: Some([8, 2]), ffn: NANO.ffn / 2, ..NANO },
    Preset { name: "fine-nano", experts: Some([32, 4]), ffn: NANO.ffn / 4, ..NANO },
    Preset { name: "dense-tiny", experts: None, ..TINY },
    Preset { name: "moe-tiny", experts: Some([8, 2]), ffn: TINY.ffn / 2, ..TINY },
    Preset { name: "fine-tiny", experts: Some([32, 4]), ffn: TINY.ffn / 4, ..TINY },
    Preset { name: "dense-small", experts: None, ..SMALL },
    Preset { name: "moe-small", experts: Some([8, 2]), ffn: SMALL.ffn / 2, ..SMALL },
    Preset { name: "fine-small", experts: Some([32, 4]), ffn: SMALL.ffn / 4, ..SMALL },
    Preset { name: "dense-base", experts: None, ..BASE },
    Preset { name: "moe-base", experts: Some([8, 2]), ffn: BASE.ffn / 2, ..BASE },
    Preset { name: "fine-base", experts: Some([32, 4]), ffn: BASE.ffn / 4, ..BASE },
];

const NANO: Preset = Preset {
    name: "",
    hidden: 64,
    layers: 2,
    heads: 4,
    ffn: 256,
    experts: None,
    context: 128,
    vocab_size: 512,
    learning_rate: 6e-3,
};
const TINY: Preset = Preset { hidden: 128, layers: 4, ffn: 512, vocab_size: 1024, learning_rate: 4e-3, ..NANO };
const SMALL: Preset =
    Preset { hidden: 256, layers: 6, heads: 8, ffn: 1024, context: 256, vocab_size: 4096, learning_rate: 2e-3, ..NANO };
const BASE: Preset = Preset { hidden: 512, layers: 8, ffn: 2048, vocab_size: 8192, learning_rate: 1e-3, ..SMALL };

/// The preset of a name.
pub fn find(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}

/// Gives every key that the file leaves out its value: the preset's, or the general one. Keys without either stay zero, for
/// the checks to find.
pub(super) fn fill(recipe: &mut Recipe, located: &Located<'_>) {
    if let Some(preset) = recipe.model.preset.as_deref().and_then(find) {
        fill_from(preset, recipe, located);
    }
    let absent = |key: &str| !located.says(key);
    let (train, optimizer) = (&mut recipe.train, &mut recipe.optimizer);
    if absent("train.sequence_length") {
        train.sequence_length = recipe.model.context;
    }
    if absent("train.validate_every") {
        train.validate_every = (train.steps / 10).max(1);
    }
    if absent("train.save_every") {
        train.save_every = train.validate_every;
    }
    if absent("optimizer.minimum_learning_rate") {
        optimizer.minimum_learning_rate = optimizer.learning_rate / 10.0;
    }
    if absent("optimizer.warmup_steps") {
        optimizer.warmup_steps = (train.steps / 10).min(100);
    }
}

fn fill_from(preset: &Preset, recipe: &mut Recipe, located: &Located<'_>) {
    let model = &mut recipe.model;
    let numbers = [
        ("model.hidden", &mut model.hidden, preset.hidden),
        ("model.layers", &mut model.layers, preset.layers),
        ("model.heads", &mut model.heads, preset.heads),
        ("model.ffn", &mut model.ffn, preset.ffn),
        ("model.context", &mut model.context, preset.context),
        ("tokenizer.vocab_size", &mut recipe.tokenizer.vocab_size, preset.vocab_size),
    ];
    for (key, place, value) in numbers {
        if !located.says(key) {
            *place = value;
        }
    }
    if let Some([experts, chosen]) = preset.experts {
        model.experts = model.experts.or(Some(experts));
        model.experts_per_token = model.experts_per_token.or(Some(chosen));
        let balance = &mut recipe.balance;
        if !located.says("balance.load_balancing") {
            balance.load_balancing = 0.01;
        }
        if !located.says("balance.z") {
            balance.z = 0.001;
        }
    }
    if !located.says("optimizer.learning_rate") {
        recipe.optimizer.learning_rate = preset.learning_rate;
    }
}
