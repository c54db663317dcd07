//! A byte-level BPE tokenizer (Sennrich et al. 2016; bytes as in GPT-2), trained by the `tokenizers` crate.
//!
//! The same texts and settings give the same bytes of `tokenizer.json` on every machine: the trainer breaks ties between
//! equally frequent pairs by their ids.

use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder};

use super::text::pieces;
use crate::recipe::TokenizerSection;
use crate::{Result, TrainError};

/// Stands between documents; its id is always 0.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The id of [`END_OF_TEXT`].
pub const END_OF_TEXT_ID: u32 = 0;

/// How much text one task tokenises. Small enough to spread over cores and to keep the crate's per-character
/// bookkeeping (32 bytes a byte) low.
const PIECE_BYTES: usize = 1 << 16;

/// A trained tokenizer with what training needs to know about its tokens.
pub struct TextTokenizer {
    inner: Tokenizer,
    json: String,
    /// Bytes of text that each token stands for.
    token_bytes: Vec<u32>,
}

fn refused(error: tokenizers::Error) -> TrainError {
    TrainError::Tokenizer(error.to_string().replace('\n', " "))
}

impl TextTokenizer {
    /// Learns the merges from texts, which are read once and not kept.
    ///
    /// # Errors
    /// Texts too small for the vocabulary asked for.
    pub fn train(settings: &TokenizerSection, texts: impl Iterator<Item = String> + Send) -> Result<Self> {
        let mut trainer = BpeTrainer::builder()
            .vocab_size(settings.vocab_size)
            .min_frequency(settings.min_frequency)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let byte_level = ByteLevel::new(false, true, true);
        let mut typed = TokenizerBuilder::new()
            .with_model(BPE::default())
            .with_normalizer(None::<tokenizers::NormalizerWrapper>)
            .with_pre_tokenizer(Some(byte_level))
            .with_post_processor(Some(ByteLevel::new(false, false, true)))
            .with_decoder(Some(byte_level))
            .build()
            .map_err(refused)?;
        let texts = texts.flat_map(|text| {
            let owned = |piece: &str| piece.to_owned();
            pieces(&text, PIECE_BYTES).into_iter().map(owned).collect::<Vec<_>>()
        });
        typed.train(&mut trainer, texts).map_err(refused)?;
        // The builder's concrete types would serialise the same; one JSON round trip gives the dynamic ones.
        let tokenizer = Self::from_json(&typed.to_string(true).map_err(refused)?)?;
        let found = tokenizer.vocab_size();
        if found != settings.vocab_size {
            let message = format!(
                "wanted text enough for tokenizer.vocab_size = {}, found enough for {found}: lower it or add text",
                settings.vocab_size
            );
            return Err(TrainError::Data { what: "data.train".to_owned(), message });
        }
        Ok(tokenizer)
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// Not a tokenizer, or none of ours: [`END_OF_TEXT`] must have the id 0, ids must be dense.
    pub fn from_json(json: &str) -> Result<Self> {
        let mut inner: Tokenizer = json.parse().map_err(refused)?;
        // A text that spells the separator out must not become the separator.
        inner.set_encode_special_tokens(true);
        if inner.token_to_id(END_OF_TEXT) != Some(END_OF_TEXT_ID) {
            return Err(TrainError::Tokenizer(format!("wanted {END_OF_TEXT} as token {END_OF_TEXT_ID}, found none")));
        }
        let bytes_of = |id: u32| {
            let token = inner.id_to_token(id)?;
            // In a byte-level vocabulary every character stands for one byte.
            Some(if id == END_OF_TEXT_ID { 0 } else { token.chars().count() as u32 })
        };
        let ids = 0..inner.get_vocab_size(true) as u32;
        let token_bytes = ids.map(bytes_of).collect::<Option<Vec<_>>>();
        let token_bytes = token_bytes.ok_or_else(|| TrainError::Tokenizer("ids have a gap".to_owned()))?;
        Ok(Self { inner, json: json.to_owned(), token_bytes })
    }

    /// The bytes of `tokenizer.json`.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// The bytes of `tokenizer_config.json`, with which transformers' `PreTrainedTokenizerFast` loads the other.
    pub fn config_json(&self, context: usize) -> String {
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": null,
            "pad_token": null,
            "add_prefix_space": false,
            "clean_up_tokenization_spaces": false,
            "model_max_length": context,
        });
        format!("{config:#}\n")
    }

    /// Number of tokens; ids run from 0 to one less.
    pub fn vocab_size(&self) -> usize {
        self.token_bytes.len()
    }

    /// Bytes of text that each token stands for; 0 for [`END_OF_TEXT`].
    pub fn token_bytes(&self) -> &[u32] {
        &self.token_bytes
    }

    /// The tokens of a text, cut into pieces over the cores.
    ///
    /// # Errors
    /// The `tokenizers` crate's.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encodings = self.inner.encode_batch_fast(pieces(text, PIECE_BYTES), false).map_err(refused)?;
        Ok(encodings.iter().flat_map(|encoding| encoding.get_ids().iter().copied()).collect())
    }

    /// The tokens of several texts, each by itself, cut into pieces over the cores.
    ///
    /// # Errors
    /// The `tokenizers` crate's.
    pub fn encode_all(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        let cut = texts.iter().map(|text| pieces(text, PIECE_BYTES)).collect::<Vec<_>>();
        let encodings = self.inner.encode_batch_fast(cut.concat(), false).map_err(refused)?;
        let mut encodings = encodings.iter();
        let mut join = |count: usize| {
            encodings.by_ref().take(count).flat_map(|encoding| encoding.get_ids().iter().copied()).collect()
        };
        Ok(cut.iter().map(|pieces| join(pieces.len())).collect())
    }

    /// The text of some tokens.
    ///
    /// # Errors
    /// The `tokenizers` crate's.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents() -> Vec<String> {
        let text =
            "the cat sat on the mat, the dog on the log; then the hen and the men\n  ran: \u{e9}t\u{e9} \u{1f600}\n\n";
        (0..3).map(|at| text.repeat(20 + at)).collect()
    }

    fn trained() -> TextTokenizer {
        TextTokenizer::train(&TokenizerSection { vocab_size: 290, min_frequency: 2 }, documents().into_iter()).unwrap()
    }

    #[test]
    fn the_same_texts_give_the_same_bytes() {
        let (first, second) = (trained(), trained());
        assert_eq!(first.json(), second.json());
        assert_eq!(first.vocab_size(), 290);
    }

    #[test]
    fn encode_decode_and_bytes_agree() {
        let tokenizer = trained();
        for text in ["the cat", " \n\n x\ty", "caf\u{e9} \u{1f600}", "<|endoftext|>", ""] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
            assert!(!ids.contains(&END_OF_TEXT_ID), "a text must not spell the separator");
            assert_eq!(tokenizer.encode_all(&["the", text, ""]).unwrap()[1], ids);
            let bytes = ids.iter().map(|&id| tokenizer.token_bytes()[id as usize] as usize).sum::<usize>();
            assert_eq!(bytes, text.len());
        }
    }

    /// Cutting a text for the cores changes no token.
    #[test]
    fn pieces_give_the_tokens_of_the_whole() {
        let tokenizer = trained();
        let text = "a b\nc\n\n d\n\te\nthe end \nof it\n\n\nall\n".repeat(50);
        let whole = tokenizer.inner.encode(text.as_str(), false).unwrap().get_ids().to_vec();
        for wanted in [1, 7, 64] {
            let cut = pieces(&text, wanted);
            assert!(cut.len() > 10);
            let joined = cut.iter().flat_map(|piece| tokenizer.inner.encode(*piece, false).unwrap().get_ids().to_vec());
            assert_eq!(joined.collect::<Vec<_>>(), whole);
        }
    }

    #[test]
    fn a_vocabulary_beyond_the_text_is_refused() {
        let settings = TokenizerSection { vocab_size: 5000, min_frequency: 2 };
        let error =
            TextTokenizer::train(&settings, documents().into_iter()).err().expect("too little text").to_string();
        assert!(error.starts_with("data.train: wanted text enough for tokenizer.vocab_size = 5000, found"), "{error}");
    }

    #[test]
    fn a_foreign_tokenizer_is_refused() {
        assert!(TextTokenizer::from_json("{}").is_err());
        let renamed = trained().json().replace(END_OF_TEXT, "<eos>");
        let error = TextTokenizer::from_json(&renamed).err().expect("no separator").to_string();
        assert_eq!(error, "tokenizer: wanted <|endoftext|> as token 0, found none");
    }
}
