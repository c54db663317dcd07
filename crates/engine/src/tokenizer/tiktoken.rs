//! Ranks of byte strings: tiktoken's files (a line is base64, a space and the rank) and Mistral's `tekken.json`.
//!
//! A union of lower rank is merged first, which is byte-level BPE whose merges follow the ranks.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD as BASE64;
use serde_json::Value;

use super::folder::Config;
use super::{TokenType, TokenizerParts, splits};
use crate::EngineError;

/// Whether the first line is base64 and a number.
pub(super) fn looks_like(bytes: &[u8]) -> bool {
    let line = bytes.split(|&byte| byte == b'\n').next().unwrap_or_default();
    rank(line).is_some()
}

/// The bytes and the rank of a line.
fn rank(line: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (text, rank) = std::str::from_utf8(line).ok()?.trim_end().split_once(' ')?;
    Some((BASE64.decode(text).ok()?, rank.parse().ok()?))
}

/// GPT-2's letters for bytes: printable ones for themselves, the others from U+0100 on.
fn letters(bytes: &[u8]) -> String {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let letter = |&byte: &u8| {
        let spare = (0..byte).filter(|&other| !printable(other)).count() as u32;
        if printable(byte) { char::from(byte) } else { char::from_u32(256 + spare).unwrap_or_default() }
    };
    bytes.iter().map(letter).collect()
}

/// The parts of a file of ranks. Special tokens stand in `tokenizer_config.json`; the tokenizer's class there decides
/// how text is cut: Qwen's, Kimi's, and otherwise as Llama 3 does, which is cl100k's way.
///
/// # Errors
/// [`EngineError::TokenizerSource`] names the line.
pub(super) fn parts(bytes: &[u8], config: &Config, name: &str) -> Result<TokenizerParts, EngineError> {
    let wrong = |reason: String| EngineError::TokenizerSource { name: name.to_string(), reason };
    let mut tokens = Vec::new();
    for (at, line) in bytes.split(|&byte| byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
        let Some((token, rank)) = rank(line) else {
            return Err(wrong(format!("wanted base64 and a rank on line {}", at + 1)));
        };
        if rank != tokens.len() {
            return Err(wrong(format!("wanted rank {} on line {}, found {rank}", tokens.len(), at + 1)));
        }
        tokens.push(letters(&token));
    }
    let pre = match config.class() {
        class if class.contains("QWen") || class.contains("Qwen") => "qwen2",
        class if class.contains("TikToken") => "kimi-k2",
        _ => "llama3",
    };
    let mut parts = TokenizerParts {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        tokens,
        add_bos: Some(config.flag("add_bos_token").unwrap_or(pre == "llama3")),
        add_eos: config.flag("add_eos_token"),
        ..TokenizerParts::default()
    };
    parts.extend(&config.added());
    parts.name_tokens(config);
    Ok(parts)
}

/// The first special tokens of Mistral's files that do not list them (mistral-common, version 3).
const TEKKEN_SPECIAL: [&str; 14] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "<pad>",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
];

/// The parts of a `tekken.json`: special tokens first, then the ranks.
///
/// # Errors
/// [`EngineError::TokenizerSource`] names the key.
pub(super) fn tekken(bytes: &[u8], name: &str) -> Result<TokenizerParts, EngineError> {
    let wrong = |reason: String| EngineError::TokenizerSource { name: name.to_string(), reason };
    let json: Value = serde_json::from_slice(bytes).map_err(|error| wrong(format!("wanted JSON: {error}")))?;
    let config = &json["config"];
    let size = |key: &str| {
        let value = config[key].as_u64().and_then(|value| usize::try_from(value).ok());
        value.filter(|&value| value <= 1 << 24).ok_or_else(|| wrong(format!("wanted a count as config.{key}")))
    };
    let (vocabulary, special) = (size("default_vocab_size")?, size("default_num_special_tokens")?);
    let pattern = config["pattern"].as_str().ok_or_else(|| wrong("wanted a text as config.pattern".into()))?;
    let pre =
        splits::with_expression(pattern).ok_or_else(|| wrong(format!("config.pattern is not known: {pattern}")))?;
    let mut tokens: Vec<String> = (0..special).map(|id| format!("<SPECIAL_{id}>")).collect();
    for entry in json["special_tokens"].as_array().into_iter().flatten() {
        let (rank, text) = (entry["rank"].as_u64(), entry["token_str"].as_str());
        let place = rank.and_then(|rank| tokens.get_mut(rank as usize));
        let (Some(place), Some(text)) = (place, text) else {
            return Err(wrong(format!("wanted special tokens with a text and a rank below {special}, found {entry}")));
        };
        *place = text.to_string();
    }
    if json["special_tokens"].is_null() {
        // Older files leave the first ones to the reader.
        for (place, text) in tokens.iter_mut().zip(TEKKEN_SPECIAL) {
            *place = text.to_string();
        }
    }
    let mut token_types = vec![TokenType::Control; special];
    let entries = json["vocab"].as_array().ok_or_else(|| wrong("wanted a list as vocab".into()))?;
    for (rank, entry) in entries.iter().take(vocabulary.saturating_sub(special)).enumerate() {
        let bytes = entry["token_bytes"].as_str().and_then(|text| BASE64.decode(text).ok());
        let Some(bytes) = bytes.filter(|_| entry["rank"].as_u64() == Some(rank as u64)) else {
            return Err(wrong(format!("wanted rank {rank} with token_bytes in base64 in vocab")));
        };
        tokens.push(letters(&bytes));
        token_types.push(TokenType::Normal);
    }
    let find = |text: &str| tokens.iter().position(|token| token == text).map(|id| id as u32);
    Ok(TokenizerParts {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        bos: find("<s>"),
        eos: find("</s>"),
        unknown: find("<unk>"),
        add_bos: Some(true),
        tokens,
        token_types,
        ..TokenizerParts::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_the_letters_of_gpt2() {
        assert_eq!(letters(" a\n\u{7f}".as_bytes()), "ĠaĊġ");
        assert_eq!(letters(&[0, 0xAD, 0xFF]), "ĀŃÿ");
    }

    #[test]
    fn a_line_is_base64_and_a_rank() {
        assert!(looks_like(b"IQ== 0\nIg== 1\n"));
        assert!(!looks_like(b"\x0a\x07<unk>"));
        assert!(!looks_like(b""));
    }
}
