//! `moebius pack`: what is packed runs as what it was packed from, folders and GGUF files alike.

mod common;

use common::{assert_fails, run, succeed, text};
use std::path::{Path, PathBuf};

const PROMPT: [&str; 5] = ["Once upon a", "--temperature", "0", "--max-tokens", "12"];

/// The folder of the model that ships with the project.
fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/shipped")
}

/// Greedy text of a model.
fn writes(model: &str, more: &[&str]) -> String {
    succeed(&[&["run", "--model", model], &PROMPT[..], more].concat())
}

#[test]
fn a_packed_model_writes_what_the_model_writes() {
    let folder = tempfile::tempdir().unwrap();
    let shipped = shipped();
    for format in ["q8_0", "q4_0", "stored"] {
        let packed = folder.path().join(format);
        succeed(&["pack", text(&shipped), "--format", format, "--out", text(&packed)]);
        let wanted = writes(text(&shipped), &["--weights", format]);
        assert_eq!(writes(text(&packed), &[]), wanted, "{format}");
    }
    let again = run(&["pack", text(&shipped), "--out", text(&folder.path().join("q8_0"))]);
    assert_fails("a folder in use", &again, &["q8_0", "--force"]);
    let packed = folder.path().join("stored");
    let asked = run(&["run", "--model", text(&packed), "--weights", "q4_0", "x"]);
    assert_fails("another format", &asked, &["stored", "as it was packed"]);
    let unknown = run(&["pack", text(&shipped), "--format", "q9", "--out", text(&folder.path().join("x"))]);
    assert_eq!(unknown.status.code(), Some(2), "wrong usage");
}

#[test]
fn a_gguf_file_runs_and_packs_with_its_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let [file, packed] = ["m.gguf", "packed"].map(|name| folder.path().join(name));
    succeed(&["export", text(&shipped()), "--gguf", text(&file), "--format", "q8_0"]);
    let wanted = writes(text(&file), &[]);
    assert!(!wanted.is_empty());
    succeed(&["pack", text(&file), "--out", text(&packed)]);
    assert_eq!(writes(text(&packed), &[]), wanted);
}
