//! Texts, tokenizer and shards of a run, made once and found again.
//!
//! `OUT/data/` holds `tokenizer.json`, `train.tokens` and `valid.tokens`. Each shard carries a fingerprint of the texts,
//! the tokenizer's settings and the format; it is used again only if that is what the recipe asks for now.

use std::path::Path;

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
        let train = read_documents(recipe, &recipe.data.train)?;
        let valid = read_documents(recipe, &recipe.data.valid)?;
        let bytes = |documents: &[Document]| documents.iter().map(|document| document.text.len()).sum::<usize>();
        let train_bytes = bytes(&train);
        let sources = [source(recipe, &train, &[]), source(recipe, &train, &valid)];
        files::create_folder(folder)?;
        files::sweep(folder)?;
        let found = Self::find(folder, sources);
        let cached = found.is_some();
        let corpus = match found {
            Some(corpus) => corpus,
            None => Self::make(recipe, folder, [&train, &valid], sources, progress)?,
        };
        corpus.check_length(recipe)?;
        progress.event(&Event::Data(&DataFacts {
            vocab_size: corpus.tokenizer.vocab_size(),
            train_tokens: corpus.train.len(),
            valid_tokens: corpus.valid.len(),
            train_bytes,
            cached,
        }));
        Ok(corpus)
    }

    /// What an earlier start left, if it is whole and made from the same.
    fn find(folder: &Path, sources: [Digest; 2]) -> Option<Self> {
        let json = std::fs::read_to_string(folder.join("tokenizer.json")).ok()?;
        let tokenizer = TextTokenizer::from_json(&json).ok()?;
        let train = TokenShard::open(&folder.join("train.tokens")).ok()?;
        let valid = TokenShard::open(&folder.join("valid.tokens")).ok()?;
        let made_with = |shard: &TokenShard, source| shard.source() == with_tokenizer(source, &json);
        let same = made_with(&train, sources[0]) && made_with(&valid, sources[1]);
        same.then_some(Self { tokenizer, train, valid })
    }

    fn make(
        recipe: &Recipe,
        folder: &Path,
        texts: [&[Document]; 2],
        sources: [Digest; 2],
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        progress.event(&Event::Preparing("training the tokenizer"));
        let tokenizer = TextTokenizer::train(&recipe.tokenizer, texts[0])?;
        files::write_whole(&folder.join("tokenizer.json"), tokenizer.json().as_bytes())?;
        progress.event(&Event::Preparing("tokenising the texts"));
        let shard = |name: &str, documents: &[Document], source: Digest| {
            let mut tokens = Vec::new();
            for document in documents {
                tokens.extend(tokenizer.encode(&document.text)?);
                tokens.push(END_OF_TEXT_ID);
            }
            let path = folder.join(name);
            let source = with_tokenizer(source, tokenizer.json());
            files::write_whole(&path, &encode_shard(&tokens, tokenizer.vocab_size(), source))?;
            TokenShard::open(&path)
        };
        let train = shard("train.tokens", texts[0], sources[0])?;
        let valid = shard("valid.tokens", texts[1], sources[1])?;
        Ok(Self { tokenizer, train, valid })
    }

    /// One window at the least in each part.
    fn check_length(&self, recipe: &Recipe) -> Result<()> {
        let length = recipe.train.sequence_length;
        for (key, shard) in [("data.train", &self.train), ("data.valid", &self.valid)] {
            if count_windows(shard.len(), length) == 0 {
                let wanted = format!("wanted more than train.sequence_length = {length} tokens, found {}", shard.len());
                return Err(TrainError::Data { what: key.to_owned(), message: wanted });
            }
        }
        Ok(())
    }

    /// A fingerprint of everything that the model will see: both shards and the tokenizer.
    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::default();
        hasher.write_u64(self.train.digest().0);
        hasher.write_u64(self.valid.digest().0);
        hasher.write_sized(self.tokenizer.json().as_bytes());
        hasher.finish()
    }
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
