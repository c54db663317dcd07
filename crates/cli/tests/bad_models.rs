//! Model folders that cannot be used: each gets one line that names file, tensor, wanted and found.

mod common;

use std::path::Path;

use common::{
    assert_fails, config, run, succeed, tensors, text, write_model, write_safetensors, write_safetensors_parts,
};
use serde_json::{Value, json};

/// Damages a good folder and runs each command that reads a model on it.
fn fails(what: &str, damage: impl Fn(&Path), parts: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(&folder.path().join("model"));
    damage(&model);
    let file = folder.path().join("text.txt");
    std::fs::write(&file, "The sea").unwrap();
    assert_fails(what, &run(&["run", "The sea", "--model", text(&model), "--max-tokens", "2"]), parts);
    assert_fails(what, &run(&["eval", "--model", text(&model), "--text", text(&file)]), parts);
}

fn with_config(change: impl Fn(&mut Value)) -> impl Fn(&Path) {
    move |model| {
        let mut config = config();
        change(&mut config);
        std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    }
}

#[test]
fn folders() {
    let missing = run(&["run", "x", "--model", "/nowhere/model"]);
    assert_fails("missing folder", &missing, &["/nowhere/model"]);
    let folder = tempfile::tempdir().unwrap();
    assert_fails("empty folder", &run(&["run", "x", "--model", text(folder.path())]), &["config.json"]);
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert_fails("a file", &run(&["run", "x", "--model", text(&file)]), &["file"]);
    fails("no weights", |model| std::fs::remove_file(model.join("model.safetensors")).unwrap(), &["model.safetensors"]);
    fails("no tokenizer", |model| std::fs::remove_file(model.join("tokenizer.json")).unwrap(), &["tokenizer.json"]);
    fails(
        "foreign tokenizer",
        |model| std::fs::write(model.join("tokenizer.json"), "{}").unwrap(),
        &["tokenizer.json"],
    );
    fails(
        "a tokenizer of more tokens",
        |model| {
            let path = model.join("tokenizer.json");
            let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            let mut token = tokenizer["added_tokens"][0].clone();
            (token["id"], token["content"]) = (json!(257), json!("<|more|>"));
            tokenizer["added_tokens"].as_array_mut().unwrap().push(token);
            std::fs::write(&path, tokenizer.to_string()).unwrap();
        },
        &["tokenizer.json", "vocabulary of 257", r#"found 257 for "<|more|>""#],
    );
    fails("foreign config", |model| std::fs::write(model.join("config.json"), "[1, 2").unwrap(), &["config.json"]);
}

#[test]
fn configurations() {
    type Change = fn(&mut Value);
    let cases: [(&str, Change, &[&str]); 8] = [
        ("family", |config| config["model_type"] = json!("hydra"), &["config.json", "model_type", "hydra"]),
        ("no family", |config| config["model_type"] = Value::Null, &["config.json", "model_type"]),
        ("heads", |config| config["num_attention_heads"] = json!(3), &["config.json", "num_attention_heads", "3"]),
        (
            "too many experts a token",
            |config| config["num_experts_per_tok"] = json!(5),
            &["num_experts_per_tok", "5", "4"],
        ),
        ("no size", |config| config["hidden_size"] = json!(0), &["config.json", "hidden_size", "0"]),
        ("text for a number", |config| config["vocab_size"] = json!("many"), &["config.json", "vocab_size", "many"]),
        ("absurd", |config| config["num_hidden_layers"] = json!(u64::MAX), &["config.json", "num_hidden_layers"]),
        ("activation", |config| config["hidden_act"] = json!("sine"), &["config.json", "hidden_act", "sine"]),
    ];
    for (what, change, parts) in cases {
        fails(what, with_config(change), parts);
    }
    // Shapes that contradict the tensors: the error names the tensor and both shapes.
    fails(
        "vocabulary",
        with_config(|config| config["vocab_size"] = json!(300)),
        &["model.safetensors", "[300, 32]", "[257, 32]"],
    );
}

#[test]
fn weights() {
    let file = |model: &Path| model.join("model.safetensors");
    for length in [0, 4, 8, 100, 20_000] {
        let what = format!("cut to {length}");
        let cut = |model: &Path| {
            let bytes = std::fs::read(file(model)).unwrap();
            std::fs::write(file(model), &bytes[..length]).unwrap();
        };
        fails(&what, cut, &["model.safetensors"]);
    }
    fails(
        "a tail",
        |model| {
            let mut bytes = std::fs::read(file(model)).unwrap();
            bytes.extend([0; 64]);
            std::fs::write(file(model), bytes).unwrap();
        },
        &["model.safetensors"],
    );
    fails("no header", |model| std::fs::write(file(model), [0xff; 4096]).unwrap(), &["model.safetensors"]);

    let headers = [
        ("no JSON", "{\"lm_head.weight\": ", 0),
        ("not an object", "[]", 0),
        ("lying length", r#"{"lm_head.weight":{"dtype":"F32","shape":[257,32],"data_offsets":[0,32896]}}"#, 64),
        ("backwards", r#"{"lm_head.weight":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}"#, 16),
        (
            "overlap",
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}"#,
            24,
        ),
        ("absurd", r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,16],"data_offsets":[0,0]}}"#, 0),
        ("unknown dtype", r#"{"a":{"dtype":"F13","shape":[1],"data_offsets":[0,4]}}"#, 4),
    ];
    for (what, header, data) in headers {
        fails(what, |model| write_safetensors_parts(&file(model), header, &vec![0; data]), &["model.safetensors"]);
    }

    let changed = |change: fn(&mut Vec<common::FileTensor>)| {
        move |model: &Path| {
            let mut tensors = tensors();
            change(&mut tensors);
            write_safetensors(&model.join("model.safetensors"), &tensors);
        }
    };
    fails(
        "missing tensor",
        changed(|tensors| tensors.retain(|tensor| !tensor.name.contains("layers.1.block_sparse_moe.experts.2.w3"))),
        &["model.safetensors", "model.layers.1.block_sparse_moe.experts.2.w3.weight"],
    );
    fails(
        "surplus tensor",
        changed(|tensors| tensors.push(common::FileTensor::f32("model.layers.2.input_layernorm.weight", &[1], &[1.0]))),
        &["model.safetensors", "model.layers.2.input_layernorm.weight"],
    );
    fails(
        "wrong shape",
        changed(|tensors| tensors[2].shape = vec![4, 8]),
        &["model.safetensors", "model.norm.weight", "[32]", "[4, 8]"],
    );
    fails(
        "wrong dtype",
        changed(|tensors| tensors[2] = common::FileTensor::i64("model.norm.weight", &[32], &[1; 32])),
        &["model.safetensors", "model.norm.weight", "I64"],
    );
}

/// Where a GGUF file goes on behind a text of its tables, which stands there with its length before it.
fn behind(file: &[u8], text: &str) -> usize {
    let wanted = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    file.windows(wanted.len()).position(|found| found == wanted).expect(text) + wanted.len()
}

#[test]
fn gguf_files() {
    let folder = tempfile::tempdir().unwrap();
    let [file, packed] = ["m.gguf", "packed"].map(|name| folder.path().join(name));
    let model = write_model(&folder.path().join("model"));
    succeed(&["export", text(&model), "--gguf", text(&file), "--format", "f32"]);
    let whole = std::fs::read(&file).unwrap();
    let fails = |what: &str, bytes: &[u8], parts: &[&str]| {
        std::fs::write(&file, bytes).unwrap();
        let parts = [&["m.gguf: "], parts].concat();
        assert_fails(what, &run(&["run", "The sea", "--model", text(&file)]), &parts);
        assert_fails(what, &run(&["pack", text(&file), "--out", text(&packed)]), &parts);
        assert!(!packed.exists(), "{what}");
    };
    for length in [0, 3, 12, 40, 1000, whole.len() / 2, whole.len() - 100] {
        fails(&format!("cut to {length}"), &whole[..length], &["wanted"]);
    }
    let patched = |place: usize, bytes: &[u8]| {
        let mut file = whole.clone();
        file[place..place + bytes.len()].copy_from_slice(bytes);
        file
    };
    fails("count", &patched(8, &u64::MAX.to_le_bytes()), &["bytes of a tensor's name at byte"]);
    // A value stands behind its type and its length.
    let architecture = behind(&whole, "general.architecture") + 12;
    let known = "`general.architecture`: architecture `hydra` is not known; known are llama, qwen2";
    fails("architecture", &patched(architecture, b"hydra"), &[known]);
    // A type stands behind the number of dimensions and two of them.
    let [embedding, head] = ["token_embd.weight", "output.weight"].map(|name| behind(&whole, name));
    let number = "tensor `output.weight`: its type is ggml's number 99, which is not known here";
    fails("type", &patched(head + 20, &99u32.to_le_bytes()), &[number]);
    let mut fewer = patched(embedding + 12, &200u64.to_le_bytes());
    fails("embedding", &fewer, &["tensor `output.weight`", "[200, 32]", "[257, 32]"]);

    // Fewer rows than tokens, and a way of cutting that nobody knows: a matter of whoever wants texts.
    fewer[head + 12..head + 20].copy_from_slice(&200u64.to_le_bytes());
    let pre = patched(behind(&whole, "tokenizer.ggml.pre") + 12, b"gpt-9");
    let unknown = "unusable tokenizer: the pre-tokenizer `gpt-9` is not known";
    for (bytes, part) in [(&fewer, "wanted ids below the model's vocabulary of 200, found 256"), (&pre, unknown)] {
        std::fs::write(&file, bytes).unwrap();
        assert_fails(part, &run(&["run", "The sea", "--model", text(&file)]), &["m.gguf: ", part]);
    }
}
