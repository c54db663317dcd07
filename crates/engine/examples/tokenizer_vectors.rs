//! Compares tokenizers built from their parts with llama.cpp's test vectors.
//!
//! `tokenizer_vectors FOLDER` reads each `NAME.json` of a folder (written by `bench/tokenizer_vectors.py`) with its
//! `NAME.inp` and `NAME.out`, and each folder in it with a tokenizer, `vectors.inp` and `vectors.out`. It prints how many
//! texts give the same ids, and exits with 1 if one does not.

use std::path::Path;
use std::process::ExitCode;

use moebius_engine::{TokenType, Tokenizer, TokenizerParts};
use serde_json::Value;

/// Stands between the texts of an `.inp` file.
const BETWEEN: &str = "\n__ggml_vocab_test__\n";

fn main() -> ExitCode {
    let Some(folder) = std::env::args().nth(1) else {
        eprintln!("usage: tokenizer_vectors FOLDER");
        return ExitCode::from(2);
    };
    let entries = std::fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let mut files: Vec<_> =
        entries.filter(|path| path.is_dir() || path.extension().is_some_and(|end| end == "json")).collect();
    files.sort();
    let mut all = true;
    for file in &files {
        let name = file.file_stem().expect("a name").to_string_lossy();
        match compare(file) {
            Ok((same, texts)) => {
                all &= same == texts;
                println!("{name:<20} {same} of {texts}");
            }
            Err(error) => println!("{name:<20} {error}"),
        }
    }
    if all { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Texts with the same ids, and all texts.
fn compare(file: &Path) -> Result<(usize, usize), Box<dyn std::error::Error>> {
    let (tokenizer, vectors) = if file.is_dir() {
        (Tokenizer::from_folder(file)?, file.join("vectors"))
    } else {
        let parts = parts(&serde_json::from_slice(&std::fs::read(file)?)?);
        (parts.build(&file.display().to_string())?, file.to_path_buf())
    };
    // The vectors were made without special tokens, neither around the text nor inside it.
    let tokenizer = tokenizer.literal();
    let texts = std::fs::read_to_string(vectors.with_extension("inp"))?;
    let wanted = std::fs::read_to_string(vectors.with_extension("out"))?;
    let (mut same, mut count) = (0, 0);
    for (text, line) in texts.split(BETWEEN).zip(wanted.lines()) {
        let wanted: Vec<u32> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let found = tokenizer.encode_bare(text)?;
        count += 1;
        same += usize::from(found == wanted);
        if found != wanted {
            println!("    {text:?}\n      wanted {wanted:?}\n      found  {found:?}");
        }
    }
    Ok((same, count))
}

fn parts(json: &Value) -> TokenizerParts {
    let strings = |key: &str| -> Vec<String> {
        let list = json[key].as_array().into_iter().flatten();
        list.map(|item| item.as_str().unwrap_or_default().to_string()).collect()
    };
    let id = |key: &str| json[key].as_u64().map(|id| id as u32);
    TokenizerParts {
        model: json["model"].as_str().unwrap_or_default().to_string(),
        pre: json["pre"].as_str().map(str::to_string),
        tokens: strings("tokens"),
        scores: json["scores"].as_array().into_iter().flatten().map(|v| v.as_f64().unwrap_or(0.0) as f32).collect(),
        token_types: json["token_types"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|v| v.as_i64().and_then(TokenType::from_number).unwrap_or_default())
            .collect(),
        merges: strings("merges"),
        bos: id("bos"),
        eos: id("eos"),
        unknown: id("unknown"),
        add_bos: json["add_bos"].as_bool(),
        add_eos: json["add_eos"].as_bool(),
        add_space_prefix: json["add_space_prefix"].as_bool(),
        ..TokenizerParts::default()
    }
}
