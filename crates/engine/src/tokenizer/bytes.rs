//! The bytes that each token stands for.

use std::collections::HashMap;

use serde_json::Value;

use super::Tokenizer;

impl Tokenizer {
    /// The bytes of every id in turn; none for special tokens and ids without a token. A token that begins a text, where
    /// some decoders leave out a space, is given as it stands inside of one.
    pub fn token_bytes(&self) -> Vec<Vec<u8>> {
        let decoder = serde_json::to_value(self.inner.get_decoder()).unwrap_or(Value::Null);
        let byte_level = mentions(&decoder, "ByteLevel").then(byte_alphabet);
        let space = if mentions(&decoder, "Metaspace") { Some('\u{2581}') } else { replaced_by_space(&decoder) };
        let added = self.inner.get_added_tokens_decoder();
        let vocabulary = self.inner.get_vocab(true);
        let length = vocabulary.values().max().map_or(0, |&last| last as usize + 1);
        let mut all = vec![Vec::new(); length];
        for (name, id) in vocabulary {
            all[id as usize] = match added.get(&id) {
                Some(token) if token.special => Vec::new(),
                Some(token) => token.content.clone().into_bytes(),
                None => match (&byte_level, byte_name(&name)) {
                    (Some(alphabet), _) => name.chars().filter_map(|letter| alphabet.get(&letter).copied()).collect(),
                    (None, Some(byte)) => vec![byte],
                    (None, None) => space.map_or(name.clone(), |space| name.replace(space, " ")).into_bytes(),
                },
            };
        }
        all
    }

    /// Special tokens: id and name, by id.
    pub fn special_tokens(&self) -> Vec<(u32, String)> {
        let added = self.inner.get_added_tokens_decoder();
        let mut special: Vec<(u32, String)> =
            added.into_iter().filter(|(_, token)| token.special).map(|(id, token)| (id, token.content)).collect();
        special.sort();
        special
    }
}

/// Whether a decoder, or one of its parts, is of a type.
fn mentions(decoder: &Value, kind: &str) -> bool {
    let parts = decoder["decoders"].as_array();
    decoder["type"] == kind || parts.is_some_and(|parts| parts.iter().any(|part| mentions(part, kind)))
}

/// What a `Replace` among the decoders turns into a space.
fn replaced_by_space(decoder: &Value) -> Option<char> {
    if decoder["type"] == "Replace" && decoder["content"] == " " {
        let mut letters = decoder["pattern"]["String"].as_str()?.chars();
        return letters.next().filter(|_| letters.next().is_none());
    }
    decoder["decoders"].as_array()?.iter().find_map(replaced_by_space)
}

/// The byte of a name like `<0x0A>`.
fn byte_name(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// GPT-2's alphabet: printable bytes are themselves, the others letters from U+0100 on.
fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut spare = (256u32..).filter_map(char::from_u32);
    (0..=255u8)
        .filter_map(|byte| Some((if printable(byte) { char::from(byte) } else { spare.next()? }, byte)))
        .collect()
}

#[cfg(test)]
mod tests {
    use crate::testing::{byte_fallback, byte_level};

    #[test]
    fn every_byte_has_its_token() {
        for tokenizer in [byte_level(), byte_fallback()] {
            let bytes = tokenizer.token_bytes();
            assert_eq!(bytes.len(), 257);
            assert!((0..=255u8).all(|byte| bytes[usize::from(byte)] == [byte]));
            assert_eq!(bytes[256], [0u8; 0], "the special token has none");
            assert_eq!(tokenizer.special_tokens(), [(256, "<|end|>".to_string())]);
        }
    }
}
