//! Writes what a run of a recipe begins from, for another program to do the same: the model with its first weights, and
//! the tokens of every step.
//!
//!     cargo run --release -p moebius-train --example beginning -- RECIPE OUT
//!
//! `OUT/model` is a folder as `moebius train` writes them; `OUT/tokens.u32` holds little-endian numbers
//! `[steps, accumulation * sequences, sequence_length + 1]`, each row a window with the target of its last token.
//! `bench/curves_vs_pytorch.py` trains PyTorch with them.

use moebius_model::Model;
use moebius_train::data::corpus::Corpus;
use moebius_train::data::sampler::{MixedSampler, count_windows};
use moebius_train::progress::Silent;
use moebius_train::recipe::ExportDtype;
use moebius_train::{Recipe, learn, model_folder};
use std::error::Error;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [recipe, out] = &arguments[..] else { return Err("wanted RECIPE OUT".into()) };
    write(&Recipe::load(recipe)?, out)
}

fn write(recipe: &Recipe, out: &Path) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(out)?;
    let corpus = Corpus::prepare(recipe, &out.join("data"), &mut Silent)?;
    let model = Model::new(&learn::model_config(recipe, corpus.tokenizer.vocab_size()), recipe.train.seed)?;
    model_folder::save(&out.join("model"), &model, &corpus.tokenizer, ExportDtype::F32)?;

    let length = recipe.train.sequence_length;
    let weights = recipe.data.train.iter().map(|source| source.weight.unwrap_or(1.0));
    let streams = corpus.train.iter().zip(weights).map(|(shard, weight)| (count_windows(shard.len(), length), weight));
    let mut sampler = MixedSampler::new(recipe.train.seed, &streams.collect::<Vec<_>>(), &[]);
    let windows = recipe.train.steps * (recipe.train.accumulation * recipe.train.sequences) as u64;
    let mut bytes = Vec::new();
    for _ in 0..windows {
        let window = corpus.train_windows(length, &[sampler.next_window()]);
        let last = &window.targets[length - 1..];
        bytes.extend(window.tokens.iter().chain(last).flat_map(|token| token.to_le_bytes()));
    }
    std::fs::write(out.join("tokens.u32"), bytes)?;
    Ok(())
}
