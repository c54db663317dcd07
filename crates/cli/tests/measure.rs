//! `moebius eval`, `logits` and `check` as their users use them.

mod common;

use std::path::Path;

use common::{
    FileTensor, VOCABULARY, assert_fails, read_safetensors, run, stderr, stdout, succeed, text, write_model,
    write_safetensors,
};

fn floats(tensors: &[FileTensor], name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensor = tensors.iter().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("no {name}"));
    assert_eq!(tensor.dtype, "F32");
    let values = tensor.bytes.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
    (tensor.shape.clone(), values)
}

/// Two sequences of seven tokens.
const TOKENS: [i64; 14] = [5, 100, 256, 0, 17, 42, 42, 1, 2, 3, 4, 5, 6, 7];

fn write_tokens(path: &Path, tokens: &[i64], shape: &[usize]) {
    write_safetensors(path, &[FileTensor::i64("input_ids", shape, tokens)]);
}

fn logits(model: &Path, tokens: &Path, out: &Path, more: &[&str]) -> Vec<FileTensor> {
    let arguments =
        ["logits", "--model", text(model), "--tokens", text(tokens), "--key", "input_ids", "--out", text(out)];
    succeed(&[&arguments[..], more].concat());
    read_safetensors(out)
}

#[test]
fn logits_do_not_depend_on_threads_batch_or_company() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(&folder.path().join("model"));
    let (tokens, single, out) =
        (folder.path().join("tokens"), folder.path().join("single"), folder.path().join("out.safetensors"));
    write_tokens(&tokens, &TOKENS, &[2, 7]);
    write_tokens(&single, &TOKENS[7..], &[1, 7]);
    for dtype in ["f32", "bf16"] {
        let both = logits(&model, &tokens, &out, &["--dtype", dtype, "--routing", "--threads", "1"]);
        let (shape, values) = floats(&both, "logits");
        assert_eq!(shape, [2, 7, VOCABULARY]);
        for layer in 0..2 {
            assert_eq!(floats(&both, &format!("router_logits.{layer}")).0, [14, 4]);
            assert_eq!(floats(&both, &format!("topk_weight.{layer}")).0, [14, 2]);
            let index = both.iter().find(|tensor| tensor.name == format!("topk_index.{layer}")).unwrap();
            assert_eq!((index.dtype, &index.shape[..]), ("I64", &[14, 2][..]));
        }
        let threads = logits(&model, &tokens, &out, &["--dtype", dtype, "--threads", "2"]);
        assert_eq!(threads.len(), 1, "routing only when asked for");
        assert!(floats(&threads, "logits").1 == values, "{dtype}: threads");
        let alone = logits(&model, &single, &out, &["--dtype", dtype]);
        assert!(floats(&alone, "logits").1 == values[7 * VOCABULARY..], "{dtype}: company");
    }
}

#[test]
fn logits_refuse_what_they_cannot_do_and_leave_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(&folder.path().join("model"));
    let (tokens, out) = (folder.path().join("tokens.safetensors"), folder.path().join("out.safetensors"));
    let fails = |what: &str, key: &str, parts: &[&str]| {
        let arguments =
            ["logits", "--model", text(&model), "--tokens", text(&tokens), "--key", key, "--out", text(&out)];
        assert_fails(what, &run(&arguments), parts);
        assert!(!out.exists(), "{what}");
    };
    write_tokens(&tokens, &[5, 6, 7, 257], &[2, 2]);
    fails("id", "input_ids", &["tokens.safetensors", "input_ids", "257", "[1, 1]", "vocabulary of 257"]);
    write_tokens(&tokens, &[5, -1], &[1, 2]);
    fails("negative id", "input_ids", &["-1", "[0, 1]", "257"]);
    fails("key", "other", &["tokens.safetensors", "other", "input_ids"]);
    write_tokens(&tokens, &[5, 6], &[2]);
    fails("rank", "input_ids", &["tokens.safetensors", "input_ids", "[batch, sequence]", "[2]"]);
    write_tokens(&tokens, &[], &[0, 4]);
    fails("nothing", "input_ids", &["tokens.safetensors", "input_ids", "[0, 4]"]);
    write_tokens(&tokens, &[1; 97], &[1, 97]);
    fails("too long", "input_ids", &["tokens.safetensors", "97", "96"]);
    write_safetensors(&tokens, &[FileTensor::f32("input_ids", &[1, 1], &[1.0])]);
    fails("dtype", "input_ids", &["tokens.safetensors", "input_ids", "F32"]);
    std::fs::write(&tokens, b"no safetensors at all").unwrap();
    fails("foreign", "input_ids", &["tokens.safetensors"]);
    std::fs::remove_file(&tokens).unwrap();
    fails("missing", "input_ids", &["tokens.safetensors"]);

    write_tokens(&tokens, &TOKENS, &[2, 7]);
    for out in ["/proc/out.safetensors", "/nowhere/out.safetensors"] {
        let arguments =
            ["logits", "--model", text(&model), "--tokens", text(&tokens), "--key", "input_ids", "--out", out];
        assert_fails("unwritable", &run(&arguments), &[out]);
    }
}

