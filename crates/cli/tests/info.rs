//! `moebius info`: the same model counted from a folder, a GGUF file, a packed model and a bare configuration.

mod common;

use common::{assert_fails, config, run, succeed, text, write_model};
use serde_json::Value;
use std::path::Path;

fn info(model: &Path) -> Value {
    serde_json::from_str(&succeed(&["info", text(model), "--json", "--context", "40"])).unwrap()
}

#[test]
fn every_form_of_a_model_has_the_same_parts() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = write_model(&at("model"));
    succeed(&["export", text(&model), "--gguf", text(&at("m.gguf")), "--format", "q8_0"]);
    succeed(&["pack", text(&model), "--format", "q8_0", "--out", text(&at("packed"))]);
    std::fs::write(at("bare.json"), config().to_string()).unwrap();
    let found = info(&model);
    let of = |part: &str, which: &str| found["parameters"][part][which].as_u64().unwrap();
    // A layer: attention 32 * (32 + 16 + 16 + 32), router 4 * 32, four experts of 3 * 24 * 32, two norms of 32.
    assert_eq!(of("mixers", "all"), 2 * 32 * 96);
    assert_eq!((of("experts", "all"), of("experts", "active")), (2 * 4 * 2304, 2 * 2 * 2304));
    assert_eq!((of("routers", "all"), of("norms", "all")), (2 * 128, 5 * 32));
    assert_eq!((of("embedding", "all"), of("head", "active")), (257 * 32, 257 * 32));
    let layers = 2 * (32 * 96 + 128) + 5 * 32;
    assert_eq!(of("total", "all"), 2 * 257 * 32 + layers + 2 * 4 * 2304);
    assert_eq!(of("without_embeddings", "active"), layers + 2 * 2 * 2304);
    assert_eq!(found["weights"]["types"]["F32"]["bytes"], 4 * of("total", "all"));
    // Keys and values of 2 heads of 8 in 2 layers.
    assert_eq!(found["cache_bytes"]["bf16"]["token"], 2 * 2 * 2 * 8 * 2);
    assert_eq!(found["cache_bytes"]["f32"]["sequence_states"], 0);
    let active = of("total", "active") - of("embedding", "active");
    assert_eq!(found["flops"]["weights"], 2 * active);
    // Each of 40 positions meets the queries of 4 heads of 8, and its value them again.
    assert_eq!(found["flops"]["mixers_at_context"], 2 * 40 * 4 * 32);
    for (form, source) in [("m.gguf", "gguf"), ("packed", "packed"), ("bare.json", "config")] {
        let other = info(&at(form));
        assert_eq!(other["source"], source);
        for key in ["parameters", "layers", "cache_bytes", "flops"] {
            assert_eq!(other[key], found[key], "{form}: {key}");
        }
        assert_eq!(other["weights"].is_null(), form == "bare.json", "{form}");
    }
    // The experts' down has rows of 24, which no block divides. Experts are padded to pages, which are no weights.
    let packed = info(&at("packed"))["weights"].clone();
    let of_type = |name: &str, what: &str| packed["types"][name][what].as_u64().unwrap();
    assert_eq!(of_type("bf16", "elements"), 2 * 4 * 24 * 32);
    assert_eq!(["f32", "bf16", "q8_0"].map(|name| of_type(name, "elements")).iter().sum::<u64>(), of("total", "all"));
    let file = std::fs::metadata(at("packed").join("packed.safetensors")).unwrap().len();
    assert!((file / 2..file).contains(&packed["bytes"].as_u64().unwrap()), "{packed} of {file}");
}

#[test]
fn tables_name_the_parts_and_what_a_configuration_cannot_tell() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(&folder.path().join("model"));
    let told = succeed(&["info", text(&model)]);
    for part in
        ["mixtral: 2 layers", "0-1", "4 heads of 8, 2 of keys", "4 experts of 24, 2 a token", "F32", "at 96 tokens"]
    {
        assert!(told.contains(part), "{part}: {told}");
    }
    let bare = succeed(&["info", text(&model.join("config.json"))]);
    assert!(bare.contains("none here") && !bare.contains("F32 "), "{bare}");
    assert!(succeed(&["info"]).contains("total"), "the shipped model");
}

#[test]
fn what_cannot_be_told_is_said_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    assert_fails("absent", &run(&["info", "/nowhere"]), &["/nowhere: no such folder or file"]);
    std::fs::write(&file, r#"{"model_type": "martian"}"#).unwrap();
    assert_fails("unknown", &run(&["info", text(&file)]), &["config.json", "`martian` is not known"]);
    let missing = write_model(&folder.path().join("model"));
    std::fs::remove_file(missing.join("model.safetensors")).unwrap();
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#;
    std::fs::write(missing.join("model.safetensors.index.json"), index).unwrap();
    assert_fails("no shard", &run(&["info", text(&missing)]), &["model-00001-of-00002.safetensors"]);
}
