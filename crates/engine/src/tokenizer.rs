//! Text to token ids and back, through the `tokenizers` crate, with an incremental decoder.
//!
//! Whatever a model ships becomes one `tokenizers::Tokenizer`: `tokenizer.json` as it is, the metadata of a GGUF file
//! SentencePiece's models and tiktoken's ranks through [`TokenizerParts`].

mod bytes;
mod folder;
mod parts;
mod sentencepiece;
mod splits;
mod tiktoken;

pub use parts::{TokenType, TokenizerParts};

use std::path::Path;

use crate::EngineError;

/// A tokenizer and the name of the file it came from, for messages.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    name: String,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`EngineError::TokenizerFile`] if it cannot be read, [`EngineError::TokenizerFormat`] if it is something else.
    pub fn from_file(path: &Path) -> Result<Self, EngineError> {
        let bytes =
            std::fs::read(path).map_err(|source| EngineError::TokenizerFile { path: path.to_path_buf(), source })?;
        Self::from_bytes(&bytes, &path.display().to_string())
    }

    /// Takes the bytes of a `tokenizer.json`; `name` stands in messages.
    ///
    /// # Errors
    /// [`EngineError::TokenizerFormat`] if they are something else.
    pub fn from_bytes(bytes: &[u8], name: &str) -> Result<Self, EngineError> {
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| EngineError::TokenizerFormat {
            name: name.to_string(),
            reason: one_line(&error.to_string()),
        })?;
        Ok(Self { inner, name: name.to_string() })
    }

    pub(crate) fn from_inner(inner: tokenizers::Tokenizer, name: &str) -> Self {
        Self { inner, name: name.to_string() }
    }

    /// The tokenizer as the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`EngineError::TokenizerFormat`] if it holds what cannot be written.
    pub fn to_json(&self) -> Result<String, EngineError> {
        self.inner.to_string(false).map_err(|error| EngineError::TokenizerFormat {
            name: self.name.clone(),
            reason: one_line(&error.to_string()),
        })
    }

    /// The same tokenizer for text in which the names of special tokens are but letters, as strangers' text should be
    /// read. Texts that are always one token stay so.
    #[must_use]
    pub fn literal(&self) -> Self {
        let mut inner = self.inner.clone();
        inner.set_encode_special_tokens(true);
        Self { inner, name: self.name.clone() }
    }

    /// The id of a token by its name in the vocabulary.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(name)
    }

    /// The number of ids, added tokens included.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Checks that a model of `vocabulary` tokens has all that this tokenizer knows. (It may have more.)
    ///
    /// # Errors
    /// [`EngineError::TokenizerSource`] with the last token that the model lacks.
    pub fn check_fits(&self, vocabulary: usize) -> Result<(), EngineError> {
        // Ids without added tokens have no gaps in any model that we know of; to look at each would take longer than
        // mapping a model does.
        let last = self.inner.get_vocab_size(false).checked_sub(1).map(|last| last as u32);
        let highest = self.inner.get_added_tokens_decoder().into_keys().chain(last).max();
        let Some(id) = highest.filter(|&id| id as usize >= vocabulary) else { return Ok(()) };
        let token = self.inner.id_to_token(id).unwrap_or_default();
        let reason = format!("wanted ids below the model's vocabulary of {vocabulary}, found {id} for {token:?}");
        Err(EngineError::TokenizerSource { name: self.name.clone(), reason })
    }

    /// The file it came from.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The ids of a text, with the special tokens that the tokenizer puts around a prompt.
    ///
    /// # Errors
    /// [`EngineError::Tokenize`] with the tokenizer's own words.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        let encoding = self.inner.encode_fast(text, true);
        Ok(encoding.map_err(|error| self.failed("encode the text", &error))?.get_ids().to_vec())
    }

    /// The ids of a text that brings its special tokens itself, like a rendered chat: none are put around it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        let encoding = self.inner.encode_fast(text, false);
        Ok(encoding.map_err(|error| self.failed("encode the text", &error))?.get_ids().to_vec())
    }

    /// As [`Tokenizer::encode`], with the byte of the text at which each token ends; 0 for a special token.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_ends(&self, text: &str) -> Result<(Vec<u32>, Vec<usize>), EngineError> {
        let encoding = self.inner.encode(text, true).map_err(|error| self.failed("encode the text", &error))?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().iter().map(|offsets| offsets.1).collect()))
    }

    /// The text of ids, special tokens left out; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`EngineError::Tokenize`] with the tokenizer's own words.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, EngineError> {
        self.decode_parts(tokens, true)
    }

    /// As [`Tokenizer::decode`], special tokens by their names.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn decode_with_special(&self, tokens: &[u32]) -> Result<String, EngineError> {
        self.decode_parts(tokens, false)
    }

    fn decode_parts(&self, tokens: &[u32], skip_special: bool) -> Result<String, EngineError> {
        self.inner.decode(tokens, skip_special).map_err(|error| self.failed("decode the tokens", &error))
    }

    /// One token as a reader should see it: its text, or its name in the vocabulary if it is a special token or a
    /// fragment of a character, or its number if it has neither.
    pub fn show(&self, token: u32) -> String {
        let name = || self.inner.id_to_token(token).unwrap_or_else(|| format!("#{token}"));
        match self.inner.decode(&[token], true) {
            Ok(text) if !text.is_empty() && !text.contains(char::REPLACEMENT_CHARACTER) => text,
            _ => name(),
        }
    }

    /// A decoder for ids that arrive one by one.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, special: false, recent: Vec::new(), context: 0, known: String::new() }
    }

    fn failed(&self, action: &'static str, error: &tokenizers::Error) -> EngineError {
        EngineError::Tokenize { name: self.name.clone(), action, reason: one_line(&error.to_string()) }
    }
}

