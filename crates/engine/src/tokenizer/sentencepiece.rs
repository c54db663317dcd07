//! SentencePiece's `tokenizer.model`: a protobuf message, of which the pieces, the trainer's and the normaliser's
//! settings are read (`sentencepiece_model.proto` of github.com/google/sentencepiece numbers the fields).

use super::{TokenType, TokenizerParts};
use crate::EngineError;

/// One field of a message.
#[derive(Clone, Copy, Debug)]
enum Field<'b> {
    Number(u64),
    Bytes(&'b [u8]),
    Float(f32),
    Other,
}

/// Reads a message field by field; ends at the first byte that is no protobuf.
struct Fields<'b> {
    bytes: &'b [u8],
    failed: bool,
}

impl<'b> Fields<'b> {
    fn of(bytes: &'b [u8]) -> Self {
        Self { bytes, failed: false }
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for (at, &byte) in self.bytes.iter().enumerate().take(10) {
            value |= u64::from(byte & 0x7F).checked_shl(7 * at as u32)?;
            if byte < 0x80 {
                self.bytes = &self.bytes[at + 1..];
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: usize) -> Option<&'b [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(count)?;
        self.bytes = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Field<'b>)> {
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Number(self.varint()?),
            1 => self.take(8).map(|_| Field::Other)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Float(f32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, field))
    }
}

impl<'b> Iterator for Fields<'b> {
    type Item = (u64, Field<'b>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.bytes.is_empty() || self.failed {
            return None;
        }
        let field = self.field();
        self.failed = field.is_none();
        field
    }
}

/// The parts of a model.
///
/// # Errors
/// [`EngineError::TokenizerSource`] for bytes that are no such model, or one of words or characters.
pub(super) fn parts(bytes: &[u8], name: &str) -> Result<TokenizerParts, EngineError> {
    let wrong = |reason: String| EngineError::TokenizerSource { name: name.to_string(), reason };
    // What the message's definition gives as defaults.
    let mut parts = TokenizerParts {
        model: "t5".into(),
        add_space_prefix: Some(true),
        remove_extra_whitespaces: true,
        bos: Some(1),
        eos: Some(2),
        unknown: Some(0),
        add_bos: Some(true),
        add_eos: Some(false),
        ..TokenizerParts::default()
    };
    let mut message = Fields::of(bytes);
    for (number, field) in &mut message {
        match (number, field) {
            (1, Field::Bytes(piece)) => {
                let (text, score, kind) = self::piece(piece)
                    .ok_or_else(|| wrong(format!("wanted a piece of text as token {}", parts.tokens.len())))?;
                parts.tokens.push(text);
                parts.scores.push(score);
                parts.token_types.push(kind);
            }
            (2, Field::Bytes(settings)) => trainer(settings, &mut parts).map_err(&wrong)?,
            (3, Field::Bytes(settings)) => normalizer(settings, &mut parts),
            _ => {}
        }
    }
    if message.failed || parts.tokens.is_empty() {
        return Err(wrong("wanted a SentencePiece model, found bytes that are none".into()));
    }
    let count = parts.tokens.len();
    for id in [&mut parts.bos, &mut parts.eos, &mut parts.unknown, &mut parts.padding] {
        *id = id.filter(|&id| (id as usize) < count);
    }
    Ok(parts)
}

/// Text, score and type of one piece.
fn piece(bytes: &[u8]) -> Option<(String, f32, TokenType)> {
    let (mut text, mut score, mut kind) = (None, 0.0, TokenType::Normal);
    let mut fields = Fields::of(bytes);
    for (number, field) in &mut fields {
        match (number, field) {
            (1, Field::Bytes(bytes)) => text = Some(std::str::from_utf8(bytes).ok()?.to_string()),
            (2, Field::Float(value)) => score = value,
            (3, Field::Number(value)) => kind = TokenType::from_number(i64::try_from(value).ok()?)?,
            _ => {}
        }
    }
    if fields.failed { None } else { Some((text?, score, kind)) }
}

/// Kind of model and the special ids; -1 stands for none.
fn trainer(bytes: &[u8], parts: &mut TokenizerParts) -> Result<(), String> {
    for (number, field) in Fields::of(bytes) {
        let Field::Number(value) = field else { continue };
        let id = u32::try_from(value).ok();
        match number {
            3 => {
                parts.model = match value {
                    1 => "t5".into(),
                    2 => "llama".into(),
                    other => return Err(format!("wanted a model of kind 1 (unigram) or 2 (BPE), found {other}")),
                }
            }
            40 => parts.unknown = id,
            41 => parts.bos = id,
            42 => parts.eos = id,
            43 => parts.padding = id,
            _ => {}
        }
    }
    Ok(())
}

fn normalizer(bytes: &[u8], parts: &mut TokenizerParts) {
    for (number, field) in Fields::of(bytes) {
        match (number, field) {
            (2, Field::Bytes(map)) => parts.character_map = map.to_vec(),
            (3, Field::Number(flag)) => parts.add_space_prefix = Some(flag != 0),
            (4, Field::Number(flag)) => parts.remove_extra_whitespaces = flag != 0,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(parts) = parts(&bytes, "x") {
                let _ = parts.build("x");
            }
        }
    }

    #[test]
    fn what_is_no_model_is_refused() {
        for bytes in [&b""[..], b"{}", b"\x0a\xff", &[0x0A, 3, 0x0A, 1, 0xFF]] {
            let message = parts(bytes, "here/tokenizer.model").unwrap_err().to_string();
            assert!(message.starts_with("here/tokenizer.model: unusable tokenizer: wanted a "), "{message}");
        }
    }
}
