//! Texts, tokenizer and shards of a run, made once and found again.
//!
//! `OUT/data/` holds `tokenizer.json`, `train.tokens`, `valid.tokens` and an `eval-NAME.tokens` for each of `data.eval`. Each shard carries a fingerprint of the texts,
//! the tokenizer's settings and the format; it is used again only if that is what the recipe asks for now.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::sampler::count_windows;
use super::shard::{TokenShard, encode_shard};
use super::text::{Document, read_documents, write_digest};
use super::tokenizer::{END_OF_TEXT_ID, TextTokenizer};
use crate::digest::{Digest, Hasher};
use crate::progress::{DataFacts, Event, Progress};
use crate::{Recipe, Result, TrainError, files};

/// Raised whenever the same texts would give other tokens.
const PIPELINE_VERSION: u64 = 1;

/// What a run reads from.
pub struct Corpus {
    /// From text to tokens and back.
    pub tokenizer: TextTokenizer,
    /// Tokens to learn from.
    pub train: TokenShard,
    /// Tokens held back.
    pub valid: TokenShard,
    /// Further tokens held back, by name.
    pub eval: BTreeMap<String, TokenShard>,
}

/// A part of `[data]`: its key, its shard's name, its texts and what decides its tokens.
struct Part {
    key: String,
    file: String,
    texts: Vec<Document>,
    source: Digest,
}

impl Part {
    /// Reads the texts; `train` are those that the tokenizer comes from, `None` if these are.
    fn read(recipe: &Recipe, key: &str, paths: &[PathBuf], train: Option<&Self>) -> Result<Self> {
        let texts = read_documents(recipe, paths)?;
        let source = match train {
            None => source(recipe, &texts, &[]),
            Some(train) => source(recipe, &train.texts, &texts),
        };
        let file = format!("{}.tokens", key.trim_start_matches("data.").replace('.', "-"));
        Ok(Self { key: key.to_owned(), file, texts, source })
    }
}

/// Tokens and targets of some windows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Windows {
    /// Inputs, window after window.
    pub tokens: Vec<u32>,
    /// The token that follows each input.
    pub targets: Vec<u32>,
}

impl Corpus {
    /// Reads the texts, then makes the tokens or finds them in `folder`.
    ///
    /// # Errors
    /// Texts that cannot be read, are not UTF-8 or too short; a folder that cannot be written.
    pub fn prepare(recipe: &Recipe, folder: &Path, progress: &mut dyn Progress) -> Result<Self> {
        progress.event(&Event::Preparing("reading the texts"));
        let mut parts = vec![Part::read(recipe, "data.train", &recipe.data.train, None)?];
        parts.push(Part::read(recipe, "data.valid", &recipe.data.valid, Some(&parts[0]))?);
        for (name, paths) in &recipe.data.eval {
            parts.push(Part::read(recipe, &format!("data.eval.{name}"), paths, Some(&parts[0]))?);
        }
        files::create_folder(folder)?;
        files::sweep(folder)?;
        let found = Self::find(folder, &parts);
        let cached = found.is_some();
        let (tokenizer, shards) = match found {
            Some(found) => found,
            None => Self::make(recipe, folder, &parts, progress)?,
        };
        for (part, shard) in parts.iter().zip(&shards) {
            check_length(recipe, &part.key, shard)?;
        }
        let mut shards = shards.into_iter();
        let (train, valid) = (shards.next().expect("a part"), shards.next().expect("a part"));
        let eval = recipe.data.eval.keys().cloned().zip(shards).collect();
        let corpus = Self { tokenizer, train, valid, eval };
        progress.event(&Event::Data(&DataFacts {
            vocab_size: corpus.tokenizer.vocab_size(),
            train_tokens: corpus.train.len(),
            valid_tokens: corpus.valid.len(),
            train_bytes: parts[0].texts.iter().map(|document| document.text.len()).sum(),
            cached,
        }));
        Ok(corpus)
    }

    /// What an earlier start left, if it is whole and made from the same.
    fn find(folder: &Path, parts: &[Part]) -> Option<(TextTokenizer, Vec<TokenShard>)> {
        let json = std::fs::read_to_string(folder.join("tokenizer.json")).ok()?;
        let tokenizer = TextTokenizer::from_json(&json).ok()?;
        let shards = parts.iter().map(|part| {
            let shard = TokenShard::open(&folder.join(&part.file)).ok()?;
            (shard.source() == with_tokenizer(part.source, &json)).then_some(shard)
        });
        Some((tokenizer, shards.collect::<Option<_>>()?))
    }

    fn make(
        recipe: &Recipe,
        folder: &Path,
        parts: &[Part],
        progress: &mut dyn Progress,
    ) -> Result<(TextTokenizer, Vec<TokenShard>)> {
        progress.event(&Event::Preparing("training the tokenizer"));
        let tokenizer = TextTokenizer::train(&recipe.tokenizer, &parts[0].texts)?;
        files::write_whole(&folder.join("tokenizer.json"), tokenizer.json().as_bytes())?;
        progress.event(&Event::Preparing("tokenising the texts"));
        let shard = |part: &Part| {
            let mut tokens = Vec::new();
            for document in &part.texts {
                tokens.extend(tokenizer.encode(&document.text)?);
                tokens.push(END_OF_TEXT_ID);
            }
            let path = folder.join(&part.file);
            let source = with_tokenizer(part.source, tokenizer.json());
            files::write_whole(&path, &encode_shard(&tokens, tokenizer.vocab_size(), source))?;
            TokenShard::open(&path)
        };
        let shards = parts.iter().map(shard).collect::<Result<_>>()?;
        Ok((tokenizer, shards))
    }

    /// A fingerprint of everything that the model will see: all shards and the tokenizer.
    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::default();
        hasher.write_u64(self.train.digest().0);
        hasher.write_u64(self.valid.digest().0);
        self.eval.values().for_each(|shard| hasher.write_u64(shard.digest().0));
        hasher.write_sized(self.tokenizer.json().as_bytes());
        hasher.finish()
    }
}

/// One window at the least in each part.
fn check_length(recipe: &Recipe, key: &str, shard: &TokenShard) -> Result<()> {
    let length = recipe.train.sequence_length;
    if count_windows(shard.len(), length) == 0 {
        let message = format!("wanted more than train.sequence_length = {length} tokens, found {}", shard.len());
        return Err(TrainError::Data { what: key.to_owned(), message });
    }
    Ok(())
}

/// Inputs and targets of the windows `numbers`, each `length` tokens long.
pub fn windows(shard: &TokenShard, length: usize, numbers: impl IntoIterator<Item = usize>) -> Windows {
    let mut windows = Windows::default();
    for number in numbers {
        shard.copy(number * length, length, &mut windows.tokens);
        shard.copy(number * length + 1, length, &mut windows.targets);
    }
    windows
}

/// What decides the tokenizer and the tokens of `texts`.
fn source(recipe: &Recipe, train: &[Document], valid: &[Document]) -> Digest {
    let mut hasher = Hasher::default();
    hasher.write_u64(PIPELINE_VERSION);
    hasher.write_u64(recipe.tokenizer.vocab_size as u64);
    hasher.write_u64(recipe.tokenizer.min_frequency);
    write_digest(train, &mut hasher);
    write_digest(valid, &mut hasher);
    hasher.finish()
}

/// `source` with the bytes of the tokenizer that was used.
fn with_tokenizer(source: Digest, json: &str) -> Digest {
    let mut hasher = Hasher::default();
    hasher.write_u64(source.0);
    hasher.write_sized(json.as_bytes());
    hasher.finish()
}
