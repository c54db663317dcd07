//! The pieces of a tokenizer as GGUF metadata and SentencePiece models hold them, and how they become a
//! `tokenizers::Tokenizer`.

use std::collections::{HashMap, HashSet};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD as BASE64;
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::{AddedToken, ModelWrapper};

use super::splits::{self, Split};
use super::{Tokenizer, one_line};
use crate::EngineError;

/// What a token is. The numbers are those of GGUF's `tokenizer.ggml.token_type` and of SentencePiece's `Type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenType {
    /// Ordinary text.
    #[default]
    Normal,
    /// Stands for what no other token covers.
    Unknown,
    /// Steers the model and is no text, like bos.
    Control,
    /// Text that is always one token.
    UserDefined,
    /// A number without a use.
    Unused,
    /// One byte, spelled `<0x0A>`.
    Byte,
}

impl TokenType {
    /// The type that a file's number stands for.
    pub fn from_number(number: i64) -> Option<Self> {
        match number {
            1 => Some(Self::Normal),
            2 => Some(Self::Unknown),
            3 => Some(Self::Control),
            4 => Some(Self::UserDefined),
            5 => Some(Self::Unused),
            6 => Some(Self::Byte),
            _ => None,
        }
    }
}

/// A tokenizer in pieces, named as in GGUF's `tokenizer.ggml.*`. What a file does not say stays at its default.
#[derive(Clone, Debug, Default)]
pub struct TokenizerParts {
    /// `model`: `llama` (SentencePiece's BPE: merge what scores highest), `gpt2` (byte-level BPE, merges in a list),
    /// `gemma4` (the same of characters) or `t5` (SentencePiece's unigram).
    pub model: String,
    /// `pre`: the name of the rules that cut text into words, for `gpt2`.
    pub pre: Option<String>,
    /// `tokens`: the text of each id.
    pub tokens: Vec<String>,
    /// `scores`: one a token for `llama` and `t5`.
    pub scores: Vec<f32>,
    /// `token_type`: one a token, or none: all normal.
    pub token_types: Vec<TokenType>,
    /// `merges`: `left right`, most important first; without any, a token with a lower id is merged first.
    pub merges: Vec<String>,
    /// `bos_token_id`: begins a text.
    pub bos: Option<u32>,
    /// `eos_token_id`: ends a text.
    pub eos: Option<u32>,
    /// `unknown_token_id`.
    pub unknown: Option<u32>,
    /// `padding_token_id`.
    pub padding: Option<u32>,
    /// `add_bos_token`: whether bos is put before a text.
    pub add_bos: Option<bool>,
    /// `add_eos_token`: whether eos is put behind it.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`: whether a text is read as if a space stood before it.
    pub add_space_prefix: Option<bool>,
    /// `remove_extra_whitespaces`: whether runs of spaces count as one and outer ones not at all.
    pub remove_extra_whitespaces: bool,
    /// `precompiled_charsmap`: SentencePiece's table of characters to replace, empty for none.
    pub character_map: Vec<u8>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

/// The space of SentencePiece.
const SPACE: &str = "\u{2581}";

impl TokenizerParts {
    /// Joins the pieces; `name` stands in messages.
    ///
    /// # Errors
    /// [`EngineError::TokenizerSource`]: pieces that do not fit together, a kind that is not known.
    pub fn build(&self, name: &str) -> Result<Tokenizer, EngineError> {
        let builder = Builder { parts: self, name };
        builder.check()?;
        match self.model.as_str() {
            "llama" => builder.scored(),
            "gpt2" | "gemma4" => builder.merged(),
            "t5" => builder.unigram(),
            other => {
                Err(builder.wrong(format!("wanted the tokenizer model llama, gpt2, gemma4 or t5, found `{other}`")))
            }
        }
    }

    fn token_type(&self, id: usize) -> TokenType {
        self.token_types.get(id).copied().unwrap_or_default()
    }
}

/// Builds one tokenizer; knows the file's name.
struct Builder<'p> {
    parts: &'p TokenizerParts,
    name: &'p str,
}

