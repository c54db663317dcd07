//! `moebius pack`: what is packed runs as what it was packed from, folders and GGUF files alike, and is shared.

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

#[cfg(target_os = "linux")]
mod sharing {
    use std::collections::BTreeMap;
    use std::io::{BufRead, BufReader, Write};
    use std::path::Path;
    use std::process::{Child, Stdio};

    use super::common::{VOCABULARY, moebius, text, write_model};
    use moebius_model::packed::save_packed;
    use moebius_model::{Ffn, Model, RunFormat, UniformDecoder};

    /// Bytes of the experts: more than everything else that a small conversation needs.
    const EXPERT_BYTES: u64 = 2 * 2 * 3 * 256 * 4096 * 4;

    /// A packed model whose every token goes to all experts.
    fn write_packed(folder: &Path) {
        let decoder = UniformDecoder {
            family: "mixtral",
            vocab_size: VOCABULARY,
            hidden: 256,
            n_layers: 2,
            head_dim: 64,
            max_positions: 128,
            ffn: Ffn::moe_of(2, 2, 4096, true),
            ..UniformDecoder::default()
        };
        let model = Model::random_for_speed(&decoder.config(), 1, RunFormat::F32).unwrap();
        save_packed(folder, &model, &mut |_| ()).unwrap();
        let tiny = write_model(&folder.join("tiny"));
        for name in ["tokenizer.json", "generation_config.json"] {
            std::fs::rename(tiny.join(name), folder.join(name)).unwrap();
        }
        std::fs::write(folder.join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    }

    /// A conversation in which a message was answered, and which waits for the next.
    fn waiting(model: &Path) -> Child {
        let mut command = moebius();
        command.args(["chat", "--model", text(model), "--max-tokens", "2", "--threads", "2", "--figures"]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b"Hello\n").unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().starts_with("conversation: ")), "an answer's figures");
        child
    }

    /// What the system tells of the places where a process has mapped the weights, in bytes.
    fn mapped(process: &Child) -> BTreeMap<String, u64> {
        let (mut sums, mut is_ours) = (BTreeMap::new(), false);
        for line in std::fs::read_to_string(format!("/proc/{}/smaps", process.id())).unwrap().lines() {
            match line.split_once(": ").map(|(key, value)| (key, value.trim().strip_suffix(" kB"))) {
                Some((key, Some(kilobytes))) if is_ours => {
                    *sums.entry(key.to_string()).or_default() += 1024 * kilobytes.parse::<u64>().unwrap();
                }
                Some(_) => {}
                None => is_ours = line.ends_with("/packed.safetensors"),
            }
        }
        sums
    }

    /// Bytes in memory that belong to a process alone.
    fn own(process: &Child) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
        let kilobytes = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB"));
        1024 * kilobytes.unwrap().parse::<u64>().unwrap()
    }

    #[test]
    fn processes_share_a_packed_model() {
        let folder = tempfile::tempdir().unwrap();
        write_packed(folder.path());
        // Pages of a file system in memory always count as changed.
        let of_both = |found: &BTreeMap<String, u64>, whose: &str| {
            found[&format!("{whose}_Clean")] + found[&format!("{whose}_Dirty")]
        };
        let first = waiting(folder.path());
        let alone = mapped(&first);
        assert!(of_both(&alone, "Private") >= EXPERT_BYTES, "in memory, and nobody else's: {alone:?}");
        let processes = [first, waiting(folder.path())];
        for process in &processes {
            let found = mapped(process);
            assert!(of_both(&found, "Shared") >= EXPERT_BYTES, "the same memory: {found:?}");
            assert_eq!(found["Anonymous"], 0, "no copy of any page: {found:?}");
            assert!(own(process) < EXPERT_BYTES / 4, "{} bytes of its own, experts {EXPERT_BYTES}", own(process));
        }
        for mut process in processes {
            drop(process.stdin.take());
            assert!(process.wait().unwrap().success());
        }
    }
}
