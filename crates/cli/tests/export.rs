//! `moebius export` as its users use it.

mod common;

use common::{FileTensor, assert_fails, read_safetensors, run, succeed, text, write_model, write_safetensors};

#[test]
fn an_exported_model_computes_what_its_folder_computes() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(&folder.path().join("model"));
    let (file, tokens) = (folder.path().join("model.gguf"), folder.path().join("tokens"));
    write_safetensors(&tokens, &[FileTensor::i64("input_ids", &[1, 5], &[5, 100, 256, 0, 17])]);
    let report = succeed(&["export", text(&model), "--gguf", text(&file), "--format", "f32"]);
    assert!(report.contains("model.gguf: ") && report.ends_with(" bits a weight\n"), "{report}");
    let logits = |model: &std::path::Path| {
        let out = folder.path().join("out");
        let arguments = ["--tokens", text(&tokens), "--key", "input_ids", "--out", text(&out)];
        succeed(&[&["logits", "--model", text(model)][..], &arguments[..]].concat());
        read_safetensors(&out).remove(0).bytes
    };
    assert!(logits(&file) == logits(&model));
}

#[test]
fn what_cannot_be_exported_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(&folder.path().join("model"));
    let file = folder.path().join("model.gguf");
    let arguments = ["export", text(&model), "--gguf", text(&file)];
    let words = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}}"#;
    std::fs::write(model.join("tokenizer.json"), words).unwrap();
    assert_fails("tokenizer", &run(&arguments), &["tokenizer.json", "byte-level BPE", "WordLevel"]);
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    assert_fails("no tokenizer", &run(&arguments), &["tokenizer.json"]);
    assert!(!file.exists());
    let wrong = run(&[&arguments[..], &["--format", "q4"]].concat());
    assert_eq!(wrong.status.code(), Some(2));
    assert!(common::stderr(&wrong).contains("known are f32, f16, bf16, q8_0"));
}
