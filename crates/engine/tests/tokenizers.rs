//! Tokenizers of every source give the ids of the programs that they come from: SentencePiece, tiktoken, llama.cpp.
//! `fixtures/make.py` has asked those programs.

use std::path::{Path, PathBuf};

use moebius_engine::{TokenType, Tokenizer, TokenizerParts};
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).expect("the fixture")).expect("JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(|text| text.as_str().expect("a text").to_string()).collect()
}

fn parts(json: &Value, pre: Option<&str>) -> TokenizerParts {
    let id = |key: &str| json[key].as_u64().map(|id| id as u32);
    TokenizerParts {
        model: json["model"].as_str().expect("a kind").to_string(),
        pre: pre.map(str::to_string),
        tokens: texts(&json["tokens"]),
        scores: json["scores"].as_array().into_iter().flatten().map(|v| v.as_f64().expect("a score") as f32).collect(),
        token_types: json["token_types"]
            .as_array()
            .expect("types")
            .iter()
            .map(|number| TokenType::from_number(number.as_i64().expect("a number")).expect("a type"))
            .collect(),
        merges: texts(&json["merges"]),
        bos: id("bos"),
        eos: id("eos"),
        unknown: id("unk"),
        ..TokenizerParts::default()
    }
}

/// Every text of an object gives its ids, special tokens left aside.
fn agrees(tokenizer: &Tokenizer, expected: &Value, what: &str) {
    let literal = tokenizer.literal();
    let cases = expected.as_object().expect("texts");
    assert!(cases.len() > 10, "{what}");
    for (text, wanted) in cases {
        assert_eq!(literal.encode_bare(text).unwrap(), ids(wanted), "{what}: {text:?}");
    }
}

#[test]
fn parts_of_gguf_files_give_the_ids_of_llama_cpp() {
    let fixture = json("gguf.json");
    let pres = fixture["pre"].as_object().expect("pre-tokenizers");
    assert!(pres.len() > 20);
    for (pre, expected) in pres {
        let source = if pre == "gemma4" { &fixture["characters"] } else { &fixture["gpt2"] };
        agrees(&parts(source, Some(pre)).build("test.gguf").unwrap(), expected, pre);
    }
    agrees(&parts(&fixture["llama"], None).build("test.gguf").unwrap(), &fixture["scored"], "llama");
}

#[test]
fn sentencepiece_models_give_its_ids_and_texts() {
    let expected = json("sentencepiece.json");
    for (kind, cases) in expected.as_object().expect("kinds") {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(fixture(&format!("{kind}.model")), folder.path().join("tokenizer.model")).unwrap();
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        let literal = tokenizer.literal();
        for case in cases.as_array().expect("cases") {
            let text = case["text"].as_str().expect("a text");
            let wanted = ids(&case["ids"]);
            if kind == "unigram" && text.contains("<s>") {
                // The names of special tokens are in the crate's unigram vocabulary, and cheaper than bytes.
                continue;
            }
            assert_eq!(literal.encode_bare(text).unwrap(), wanted, "{kind}: {text:?}");
            assert_eq!(tokenizer.decode(&wanted).unwrap(), case["decoded"], "{kind}: {text:?}");
        }
        let begins = tokenizer.encode("Hello").unwrap();
        assert_eq!(begins[0], 1, "bos stands before a text");
        assert_eq!(begins[1..], tokenizer.encode_bare("Hello").unwrap());
    }
}

#[test]
fn rank_files_give_the_ids_of_tiktoken() {
    let expected = json("ranks.json");
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    write("tokenizer.model", &std::fs::read(fixture("ranks.tiktoken")).unwrap());
    write("tokenizer_config.json", expected["tokenizer_config"].to_string().as_bytes());
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    let literal = tokenizer.literal();
    for case in expected["cases"].as_array().expect("cases") {
        let text = case["text"].as_str().expect("a text");
        assert_eq!(literal.encode_bare(text).unwrap(), ids(&case["ids"]), "{text:?}");
        assert_eq!(tokenizer.decode(&ids(&case["ids"])).unwrap(), text);
    }
    let bos = expected["bos"].as_u64().unwrap() as u32;
    assert_eq!(tokenizer.encode("a").unwrap()[0], bos);
    assert_eq!(tokenizer.encode_bare("<|begin|><|end|>").unwrap(), [bos, bos + 2]);
    assert!(literal.encode_bare("<|end|>").unwrap().len() > 1, "a stranger's text holds no special token");
}

#[test]
fn a_folder_without_a_tokenizer_says_what_was_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let message = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
    for part in [&folder.path().display().to_string(), "tokenizer.json", "tokenizer.model", "tiktoken.model"] {
        assert!(message.contains(part), "{message}");
    }
    std::fs::write(folder.path().join("tokenizer.model"), "no model").unwrap();
    let message = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
    assert!(message.contains("tokenizer.model: unusable tokenizer: wanted a SentencePiece model"), "{message}");
}

#[test]
fn parts_that_do_not_fit_are_named() {
    let fixture = json("gguf.json");
    let whole = || parts(&fixture["gpt2"], Some("gpt-2"));
    let refuse = |parts: TokenizerParts, wanted: &str| {
        let message = parts.build("a.gguf").unwrap_err().to_string();
        assert!(message.starts_with("a.gguf: unusable tokenizer: ") && message.contains(wanted), "{message}");
    };
    refuse(TokenizerParts { tokens: vec![], ..whole() }, "wanted tokens, found none");
    refuse(
        TokenizerParts { model: "bert".into(), ..whole() },
        "wanted the tokenizer model llama, gpt2, gemma4 or t5, found `bert`",
    );
    refuse(TokenizerParts { pre: Some("mine".into()), ..whole() }, "the pre-tokenizer `mine` is not known");
    refuse(TokenizerParts { bos: Some(1 << 20), ..whole() }, "wanted a bos token below");
    refuse(TokenizerParts { token_types: vec![TokenType::Normal], ..whole() }, "token types, one a token, found 1");
    refuse(TokenizerParts { merges: vec!["ab".into()], ..whole() }, "wanted two tokens in merge 0, found \"ab\"");
    refuse(TokenizerParts { merges: vec!["日 本".into()], ..whole() }, "needs the token \"日\", which is absent");
    refuse(TokenizerParts { model: "llama".into(), ..whole() }, "wanted scores");
    let scores = vec![f32::NAN; whole().tokens.len()];
    refuse(TokenizerParts { model: "llama".into(), scores, ..whole() }, "found NaN");
}