/// A message on one line, whatever a library put into it.
fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A character has at most four bytes, so at most three tokens wait for its end.
const UNFINISHED_TOKENS: usize = 3;

/// After this many tokens without a clean border the bytes are taken for no UTF-8 at all.
const LONGEST_WAIT: usize = 16;

/// Text piece by piece. A piece never ends inside a character: bytes wait until theirs is whole.
///
/// A token's text may depend on its neighbours (spaces, bytes of one character), so the recent tokens are decoded
/// together and what they were already known to say is cut off.
#[derive(Clone, Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    /// Whether special tokens are text.
    special: bool,
    /// The tokens decoded together: those of the last piece as context, then those that wait.
    recent: Vec<u32>,
    /// How many of them are context.
    context: usize,
    /// The beginning of their text that has been given out, or belongs to what was.
    known: String,
}

impl TextStream<'_> {
    /// Gives special tokens by their names, instead of leaving them out; to be asked before anything else.
    #[must_use]
    pub fn with_special(mut self) -> Self {
        self.special = true;
        self
    }

    /// Tells the decoder what stands before the text, which it will not give out again.
    ///
    /// # Errors
    /// [`EngineError::Tokenize`] with the tokenizer's own words.
    pub fn after(mut self, context: &[u32]) -> Result<Self, EngineError> {
        self.recent = context[context.len().saturating_sub(2 * UNFINISHED_TOKENS)..].to_vec();
        self.context = self.recent.len();
        self.known = self.decode()?;
        Ok(self)
    }

    /// Takes a token and returns the text that became certain, possibly none.
    ///
    /// # Errors
    /// [`EngineError::Tokenize`] with the tokenizer's own words.
    pub fn push(&mut self, token: u32) -> Result<String, EngineError> {
        self.recent.push(token);
        let text = self.decode()?;
        let settled = settled_length(&text);
        // A decoder that takes back what it has said (byte fallback does, inside a character) gives nothing for now.
        let new = text[..settled].strip_prefix(self.known.as_str()).unwrap_or_default().to_string();
        if settled == text.len() {
            self.recent.drain(..self.context);
            self.context = self.recent.len();
            self.known = self.decode()?;
        } else if self.recent.len() - self.context > LONGEST_WAIT {
            self.recent.drain(..self.recent.len() - UNFINISHED_TOKENS);
            self.context = 0;
            let rest = self.decode()?;
            self.known = rest[..settled_length(&rest)].to_string();
        } else {
            self.known.push_str(&new);
        }
        Ok(new)
    }

    fn decode(&self) -> Result<String, EngineError> {
        self.tokenizer.decode_parts(&self.recent, !self.special)
    }
}

