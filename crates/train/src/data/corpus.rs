//! Texts, tokenizer and shards of a run, made once and found again.
//!
//! `OUT/data/` holds `tokenizer.json`, `train.tokens` (or `train-0.tokens` ... where sources are mixed by weight),
//! `valid.tokens` and an `eval-NAME.tokens` for each of `data.eval`. Each shard carries a fingerprint of the texts, the
//! tokenizer's settings and the format; it is used again only if that is what the recipe asks for now. Texts are
//! streamed: once for the fingerprint, and if the shards are not there once for the tokenizer and once for the tokens.

use std::collections::BTreeMap;
use std::path::Path;

use super::documents::Pieces;
use super::sampler::count_windows;
use super::shard::{ShardWriter, TokenShard};
use super::tokenizer::{END_OF_TEXT_ID, TextTokenizer};
use crate::digest::{Digest, Hasher};
use crate::progress::{DataFacts, Event, Progress};
use crate::recipe::{Documents, Source};
use crate::{Recipe, Result, TrainError, files};

/// Raised whenever the same texts would give other tokens.
const PIPELINE_VERSION: u64 = 2;

/// So much text is tokenised at once: enough to keep all cores busy.
const BATCH_BYTES: usize = 4 << 20;

/// What a run reads from.
pub struct Corpus {
    /// From text to tokens and back.
    pub tokenizer: TextTokenizer,
    /// Tokens to learn from: one stream, or one for each source that has a weight.
    pub train: Vec<TokenShard>,
    /// Tokens held back.
    pub valid: TokenShard,
    /// Further tokens held back, by name.
    pub eval: BTreeMap<String, TokenShard>,
    /// What attention sees of borders between documents.
    documents: Documents,
}

/// A part of `[data]` that has a shard of its own.
struct Part {
    key: String,
    file: String,
    sources: Vec<Source>,
    facts: TextFacts,
}

/// What one pass over some texts tells.
#[derive(Clone, Copy)]
struct TextFacts {
    digest: Digest,
    bytes: u64,
}

/// Tokens and targets of some sequences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Windows {
    /// Inputs, window after window.
    pub tokens: Vec<u32>,
    /// The token that follows each input.
    pub targets: Vec<u32>,
    /// Where sequences begin that attention does not look beyond; windows do always.
    pub starts: Vec<usize>,
}

impl Corpus {
    /// Reads the texts, then makes the tokens or finds them in `folder`.
    ///
    /// # Errors
    /// Texts that cannot be read, are not UTF-8 or too short; a folder that cannot be written.
    pub fn prepare(recipe: &Recipe, folder: &Path, progress: &mut dyn Progress) -> Result<Self> {
        progress.event(&Event::Preparing("reading the texts"));
        let parts = parts(recipe)?;
        let streams = parts.iter().filter(|part| part.key == "data.train").count();
        files::create_folder(folder)?;
        files::sweep(folder)?;
        let source = source(recipe, &parts[..streams]);
        let found = Self::find(folder, &parts, source);
        let cached = found.is_some();
        let (tokenizer, mut shards) = match found {
            Some(found) => found,
            None => Self::make(recipe, folder, &parts, streams, progress)?,
        };
        for (part, shard) in parts.iter().zip(&shards) {
            check_length(recipe, part, shard)?;
        }
        let mut held_back = shards.split_off(streams).into_iter();
        let valid = held_back.next().expect("a part");
        let eval = recipe.data.eval.keys().cloned().zip(held_back).collect();
        let corpus = Self { tokenizer, train: shards, valid, eval, documents: recipe.data.documents };
        progress.event(&Event::Data(&DataFacts {
            vocab_size: corpus.tokenizer.vocab_size(),
            train_tokens: corpus.train.iter().map(TokenShard::len).sum(),
            valid_tokens: corpus.valid.len(),
            train_bytes: parts[..streams].iter().map(|part| part.facts.bytes).sum::<u64>() as usize,
            streams,
            cached,
        }));
        Ok(corpus)
    }

