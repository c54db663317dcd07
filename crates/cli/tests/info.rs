//! `moebius info`: the same model counted from a folder, a GGUF file, a packed model and a bare configuration.

mod common;

use common::{assert_fails, config, run, succeed, text, write_model};
use moebius_model::checkpoint::StoredAs;
use moebius_model::encoder_decoder::{EncoderDecoder, EncoderDecoderConfig};
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
fn an_encoder_decoder_is_told_by_its_two_stacks() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"model_type": "switch_transformers", "vocab_size": 50, "d_model": 16, "num_heads": 3, "d_kv": 4,
        "d_ff": 12, "num_layers": 2, "num_decoder_layers": 3, "num_experts": 5, "expert_capacity": 4,
        "relative_attention_num_buckets": 8, "encoder_sparse_step": 2, "decoder_sparse_step": 1,
        "tie_word_embeddings": false}"#;
    let config = EncoderDecoderConfig::read(config.as_bytes(), "config.json").unwrap();
    let model = EncoderDecoder::new(&config, 1).unwrap();
    model.save(folder.path(), StoredAs::Bf16).unwrap();
    let told = succeed(&["info", text(folder.path()), "--context", "40"]);
    let told = told.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "switch_transformers: 2 layers of encoder, 3 of decoder, hidden 16, vocabulary 50",
        "encoder's layers 0 attention, 3 heads of 4 dense 12; 1184 parameters each, 1184 active",
        "1 attention, 3 heads of 4 5 experts of 12, 1 a token; 2800 parameters each, 1264 active",
        "decoder's layers 0-2 attention and cross-attention, 3 heads of 4 5 experts of 12, 1 a token;",
        "decoder's experts 5760 1152 ",
        "head 800 800 total",
        "weights, safetensors, one file BF16 32.8 kB",
        "a token written 288 a token read (cross) 288 ",
        "at 40 after 40 11.5 k more in attention",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert!(!told.contains("note"), "as many numbers as parameters: {told}");
    let (found, bare) = (info(folder.path()), info(&folder.path().join("config.json")));
    let total: usize = model.params().iter().map(|param| param.n_elements()).sum();
    assert_eq!(found["parameters"]["total"]["all"], total);
    assert_eq!(found["weights"]["types"]["BF16"]["bytes"], 2 * total);
    // Of five experts one, in one layer of the encoder and three of the decoder.
    assert_eq!(found["parameters"]["total"]["active"], total - 4 * 4 * 2 * 16 * 12);
    let parts = &found["parameters"];
    let [encoder, decoder, without] = ["encoder", "decoder", "without_embeddings"].map(|part| {
        if part.starts_with('w') { parts[part]["all"].as_u64() } else { parts[part]["total"]["all"].as_u64() }
    });
    assert_eq!(encoder.unwrap() + decoder.unwrap(), without.unwrap());
    assert_eq!(without.unwrap() as usize, total - 2 * 50 * 16);
    assert_eq!(found["flops"]["token_read"]["mixers_at_context"], 4 * 40 * 2 * 12);
    assert_eq!(found["flops"]["token_written"]["mixers_at_context"], 4 * 80 * 3 * 12);
    assert_eq!(found["cache_bytes"]["f32"]["token_written"], 3 * 2 * 12 * 4);
    for key in ["parameters", "layers", "cache_bytes", "flops"] {
        assert_eq!(bare[key], found[key], "{key}");
    }
    assert_eq!((&bare["source"], bare["weights"].is_null()), (&"config".into(), true));
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