/// Bytes of `text` before replacement characters that the next tokens may still turn into a character.
fn settled_length(text: &str) -> usize {
    let mut settled = text;
    for _ in 0..UNFINISHED_TOKENS {
        settled = settled.strip_suffix(char::REPLACEMENT_CHARACTER).unwrap_or(settled);
    }
    settled.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{byte_fallback, byte_level};
    use proptest::prelude::*;

    fn stream_of(tokenizer: &Tokenizer, tokens: &[u32]) -> Vec<String> {
        let mut stream = tokenizer.stream();
        tokens.iter().map(|&token| stream.push(token).expect("decodes")).collect()
    }

    fn bytes(text: &[u8]) -> Vec<u32> {
        text.iter().map(|&byte| u32::from(byte)).collect()
    }

    #[test]
    fn a_character_comes_whole() {
        for tokenizer in [byte_level(), byte_fallback()] {
            let pieces = stream_of(&tokenizer, &bytes("aé日🙂日日.".as_bytes()));
            let shown: Vec<&str> = pieces.iter().map(String::as_str).filter(|piece| !piece.is_empty()).collect();
            assert_eq!(shown, ["a", "é", "日", "🙂", "日", "日", "."]);
            assert_eq!(
                stream_of(&tokenizer, &bytes(&"🙂".as_bytes()[..3])).concat(),
                "",
                "half a character is no text"
            );
        }
    }

    #[test]
    fn bytes_that_are_no_text_become_replacement_characters_and_do_not_stop_the_stream() {
        let mut text = vec![0xFFu8; 40];
        text.extend("日 after".as_bytes());
        let shown = stream_of(&byte_level(), &bytes(&text)).concat();
        assert_eq!(shown, String::from_utf8_lossy(&text));
    }

    #[test]
    fn special_tokens_are_shown_by_name_but_are_no_text() {
        let tokenizer = byte_level();
        assert_eq!(tokenizer.vocabulary(), 257);
        assert_eq!(tokenizer.encode_with_ends("aé").unwrap(), (vec![0x61, 0xC3, 0xA9], vec![1, 3, 3]));
        assert_eq!(stream_of(&tokenizer, &[104, 256, 105]).concat(), "hi");
        assert_eq!(
            (tokenizer.show(256), tokenizer.show(104), tokenizer.show(9999)),
            ("<|end|>".into(), "h".into(), "#9999".into())
        );
        assert_eq!(tokenizer.show(0xC3), "Ã", "a fragment by its name");
    }

    #[test]
    fn a_prompt_is_context_and_is_not_repeated() {
        let tokenizer = byte_level();
        let prompt = tokenizer.encode("Ünder 日").unwrap();
        let mut stream = tokenizer.stream().after(&prompt).unwrap();
        let pieces: Vec<String> = bytes("é!".as_bytes()).iter().map(|&token| stream.push(token).unwrap()).collect();
        assert_eq!(pieces, ["", "é", "!"]);
    }

    #[test]
    fn errors_name_the_file() {
        let missing = Tokenizer::from_file(Path::new("/nowhere/tokenizer.json")).unwrap_err().to_string();
        assert!(missing.starts_with("/nowhere/tokenizer.json: cannot read the tokenizer"), "{missing}");
        let damaged = Tokenizer::from_bytes(b"{\"version\": ", "here.json").unwrap_err().to_string();
        assert!(damaged.starts_with("here.json: not a tokenizer.json") && !damaged.contains('\n'), "{damaged}");
    }

    proptest! {
        #[test]
        fn pieces_join_to_the_whole_text(text in "\\PC{0,40}") {
            prop_assume!(!text.contains(char::REPLACEMENT_CHARACTER));
            for tokenizer in [byte_level(), byte_fallback()] {
                let pieces = stream_of(&tokenizer, &bytes(text.as_bytes()));
                prop_assert_eq!(&pieces.concat(), &text);
            }
        }

        #[test]
        fn any_bytes_stream_as_the_standard_library_reads_them(text in prop::collection::vec(any::<u8>(), 0..60)) {
            let shown = stream_of(&byte_level(), &bytes(&text)).concat();
            let whole = String::from_utf8_lossy(&text).into_owned();
            // Up to three unsettled characters may still wait at the end.
            prop_assert!(whole.starts_with(&shown), "{:?} of {:?}", shown, whole);
            prop_assert!(whole[shown.len()..].chars().all(|c| c == char::REPLACEMENT_CHARACTER));
        }
    }
}