impl Builder<'_> {
    fn wrong(&self, reason: String) -> EngineError {
        EngineError::TokenizerSource { name: self.name.to_string(), reason }
    }

    /// The `tokenizers` crate's complaint as ours.
    fn refused(&self, error: impl std::fmt::Display) -> EngineError {
        self.wrong(one_line(&error.to_string()))
    }

    fn check(&self) -> Result<(), EngineError> {
        let parts = self.parts;
        let count = parts.tokens.len();
        if count == 0 {
            return Err(self.wrong("wanted tokens, found none".into()));
        }
        for (what, found) in [("scores", parts.scores.len()), ("token types", parts.token_types.len())] {
            if found != 0 && found != count {
                return Err(self.wrong(format!("wanted {count} {what}, one a token, found {found}")));
            }
        }
        if let Some(id) = parts.scores.iter().position(|score| score.is_nan()) {
            return Err(self.wrong(format!("wanted a number as score of token {id}, found NaN")));
        }
        let special = [("bos", parts.bos), ("eos", parts.eos), ("unknown", parts.unknown), ("padding", parts.padding)];
        for (what, id) in special {
            if let Some(id) = id.filter(|&id| id as usize >= count) {
                return Err(self.wrong(format!("wanted a {what} token below {count}, found {id}")));
            }
        }
        Ok(())
    }

    /// The ids by text; of equal texts the first counts.
    fn vocabulary(&self) -> HashMap<&str, u32> {
        let mut vocabulary = HashMap::with_capacity(self.parts.tokens.len());
        for (id, token) in self.parts.tokens.iter().enumerate() {
            vocabulary.entry(token.as_str()).or_insert(id as u32);
        }
        vocabulary
    }

    /// Byte-level BPE.
    fn merged(&self) -> Result<Tokenizer, EngineError> {
        let parts = self.parts;
        let pre = parts.pre.as_deref().unwrap_or(if parts.model == "gemma4" { "gemma4" } else { "default" });
        let split = splits::named(pre).ok_or_else(|| {
            self.wrong(format!("the pre-tokenizer `{pre}` is not known; wanted one of {}", splits::names()))
        })?;
        let vocabulary = self.vocabulary();
        let merges = if parts.merges.is_empty() {
            let ranks: Vec<f32> = (0..parts.tokens.len()).map(|id| -(id as f32)).collect();
            merges_by_score(parts, &vocabulary, &ranks)
        } else {
            self.listed_merges(&vocabulary)?
        };
        let model = BPE::builder()
            .vocab_and_merges(owned(&vocabulary), merges)
            .ignore_merges(split.whole_words)
            .byte_fallback(!split.byte_level)
            .build()
            .map_err(|error| self.refused(error))?;
        let space = if split.byte_level { json!(null) } else { replace(" ", SPACE) };
        let decoder = if split.byte_level {
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false})
        } else {
            text_decoder(0)
        };
        self.assemble(model.into(), &space, &pre_tokenizer(&split), &decoder, split.begins)
    }

    fn listed_merges(&self, vocabulary: &HashMap<&str, u32>) -> Result<Vec<(String, String)>, EngineError> {
        let mut merges = Vec::with_capacity(self.parts.merges.len());
        for (at, line) in self.parts.merges.iter().enumerate() {
            // The left part may itself begin with a space where tokens are written in characters.
            let cut = line.char_indices().skip(1).find(|(_, letter)| *letter == ' ').map(|(cut, _)| cut);
            let Some(cut) = cut else {
                return Err(self.wrong(format!("wanted two tokens in merge {at}, found {line:?}")));
            };
            let (left, right) = (&line[..cut], &line[cut + 1..]);
            let joined = format!("{left}{right}");
            for token in [left, right, &joined] {
                if !vocabulary.contains_key(token) {
                    return Err(self.wrong(format!("merge {at}, {line:?}, needs the token {token:?}, which is absent")));
                }
            }
            merges.push((left.to_string(), right.to_string()));
        }
        Ok(merges)
    }

    /// SentencePiece's BPE.
    fn scored(&self) -> Result<Tokenizer, EngineError> {
        let vocabulary = self.vocabulary();
        if self.parts.scores.is_empty() {
            return Err(self.wrong("wanted scores, one a token, found none".into()));
        }
        let merges = merges_by_score(self.parts, &vocabulary, &self.parts.scores);
        let unknown = self.unknown();
        let mut model = BPE::builder()
            .vocab_and_merges(owned(&vocabulary), merges)
            .byte_fallback(vocabulary.contains_key("<0x00>"))
            .fuse_unk(true);
        if let Some(id) = unknown {
            model = model.unk_token(self.parts.tokens[id as usize].clone());
        }
        let model = model.build().map_err(|error| self.refused(error))?;
        let prefix = self.parts.add_space_prefix.unwrap_or(true);
        let mut normalizers = self.clean_up();
        if prefix {
            normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
        }
        normalizers.push(replace(" ", SPACE));
        let normalizer = json!({"type": "Sequence", "normalizers": normalizers});
        self.assemble(model.into(), &normalizer, &json!(null), &text_decoder(usize::from(prefix)), true)
    }

    /// SentencePiece's unigram.
    fn unigram(&self) -> Result<Tokenizer, EngineError> {
        let parts = self.parts;
        if parts.scores.is_empty() {
            return Err(self.wrong("wanted scores, one a token, found none".into()));
        }
        // The names of special tokens are in the vocabulary, but no text should reach them.
        const NEVER: f64 = -1e6;
        let score = |id: usize| match parts.token_type(id) {
            TokenType::Normal | TokenType::UserDefined => f64::from(parts.scores[id]),
            TokenType::Unknown | TokenType::Control | TokenType::Unused | TokenType::Byte => NEVER,
        };
        let pieces = parts.tokens.iter().enumerate().map(|(id, token)| (token.clone(), score(id)));
        let bytes = parts.tokens.iter().any(|token| token == "<0x00>");
        let model = Unigram::from(pieces.collect(), self.unknown().map(|id| id as usize), bytes)
            .map_err(|error| self.refused(error))?;
        let prefix = parts.add_space_prefix.unwrap_or(true);
        let mut normalizers = self.clean_up();
        if prefix {
            normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
        }
        normalizers.push(replace(" ", SPACE));
        let normalizer = json!({"type": "Sequence", "normalizers": normalizers});
        let words = json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": true});
        // Where spaces are cleaned up, SentencePiece gives back none at the beginning.
        let decoder = text_decoder(if parts.remove_extra_whitespaces { 1 << 20 } else { usize::from(prefix) });
        self.assemble(model.into(), &normalizer, &words, &decoder, false)
    }

    /// The replacements that come before anything else.
    fn clean_up(&self) -> Vec<Value> {
        let mut normalizers = Vec::new();
        if !self.parts.character_map.is_empty() {
            let map = BASE64.encode(&self.parts.character_map);
            normalizers.push(json!({"type": "Precompiled", "precompiled_charsmap": map}));
        }
        if self.parts.remove_extra_whitespaces {
            // Spaces alone: tabs and line breaks stay.
            normalizers.push(json!({"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""}));
            normalizers.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
        }
        normalizers
    }

    /// The id that the file names as unknown, or that has the type.
    fn unknown(&self) -> Option<u32> {
        let parts = self.parts;
        let typed = || parts.token_types.iter().position(|&kind| kind == TokenType::Unknown).map(|id| id as u32);
        parts.unknown.or_else(typed)
    }

    /// Puts the stages around a model, and the tokens that are not cut.
    fn assemble(
        &self,
        model: ModelWrapper,
        normalizer: &Value,
        pre_tokenizer: &Value,
        decoder: &Value,
        begins: bool,
    ) -> Result<Tokenizer, EngineError> {
        let refused = |error: serde_json::Error| self.refused(error);
        let mut inner = tokenizers::Tokenizer::new(model);
        let normalizer: Option<tokenizers::NormalizerWrapper> =
            serde_json::from_value(normalizer.clone()).map_err(refused)?;
        let pre_tokenizer: Option<tokenizers::PreTokenizerWrapper> =
            serde_json::from_value(pre_tokenizer.clone()).map_err(refused)?;
        let decoder: tokenizers::DecoderWrapper = serde_json::from_value(decoder.clone()).map_err(refused)?;
        let around: Option<tokenizers::PostProcessorWrapper> =
            serde_json::from_value(self.template(begins)).map_err(refused)?;
        inner.with_normalizer(normalizer);
        inner.with_pre_tokenizer(pre_tokenizer);
        inner.with_decoder(Some(decoder));
        inner.with_post_processor(around);
        let (special, fixed) = self.added();
        inner.add_special_tokens(&special);
        inner.add_tokens(&fixed);
        Ok(Tokenizer::from_inner(inner, self.name))
    }

    /// Control tokens, which are no text, and texts that are always one token.
    fn added(&self) -> (Vec<AddedToken>, Vec<AddedToken>) {
        let (mut special, mut fixed, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
        for (id, token) in self.parts.tokens.iter().enumerate() {
            if token.is_empty() || !seen.insert(token) {
                continue;
            }
            match self.parts.token_type(id) {
                TokenType::Control | TokenType::Unknown => special.push(AddedToken::from(token.clone(), true)),
                TokenType::UserDefined => fixed.push(AddedToken::from(token.clone(), false).normalized(false)),
                TokenType::Normal | TokenType::Unused | TokenType::Byte => {}
            }
        }
        (special, fixed)
    }

    /// What is put before and behind a text.
    fn template(&self, begins: bool) -> Value {
        let parts = self.parts;
        let bos = parts.bos.filter(|_| parts.add_bos.unwrap_or(begins));
        let eos = parts.eos.filter(|_| parts.add_eos.unwrap_or(parts.model == "t5"));
        if bos.is_none() && eos.is_none() {
            return json!(null);
        }
        let special = |id: &u32| json!({"SpecialToken": {"id": parts.tokens[*id as usize], "type_id": 0}});
        let sequence = json!({"Sequence": {"id": "A", "type_id": 0}});
        let single: Vec<Value> =
            bos.iter().map(special).chain([sequence.clone()]).chain(eos.iter().map(special)).collect();
        let pair: Vec<Value> = single.iter().cloned().chain([json!({"Sequence": {"id": "B", "type_id": 0}})]).collect();
        let mut used = serde_json::Map::new();
        for id in bos.iter().chain(&eos) {
            let token = &parts.tokens[*id as usize];
            used.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
        }
        json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used})
    }
}

fn owned(vocabulary: &HashMap<&str, u32>) -> Vocab {
    vocabulary.iter().map(|(token, &id)| ((*token).to_string(), id)).collect()
}

fn replace(from: &str, to: &str) -> Value {
    json!({"type": "Replace", "pattern": {"String": from}, "content": to})
}

/// Tokens written in characters, back to text, less at most `stripped` spaces before it.
fn text_decoder(stripped: usize) -> Value {
    let mut steps = vec![replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if stripped > 0 {
        steps.push(json!({"type": "Strip", "content": " ", "start": stripped, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}

fn pre_tokenizer(split: &Split) -> Value {
    let cut = |expression: &&str| json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
    let mut steps: Vec<Value> = split.expressions.iter().map(cut).collect();
    if split.byte_level {
        steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}));
    }
    json!({"type": "Sequence", "pretokenizers": steps})
}

/// SentencePiece merges the two neighbours whose union scores highest, which is a list of merges in the order of that
/// score: each token in every way in which two others make it. (Kudo and Richardson 2018; transformers converts the
/// same way.) Of equal scores the lower id comes first, of a token's ways that with the shortest left part.
fn merges_by_score(parts: &TokenizerParts, vocabulary: &HashMap<&str, u32>, scores: &[f32]) -> Vec<(String, String)> {
    let is_text = |id: u32| {
        matches!(parts.token_type(id as usize), TokenType::Normal | TokenType::UserDefined | TokenType::Unused)
    };
    let known = |text: &str| vocabulary.get(text).is_some_and(|&id| is_text(id));
    let mut merges = Vec::new();
    for (&token, &id) in vocabulary.iter().filter(|(_, id)| is_text(**id)) {
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if known(left) && known(right) {
                merges.push((scores[id as usize], id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)).then_with(|| a.2.len().cmp(&b.2.len())));
    merges.into_iter().map(|(.., left, right)| (left.to_string(), right.to_string())).collect()
}
