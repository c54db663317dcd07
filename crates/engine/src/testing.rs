//! Small tokenizers for the tests of this crate.

use crate::Tokenizer;

/// The 256 byte tokens of GPT-2's alphabet, in byte order, and an end token 256.
pub fn byte_level() -> Tokenizer {
    let printable = |b: &u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut spare = 256..;
    let letters = (0..256u32).map(|b| if printable(&b) { b } else { spare.next().expect("endless") });
    let vocab: serde_json::Map<String, serde_json::Value> = letters
        .enumerate()
        .map(|(id, letter)| (char::from_u32(letter).expect("a letter").to_string(), id.into()))
        .collect();
    tokenizer(
        &serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        &serde_json::json!({"type": "BPE", "vocab": vocab, "merges": []}),
        256,
    )
}

/// Sentencepiece's way: 256 tokens `<0x00>` and so on.
pub fn byte_fallback() -> Tokenizer {
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..256).map(|byte| (format!("<0x{byte:02X}>"), byte.into())).collect();
    tokenizer(
        &serde_json::json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}),
        &serde_json::json!({"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true}),
        256,
    )
}

fn tokenizer(decoder: &serde_json::Value, model: &serde_json::Value, end: u32) -> Tokenizer {
    let end = serde_json::json!({"id": end, "content": "<|end|>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true});
    let pre = if decoder["type"] == "ByteLevel" { decoder.clone() } else { serde_json::Value::Null };
    let file = serde_json::json!({"version": "1.0", "added_tokens": [end], "pre_tokenizer": pre,
        "decoder": decoder, "model": model});
    Tokenizer::from_bytes(file.to_string().as_bytes(), "test").expect("a tokenizer")
}
