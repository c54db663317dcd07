//! The tokenizer of a model's folder, whichever of the usual files it has.

use std::path::Path;

use serde_json::Value;

use super::{Tokenizer, sentencepiece, tiktoken};
use crate::EngineError;

/// Files with a tokenizer, in the order in which they are looked for.
const TIKTOKEN: [&str; 3] = ["tiktoken.model", "qwen.tiktoken", "vocab.tiktoken"];

impl Tokenizer {
    /// Reads `tokenizer.json`, else `tokenizer.model` (SentencePiece's, or ranks as Llama 3 has them under that name),
    /// else Mistral's `tekken.json`, else a file of ranks: `tiktoken.model`, `qwen.tiktoken`, `vocab.tiktoken`.
    /// `tokenizer_config.json` may name further tokens and say whether bos and eos are added.
    ///
    /// # Errors
    /// [`EngineError::TokenizerMissing`] with the files looked for, and what the file found is wrong with.
    pub fn from_folder(folder: &Path) -> Result<Self, EngineError> {
        let json = folder.join("tokenizer.json");
        if json.exists() {
            return Self::from_file(&json);
        }
        let config = Config::read(folder)?;
        let model = folder.join("tokenizer.model");
        if model.exists() {
            let (bytes, name) = (read(&model)?, model.display().to_string());
            if tiktoken::looks_like(&bytes) {
                return tiktoken::parts(&bytes, &config, &name)?.build(&name);
            }
            let mut parts = sentencepiece::parts(&bytes, &name)?;
            config.apply(&mut parts);
            return parts.build(&name);
        }
        let tekken = folder.join("tekken.json");
        if tekken.exists() {
            let name = tekken.display().to_string();
            return tiktoken::tekken(&read(&tekken)?, &name)?.build(&name);
        }
        for file in TIKTOKEN {
            let path = folder.join(file);
            if path.exists() {
                let name = path.display().to_string();
                return tiktoken::parts(&read(&path)?, &config, &name)?.build(&name);
            }
        }
        Err(EngineError::TokenizerMissing { folder: folder.to_path_buf() })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, EngineError> {
    std::fs::read(path).map_err(|source| EngineError::TokenizerFile { path: path.to_path_buf(), source })
}

/// What `tokenizer_config.json` says beside the template; empty if there is none.
pub(super) struct Config(Value);

impl Config {
    fn read(folder: &Path) -> Result<Self, EngineError> {
        let path = folder.join("tokenizer_config.json");
        if !path.exists() {
            return Ok(Self(Value::Null));
        }
        let json = serde_json::from_slice(&read(&path)?).map_err(|error| EngineError::TokenizerSource {
            name: path.display().to_string(),
            reason: format!("wanted JSON: {error}"),
        })?;
        Ok(Self(json))
    }

    /// The text of a token such as `bos_token`.
    pub(super) fn token(&self, name: &str) -> Option<&str> {
        self.0[name].as_str().or_else(|| self.0[name]["content"].as_str())
    }

    pub(super) fn flag(&self, name: &str) -> Option<bool> {
        self.0[name].as_bool()
    }

    pub(super) fn class(&self) -> &str {
        self.0["tokenizer_class"].as_str().unwrap_or_default()
    }

    /// `added_tokens_decoder`: id, text, whether it is special; by id.
    pub(super) fn added(&self) -> Vec<(usize, String, bool)> {
        let entries = self.0["added_tokens_decoder"].as_object().into_iter().flatten();
        let mut added: Vec<_> = entries
            .filter_map(|(id, token)| {
                let text = token["content"].as_str()?.to_string();
                Some((id.parse().ok()?, text, token["special"].as_bool().unwrap_or(false)))
            })
            .collect();
        added.sort();
        added
    }

    /// Adds to SentencePiece's parts what transformers would.
    fn apply(&self, parts: &mut super::TokenizerParts) {
        parts.extend(&self.added());
        parts.add_bos = self.flag("add_bos_token").or(parts.add_bos);
        parts.add_eos = self.flag("add_eos_token").or(parts.add_eos);
        parts.name_tokens(self);
    }
}

impl super::TokenizerParts {
    /// Appends tokens behind the vocabulary. Numbers that nothing stands for stay unused; a token that stands already
    /// is left alone.
    pub(super) fn extend(&mut self, added: &[(usize, String, bool)]) {
        /// More numbers without a token than any model leaves free.
        const WIDEST_GAP: usize = 1 << 16;
        self.token_types.resize(self.tokens.len(), super::TokenType::Normal);
        for (id, text, special) in added {
            if *id < self.tokens.len() || *id > self.tokens.len() + WIDEST_GAP {
                continue;
            }
            while self.tokens.len() < *id {
                self.tokens.push(format!("[unused {}]", self.tokens.len()));
                self.token_types.push(super::TokenType::Unused);
            }
            self.tokens.push(text.clone());
            let kind = if *special { super::TokenType::Control } else { super::TokenType::UserDefined };
            self.token_types.push(kind);
        }
        if !self.scores.is_empty() {
            self.scores.resize(self.tokens.len(), 0.0);
        }
    }

    /// Takes bos, eos, unknown and padding by the names in a configuration.
    pub(super) fn name_tokens(&mut self, config: &Config) {
        let find = |name: &str| {
            let wanted = config.token(name)?;
            self.tokens.iter().position(|token| token == wanted).map(|id| id as u32)
        };
        let named = [find("bos_token"), find("eos_token"), find("unk_token"), find("pad_token")];
        let places = [&mut self.bos, &mut self.eos, &mut self.unknown, &mut self.padding];
        for (place, named) in places.into_iter().zip(named) {
            *place = named.or(*place);
        }
    }
}