#[test]
fn eval_agrees_with_the_logits() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(&folder.path().join("model"));
    let file = folder.path().join("text.txt");
    std::fs::write(&file, "The sea é").unwrap();
    let arguments = ["eval", "--model", text(&model), "--text", text(&file)];
    let score: serde_json::Value = serde_json::from_str(&succeed(&[&arguments[..], &["--json"]].concat())).unwrap();

    let ids: Vec<i64> = "The sea é".bytes().map(|byte| i64::from(byte) + 1).collect();
    let (tokens, out) = (folder.path().join("tokens"), folder.path().join("out"));
    write_tokens(&tokens, &ids, &[1, ids.len()]);
    let (_, rows) = floats(&logits(&model, &tokens, &out, &[]), "logits");
    let nats: f64 = rows
        .chunks(VOCABULARY)
        .zip(&ids[1..])
        .map(|(row, &target)| {
            let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            sum.ln() - f64::from(row[target as usize])
        })
        .sum();
    let number = |key: &str| score[key].as_f64().unwrap();
    assert!((number("loss") - nats / 9.0).abs() < 1e-5, "{score} {nats}");
    assert!((number("perplexity") - (nats / 9.0).exp()).abs() < 1e-2, "{score}");
    assert!((number("bits_per_byte") - nats / 9.0 / 2f64.ln()).abs() < 1e-5, "{score}");
    assert_eq!((number("tokens"), number("scored_tokens"), number("scored_bytes")), (10.0, 9.0, 9.0));

    let lines = succeed(&[&arguments[..], &["--context", "4", "--stride", "2"]].concat());
    assert!(
        lines.contains("9 of 10 tokens (all but the first), 9 bytes") && lines.contains("of 4 tokens, one every 2"),
        "{lines}"
    );
}

#[test]
fn eval_refuses_what_it_cannot_measure() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(&folder.path().join("model"));
    let file = folder.path().join("text.txt");
    let fails = |what: &str, more: &[&str], parts: &[&str]| {
        let arguments = ["eval", "--model", text(&model), "--text", text(&file)];
        assert_fails(what, &run(&[&arguments[..], more].concat()), parts);
    };
    fails("missing", &[], &["text.txt", "No such file"]);
    std::fs::write(&file, b"some \x80").unwrap();
    fails("no UTF-8", &[], &["text.txt", "UTF-8", "0x80", "offset 5"]);
    std::fs::write(&file, "").unwrap();
    fails("empty", &[], &["text.txt", "at least 2 tokens, found 0"]);
    std::fs::write(&file, "long enough").unwrap();
    fails("context", &["--context", "97"], &["97", "96"]);
    fails("stride", &["--context", "8", "--stride", "9"], &["--stride 9", "8"]);
}

/// A golden folder made of what the command itself says, less one changed number where `damage` says so.
fn write_golden(folder: &Path, damage: Option<&str>) {
    let model = write_model(folder);
    let (tokens, out) = (folder.join("tokens"), folder.join("out"));
    write_tokens(&tokens, &TOKENS, &[2, 7]);
    let mut expected = logits(&model, &tokens, &out, &["--routing"]);
    expected.push(FileTensor::i64("input_ids", &[2, 7], &TOKENS));
    for tensor in &mut expected {
        tensor.name = format!("a.{}", tensor.name);
        if damage == Some(&tensor.name) {
            // The high byte of a float's exponent, or the low byte of an integer.
            let at = if tensor.dtype == "F32" { 3 } else { 0 };
            tensor.bytes[at] ^= 1;
        }
    }
    write_safetensors(&folder.join("expected.safetensors"), &expected);
}

#[test]
fn check_finds_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    let good = folder.path().join("good");
    write_golden(&good, None);
    let report = succeed(&["check", text(&good)]);
    for quantity in ["a.logits", "a.router_logits", "a.topk_index", "a.topk_weight"] {
        let line = report.lines().find(|line| line.trim_start().starts_with(&format!("{quantity} ")));
        assert!(line.is_some_and(|line| line.ends_with("ok")), "{quantity}: {report}");
    }
    for (at, name) in ["a.logits", "a.router_logits.1", "a.topk_index.0", "a.topk_weight.1"].iter().enumerate() {
        let bad = folder.path().join(format!("bad{at}"));
        write_golden(&bad, Some(name));
        let output = run(&["check", text(&bad), text(&good)]);
        assert_eq!(output.status.code(), Some(1), "{name}");
        let wrong: Vec<String> =
            stdout(&output).lines().filter(|line| line.contains("DIFFERS")).map(String::from).collect();
        assert!(wrong.len() == 1 && wrong[0].contains(name), "{name}: {}", stdout(&output));
    }
}

