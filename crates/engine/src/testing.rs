//! Small tokenizers for the tests of this crate.

use crate::Tokenizer;
use moebius_model::{Ffn, Model, UniformDecoder};

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

/// A model of the byte tokenizer's 257 tokens with a context of `max_positions`.
pub fn small_model(max_positions: usize) -> Model {
    let config = UniformDecoder {
        family: "mixtral",
        vocab_size: 257,
        hidden: 32,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 8,
        max_positions,
        ffn: Ffn::moe_of(4, 2, 24, true),
        ..UniformDecoder::default()
    }
    .config();
    let mut model = Model::new(&config, 3).expect("a sound configuration");
    // Large weights, so that the model has opinions.
    for param in model.params_mut().into_iter().filter(|param| !param.name().ends_with("norm")) {
        param.update(|weights| weights.iter_mut().for_each(|weight| *weight *= 12.0));
    }
    model
}
