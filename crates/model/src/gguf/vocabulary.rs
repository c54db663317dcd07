//! A byte-level BPE tokenizer (`tokenizer.json`) as GGUF metadata.

use super::write::{MetadataToWrite, ValueToWrite};
use crate::{ModelConfig, ModelError};
use serde_json::Value;
use std::collections::BTreeMap;

/// The name that stands in errors.
const FILE: &str = "tokenizer.json";

/// llama.cpp's kinds of tokens (`enum llama_token_type`).
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Patterns that split text before merges, by a part that no other has, and llama.cpp's names for them
/// (`llama-vocab.cpp`).
const SPLITS: [(&str, &str); 2] = [(r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}|", "qwen2")];

/// The fields of a vocabulary; without a tokenizer, of a file that takes token ids only.
pub(super) fn vocabulary_metadata(
    tokenizer: Option<&[u8]>,
    config: &ModelConfig,
) -> Result<Vec<MetadataToWrite>, ModelError> {
    let text = |key: &str, value: &str| (format!("tokenizer.ggml.{key}"), ValueToWrite::Text(value.into()));
    let Some(bytes) = tokenizer else { return Ok(vec![text("model", "no_vocab")]) };
    let json: Value =
        serde_json::from_slice(bytes).map_err(|error| ModelError::file(FILE, format!("wanted JSON: {error}")))?;
    let model = &json["model"];
    let byte_level = uses(&json["pre_tokenizer"], "ByteLevel");
    if model["type"] != "BPE" || model["byte_fallback"] == true || !byte_level {
        let message = format!("wanted byte-level BPE, found {} {}", model["type"], json["pre_tokenizer"]["type"]);
        return Err(ModelError::config(FILE, "model", message));
    }
    let (tokens, kinds) = read_tokens(&json, config.vocab_size)?;
    let mut all = vec![text("model", "gpt2"), text("pre", pre_tokenizer(&json["pre_tokenizer"])?)];
    let mut push = |key: &str, value: ValueToWrite| all.push((format!("tokenizer.ggml.{key}"), value));
    push("tokens", ValueToWrite::Texts(tokens));
    push("token_type", ValueToWrite::I32s(kinds));
    push("merges", ValueToWrite::Texts(read_merges(model)?));
    if let Some(bos) = config.bos_token {
        push("bos_token_id", ValueToWrite::U32(bos));
    }
    if let Some(&eos) = config.eos_tokens.first() {
        push("eos_token_id", ValueToWrite::U32(eos));
    }
    if let Some(&end_of_turn) = config.eos_tokens.get(1) {
        push("eot_token_id", ValueToWrite::U32(end_of_turn));
    }
    push("add_bos_token", ValueToWrite::Bool(begins_with_token(&json["post_processor"])));
    push("add_space_prefix", ValueToWrite::Bool(false));
    Ok(all)
}

/// The steps of a pre-tokenizer or post-processor: itself, or those of a sequence.
fn steps(value: &Value) -> Vec<&Value> {
    let inner = value.get("pretokenizers").or_else(|| value.get("processors")).and_then(Value::as_array);
    inner.map_or_else(|| vec![value], |steps| steps.iter().collect())
}

fn uses(value: &Value, kind: &str) -> bool {
    steps(value).iter().any(|step| step["type"] == kind)
}

/// Whether a template puts a token of its own before the text.
fn begins_with_token(post_processor: &Value) -> bool {
    steps(post_processor).iter().any(|step| step["single"][0].get("SpecialToken").is_some())
}

/// llama.cpp's name for the way that text is split before merges.
fn pre_tokenizer(value: &Value) -> Result<&'static str, ModelError> {
    let steps = steps(value);
    let step = |kind: &str| steps.iter().find(|step| step["type"] == kind);
    let splits_alone = step("ByteLevel").is_some_and(|step| step["use_regex"] != false);
    if let Some(split) = step("Split") {
        let pattern = split["pattern"]["Regex"].as_str().unwrap_or_default();
        let known = SPLITS.iter().find(|(part, _)| pattern.contains(part));
        if let Some((_, name)) = known.filter(|_| !splits_alone) {
            return Ok(name);
        }
    } else if splits_alone && step("Digits").is_some_and(|digits| digits["individual_digits"] == true) {
        return Ok("smollm");
    } else if splits_alone && steps.len() == 1 {
        return Ok("gpt-2");
    }
    let kinds: Vec<String> = steps.iter().map(|step| step["type"].to_string()).collect();
    let message = format!("llama.cpp has no name for the pre-tokenizer {}", kinds.join(", "));
    Err(ModelError::config(FILE, "pre_tokenizer", message))
}

/// The tokens by id, and their kinds; ids without a token are filled, up to `vocab_size`.
fn read_tokens(json: &Value, vocab_size: usize) -> Result<(Vec<String>, Vec<i32>), ModelError> {
    let mut tokens: BTreeMap<u64, (&str, i32)> = BTreeMap::new();
    let vocabulary = json["model"]["vocab"].as_object();
    let Some(vocabulary) = vocabulary else {
        return Err(ModelError::config(FILE, "model.vocab", "wanted an object of tokens and ids"));
    };
    let wrong = |token: &str, id: &Value| {
        let message = format!("wanted an id below the model's vocabulary of {vocab_size} for {token:?}, found {id}");
        ModelError::config(FILE, "vocab", message)
    };
    let known = |id: &Value| id.as_u64().filter(|&id| id < vocab_size as u64);
    for (token, id) in vocabulary {
        tokens.insert(known(id).ok_or_else(|| wrong(token, id))?, (token, NORMAL));
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let token = added["content"].as_str().unwrap_or_default();
        let id = known(&added["id"]).ok_or_else(|| wrong(token, &added["id"]))?;
        tokens.insert(id, (token, if added["special"] == true { CONTROL } else { USER_DEFINED }));
    }
    let all = (0..vocab_size as u64).map(|id| match tokens.get(&id) {
        Some(&(token, kind)) => (token.to_string(), kind),
        None => (format!("[PAD{id}]"), UNUSED),
    });
    Ok(all.unzip())
}

/// The merges, each as two tokens with a space between.
fn read_merges(model: &Value) -> Result<Vec<String>, ModelError> {
    let merge = |merge: &Value| match merge {
        Value::String(pair) => Some(pair.clone()),
        Value::Array(pair) => match &pair[..] {
            [Value::String(left), Value::String(right)] => Some(format!("{left} {right}")),
            _ => None,
        },
        _ => None,
    };
    let merges = model["merges"].as_array().map(|merges| merges.iter().map(merge).collect());
    let merges: Option<Vec<String>> = merges.unwrap_or_default();
    merges.ok_or_else(|| ModelError::config(FILE, "model.merges", "wanted pairs of tokens"))
}