    /// What an earlier start left, if it is whole and made from the same.
    fn find(folder: &Path, parts: &[Part], source: Digest) -> Option<(TextTokenizer, Vec<TokenShard>)> {
        let json = std::fs::read_to_string(folder.join("tokenizer.json")).ok()?;
        let tokenizer = TextTokenizer::from_json(&json).ok()?;
        let shards = parts.iter().map(|part| {
            let shard = TokenShard::open(&folder.join(&part.file)).ok()?;
            (shard.source() == part_source(source, part, &json)).then_some(shard)
        });
        Some((tokenizer, shards.collect::<Option<_>>()?))
    }

    fn make(
        recipe: &Recipe,
        folder: &Path,
        parts: &[Part],
        streams: usize,
        progress: &mut dyn Progress,
    ) -> Result<(TextTokenizer, Vec<TokenShard>)> {
        progress.event(&Event::Preparing("training the tokenizer"));
        let sources = parts[..streams].iter().flat_map(|part| part.sources.clone()).collect::<Vec<_>>();
        let mut failed = None;
        let texts = Pieces::of(recipe, &sources)?.map_while(|piece| match piece {
            Ok(piece) => Some(piece.text),
            Err(error) => {
                failed = Some(error);
                None
            }
        });
        let tokenizer = TextTokenizer::train(&recipe.tokenizer, texts);
        if let Some(error) = failed {
            return Err(error);
        }
        let tokenizer = tokenizer?;
        files::write_whole(&folder.join("tokenizer.json"), tokenizer.json().as_bytes())?;
        let source = source(recipe, &parts[..streams]);
        let total = parts.iter().map(|part| part.facts.bytes).sum();
        let mut done = 0;
        let mut shards = Vec::new();
        for part in parts {
            let path = folder.join(&part.file);
            let fingerprint = part_source(source, part, tokenizer.json());
            let mut writer = ShardWriter::create(&path, tokenizer.vocab_size(), fingerprint)?;
            tokenise(Pieces::of(recipe, &part.sources)?, &tokenizer, &mut writer, &mut |bytes| {
                done += bytes;
                progress.event(&Event::Tokenising { done, total });
            })?;
            writer.finish()?;
            shards.push(TokenShard::open(&path)?);
        }
        Ok((tokenizer, shards))
    }

    /// A fingerprint of everything that the model will see: all shards and the tokenizer.
    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::default();
        let shards = self.train.iter().chain([&self.valid]).chain(self.eval.values());
        shards.for_each(|shard| hasher.write_u64(shard.digest().0));
        hasher.write_sized(self.tokenizer.json().as_bytes());
        hasher.finish()
    }

    /// Inputs and targets of training windows, each a stream and a number in it.
    pub fn train_windows(&self, length: usize, numbers: &[(usize, usize)]) -> Windows {
        let mut windows = Windows::default();
        for &(stream, number) in numbers {
            windows.push(&self.train[stream], length, number, self.documents);
        }
        windows
    }

    /// Inputs and targets of the windows `numbers` of a shard, each `length` tokens long.
    pub fn windows(&self, shard: &TokenShard, length: usize, numbers: &[usize]) -> Windows {
        let mut windows = Windows::default();
        for &number in numbers {
            windows.push(shard, length, number, self.documents);
        }
        windows
    }
}

impl Windows {
    fn push(&mut self, shard: &TokenShard, length: usize, number: usize, documents: Documents) {
        let first = self.tokens.len();
        shard.copy(number * length, length, &mut self.tokens);
        shard.copy(number * length + 1, length, &mut self.targets);
        self.starts.push(first);
        if documents == Documents::Apart {
            let separators = (first + 1..self.tokens.len()).filter(|&at| self.tokens[at] == END_OF_TEXT_ID);
            self.starts.extend(separators);
        }
    }

    /// The sequences, each to be seen by itself.
    pub fn sequences(&self) -> Vec<&[u32]> {
        let ends = self.starts.iter().skip(1).copied().chain([self.tokens.len()]);
        self.starts.iter().zip(ends).map(|(&start, end)| &self.tokens[start..end]).collect()
    }
}