#[test]
fn check_names_a_family_that_is_not_known_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (foreign, good) = (folder.path().join("foreign"), folder.path().join("good"));
    write_golden(&good, None);
    write_model(&foreign);
    let config = std::fs::read_to_string(foreign.join("config.json")).unwrap();
    std::fs::write(foreign.join("config.json"), config.replace("\"mixtral\"", "\"hydra\"")).unwrap();
    let output = run(&["check", text(&foreign), text(&good)]);
    assert_eq!(output.status.code(), Some(1));
    let line = stderr(&output);
    assert!(line.contains("foreign/config.json") && line.contains("hydra") && line.lines().count() == 1, "{line}");
    assert!(stdout(&output).contains("a.logits"), "the second folder is checked");
}

#[test]
fn bench_measures_any_model() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(&folder.path().join("model"));
    let sizes = ["--prefill", "24", "--decode", "4", "--rounds", "2", "--threads", "2"];
    let report = |more: &[&str]| -> serde_json::Value {
        let found = succeed(&[&["bench", "--json"], &sizes[..], more].concat());
        serde_json::from_str(&found).unwrap()
    };
    let found = report(&["--model", text(&model), "--batch", "3", "--dtype", "f32"]);
    assert_eq!((found["dtype"].as_str(), found["machine"]["threads"].as_u64()), (Some("f32"), Some(2)));
    for (phase, tokens) in [("prefill", 24), ("decode", 4), ("batched_decode", 12)] {
        let phase = &found[phase];
        assert_eq!(phase["tokens"], tokens);
        assert_eq!(phase["seconds"].as_array().unwrap().len(), 2);
        for key in [
            "weight_bytes_per_token",
            "cache_bytes_per_token",
            "operations_per_token",
            "bytes_per_second",
            "share_of_read_bandwidth",
            "operations_per_second",
            "share_of_peak_operations",
            "share_of_peak_byte_operations",
        ] {
            assert!(phase[key].as_f64().unwrap() > 0.0, "{key}: {phase}");
        }
        let rate = |key| phase["tokens_per_second"][key].as_f64().unwrap();
        assert!(rate("min") <= rate("median") && rate("median") <= rate("max"), "{phase}");
    }
    for key in ["load_seconds", "first_token_seconds", "weight_bytes"] {
        assert!(found[key].as_f64().unwrap() > 0.0, "{key}: {found}");
    }
    for key in ["read_bytes_per_second", "operations_per_second", "byte_operations_per_second"] {
        assert!(found["machine"][key].as_f64().unwrap() > 0.0, "{key}: {found}");
    }
    if cfg!(target_os = "linux") {
        assert!(found["resident_bytes"].as_u64().unwrap() <= found["peak_bytes"].as_u64().unwrap(), "{found}");
    }
    // The test model's context is shorter than the usual prompt.
    let found: serde_json::Value =
        serde_json::from_str(&succeed(&["bench", "--json", "--model", text(&model), "--rounds", "1"])).unwrap();
    assert_eq!(
        (found["prefill"]["tokens"].as_u64(), &found["batched_decode"]),
        (Some(96 - 65), &serde_json::Value::Null)
    );

    let table = succeed(&[&["bench", "--model", text(&model), "--batch", "2"], &sizes[..]].concat());
    for part in ["2 threads", "prefill", "decode x 2", "tokens/s", "of 4 experts", "bf16 peak"] {
        assert!(table.contains(part), "{part}: {table}");
    }
}

#[test]
fn bench_makes_a_published_shape_and_refuses_others() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("cut");
    // Mixtral's sizes with one layer would be gigabytes; what is refused is refused before a weight is drawn.
    let fails = |what: &str, arguments: &[&str], parts: &[&str]| {
        assert_fails(what, &run(&[&["bench"], arguments].concat()), parts);
    };
    fails("name", &["--random-weights", "gpt-5", "--out", text(&out)], &["gpt-5", "olmoe-1b-7b", "mixtral-8x7b"]);
    fails("layers", &["--random-weights", "olmoe-1b-7b:99"], &["1 to 16 layers", "99"]);
    fails("context", &["--prefill", "100000"], &["100065", "context"]);
    assert!(!out.exists());
}