/// The parts that a recipe asks for: training streams first, then `valid`, then `eval` in the order of names. Reads all
/// texts once.
fn parts(recipe: &Recipe) -> Result<Vec<Part>> {
    let data = &recipe.data;
    let mut parts = Vec::new();
    let mut add = |key: &str, file: String, sources: &[Source]| -> Result<()> {
        let facts = facts_of(Pieces::of(recipe, sources)?)?;
        parts.push(Part { key: key.to_owned(), file, sources: sources.to_vec(), facts });
        Ok(())
    };
    if data.is_weighted() {
        for (stream, source) in data.train.iter().enumerate() {
            add("data.train", format!("train-{stream}.tokens"), std::slice::from_ref(source))?;
        }
    } else {
        add("data.train", "train.tokens".to_owned(), &data.train)?;
    }
    add("data.valid", "valid.tokens".to_owned(), &data.valid)?;
    for (name, sources) in &data.eval {
        add(&format!("data.eval.{name}"), format!("eval-{name}.tokens"), sources)?;
    }
    Ok(parts)
}

/// One pass over texts: their bytes and their borders, however they come in pieces, wherever they stand.
fn facts_of(pieces: Pieces) -> Result<TextFacts> {
    let (mut hasher, mut bytes, mut length) = (Hasher::default(), 0, 0);
    for piece in pieces {
        let piece = piece?;
        hasher.write(piece.text.as_bytes());
        length += piece.text.len() as u64;
        if piece.is_last {
            hasher.write_u64(length);
            bytes += length;
            length = 0;
        }
    }
    Ok(TextFacts { digest: hasher.finish(), bytes })
}

/// Appends the tokens of all pieces, a separator after each document; tells `progress` how many bytes are done.
fn tokenise(
    pieces: Pieces,
    tokenizer: &TextTokenizer,
    writer: &mut ShardWriter,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut batch = Vec::new();
    let mut bytes = 0;
    let mut pieces = pieces.peekable();
    while let Some(piece) = pieces.next() {
        let piece = piece?;
        bytes += piece.text.len();
        batch.push(piece);
        if bytes >= BATCH_BYTES || pieces.peek().is_none() {
            let texts = batch.iter().map(|piece| piece.text.as_str()).collect::<Vec<_>>();
            for (tokens, piece) in tokenizer.encode_all(&texts)?.iter().zip(&batch) {
                writer.append(tokens)?;
                if piece.is_last {
                    writer.append(&[END_OF_TEXT_ID])?;
                }
            }
            progress(bytes as u64);
            batch.clear();
            bytes = 0;
        }
    }
    Ok(())
}

/// One window at the least in each part.
fn check_length(recipe: &Recipe, part: &Part, shard: &TokenShard) -> Result<()> {
    let length = recipe.train.sequence_length;
    if count_windows(shard.len(), length) == 0 {
        let message = format!("wanted more than train.sequence_length = {length} tokens, found {}", shard.len());
        return Err(TrainError::Data { what: part.key.clone(), message });
    }
    Ok(())
}

/// What decides the tokenizer.
fn source(recipe: &Recipe, streams: &[Part]) -> Digest {
    let mut hasher = Hasher::default();
    hasher.write_u64(PIPELINE_VERSION);
    hasher.write_u64(recipe.tokenizer.vocab_size as u64);
    hasher.write_u64(recipe.tokenizer.min_frequency);
    streams.iter().for_each(|part| hasher.write_u64(part.facts.digest.0));
    hasher.finish()
}

/// What decides the tokens of a part: its texts, and the bytes of the tokenizer that was used.
fn part_source(source: Digest, part: &Part, json: &str) -> Digest {
    let mut hasher = Hasher::default();
    hasher.write_u64(source.0);
    hasher.write_u64(part.facts.digest.0);
    hasher.write_sized(json.as_bytes());
    hasher.finish()
}
