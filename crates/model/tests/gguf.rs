//! Models through GGUF files and back.

use moebius_kernels::formats::Format;
use moebius_model::config::{Mixer, Reach};
use moebius_model::gguf::{ExportSettings, GgufFile, write_model};
use moebius_model::{Checkpoint, Ffn, Model, ModelConfig, QkNorm, UniformDecoder};
use std::path::{Path, PathBuf};

fn config(family: &str, ffn: Ffn, tie_embeddings: bool) -> ModelConfig {
    config_with(family, ffn, tie_embeddings, QkNorm::None, false)
}

fn config_with(family: &str, ffn: Ffn, tie_embeddings: bool, qk_norm: QkNorm, qkv_bias: bool) -> ModelConfig {
    let decoder = UniformDecoder {
        family,
        vocab_size: 40,
        head_dim: 8,
        max_positions: 32,
        rope_theta: 12_345.0,
        rms_eps: 3e-6,
        tie_embeddings,
        qk_norm,
        qkv_bias,
        ffn,
        ..UniformDecoder::default()
    };
    ModelConfig { bos_token: Some(1), eos_tokens: vec![2, 3], ..decoder.config() }
}

fn moe() -> Ffn {
    Ffn::moe_of(3, 2, 32, true)
}

fn settings(format: Format) -> ExportSettings<'static> {
    ExportSettings { format, name: Some("tiny"), tokenizer: Some(TOKENIZER), chat_template: Some("{{ x }}") }
}

/// Three tokens and a merge; the ids behind them have no token.
const TOKENIZER: &[u8] =
    br#"{"added_tokens":[{"id":0,"content":"<|end|>","special":true},{"id":4,"content":"<u>","special":false}],
    "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"use_regex":true},"post_processor":null,
    "model":{"type":"BPE","byte_fallback":false,"vocab":{"<|end|>":0,"a":1,"b":2,"ab":3},"merges":[["a","b"]]}}"#;

fn export(folder: &Path, model: &Model, format: Format) -> PathBuf {
    let path = folder.join("m.gguf");
    write_model(&path, model, &settings(format)).unwrap();
    path
}

fn weights(model: &Model) -> Vec<(String, Vec<f32>)> {
    model.params().iter().map(|param| (param.name().to_string(), param.value().data().to_vec())).collect()
}

#[test]
fn exact_formats_bring_a_model_back_whole() {
    let folder = tempfile::tempdir().unwrap();
    let raw = Ffn::moe_of(3, 2, 32, false);
    for (family, ffn, qk_norm, tied) in [
        ("llama", Ffn::dense(96), QkNorm::None, true),
        ("qwen2", Ffn::dense(96), QkNorm::None, false),
        ("qwen3", Ffn::dense(96), QkNorm::Head, true),
        ("mixtral", moe(), QkNorm::None, false),
        ("olmoe", raw, QkNorm::Projection, false),
        ("qwen3_moe", moe(), QkNorm::Head, false),
    ] {
        let qkv_bias = family == "qwen2";
        let model = Model::new(&config_with(family, ffn, tied, qk_norm, qkv_bias), 5).unwrap();
        let path = export(folder.path(), &model, Format::F32);
        let again = Model::load(&Checkpoint::open(&path).unwrap()).unwrap();
        assert_eq!(
            again.config,
            ModelConfig { router_aux_loss_coef: again.config.router_aux_loss_coef, ..model.config.clone() }
        );
        assert_eq!(weights(&again), weights(&model), "{family}");
    }
}

#[test]
fn files_of_another_hand_hold_the_same_model() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    for name in ["llama", "mixtral"] {
        let wanted = Model::load(&Checkpoint::open(&fixtures.join(name)).unwrap()).unwrap();
        let checkpoint = Checkpoint::open(&fixtures.join(format!("gguf/{name}.gguf"))).unwrap();
        let found = Model::load(&checkpoint).unwrap();
        assert_eq!(
            found.config,
            ModelConfig { router_aux_loss_coef: found.config.router_aux_loss_coef, ..wanted.config.clone() }
        );
        assert_eq!(weights(&found), weights(&wanted), "{name}");
    }
}

#[test]
fn a_mistral_comes_back_as_what_llama_cpp_knows() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(&config("mistral", Ffn::dense(64), false), 1).unwrap();
    let path = export(folder.path(), &model, Format::F16);
    assert_eq!(Checkpoint::open(&path).unwrap().config().family, "llama");
    let mut windowed = model;
    for layer in &mut windowed.config.layers {
        let Mixer::Attention(attention) = &mut layer.mixer else { unreachable!("a llama") };
        attention.reach = Reach::Window(8);
    }
    let error = write_model(&path, &windowed, &settings(Format::F16)).unwrap_err().to_string();
    assert!(error.ends_with("`sliding_window`: wanted none for the architecture llama, found 8"), "{error}");
}

#[test]
fn queries_are_interleaved_and_experts_stacked() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(&config("mixtral", moe(), false), 5).unwrap();
    let path = export(folder.path(), &model, Format::F32);
    let file = GgufFile::open(&path).unwrap();
    let read = |name: &str| {
        let tensor = file.get(name).unwrap();
        let mut values = vec![0.0; tensor.shape.iter().product()];
        tensor.read_f32(&mut values);
        (tensor.shape.to_vec(), values)
    };
    let weights: std::collections::BTreeMap<String, Vec<f32>> = weights(&model).into_iter().collect();
    let (shape, query) = read("blk.1.attn_q.weight");
    assert_eq!(shape, [32, 64]);
    // Rows 0, 4, 1, 5, .. of each head of eight.
    assert_eq!(query[64..128], weights["layers.1.attention.q"][4 * 64..5 * 64]);
    assert_eq!(query[10 * 64..11 * 64], weights["layers.1.attention.q"][9 * 64..10 * 64]);
    let (shape, up) = read("blk.0.ffn_up_exps.weight");
    assert_eq!(shape, [3, 32, 64]);
    // Ours has gate and up of each expert one after the other: the second expert's up begins at row 3 * 32.
    assert_eq!(up[32 * 64..][..64], weights["layers.0.moe.gate_up"][3 * 32 * 64..][..64]);
    assert_eq!(read("blk.0.ffn_down_exps.weight").0, [3, 64, 32]);
    assert_eq!(read("blk.0.ffn_gate_inp.weight").0, [3, 64]);
}

#[test]
fn small_formats_are_used_where_they_fit() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(&config("mixtral", moe(), false), 5).unwrap();
    let path = export(folder.path(), &model, Format::Q4_0);
    let file = GgufFile::open(&path).unwrap();
    let format = |name: &str| file.get(name).unwrap().format;
    assert_eq!(format("blk.0.ffn_up_exps.weight"), Format::Q4_0);
    assert_eq!(format("blk.0.ffn_gate_inp.weight"), Format::F32);
    assert_eq!(format("blk.0.attn_norm.weight"), Format::F32);
    // The head wants six bits; 64 columns are no block of Q6_K.
    assert_eq!((format("output.weight"), format("token_embd.weight")), (Format::Q8_0, Format::Q4_0));
    let again = Model::load(&Checkpoint::open(&path).unwrap()).unwrap();
    for ((name, found), (_, wanted)) in weights(&again).into_iter().zip(weights(&model)) {
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
        let off = square(&mut found.iter().zip(&wanted).map(|(a, b)| a - b)) / square(&mut wanted.iter().copied());
        assert!(off.sqrt() < 0.11, "{name}: {off}");
    }
}

#[test]
fn the_vocabulary_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(&config("llama", Ffn::dense(96), true), 5).unwrap();
    let path = export(folder.path(), &model, Format::F32);
    let file = GgufFile::open(&path).unwrap();
    let read = file.metadata();
    let tokens = read.array("tokenizer.ggml.tokens").unwrap().texts().unwrap();
    assert_eq!((tokens.len(), &tokens[..6]), (40, &["<|end|>", "a", "b", "ab", "<u>", "[PAD5]"][..]));
    let kinds = read.array("tokenizer.ggml.token_type").unwrap().i32s().unwrap();
    assert_eq!(kinds[..6], [3, 1, 1, 1, 4, 5]);
    assert_eq!(read.array("tokenizer.ggml.merges").unwrap().texts().unwrap(), ["a b"]);
    assert_eq!(
        (read.text("tokenizer.ggml.model").unwrap(), read.text("tokenizer.ggml.pre").unwrap()),
        ("gpt2", "gpt-2")
    );
    assert_eq!(read.u32("tokenizer.ggml.eot_token_id").unwrap(), 3);
    assert_eq!(
        (read.text("tokenizer.chat_template").unwrap(), read.text("general.name").unwrap()),
        ("{{ x }}", "tiny")
    );
    assert_eq!(read.optional_flag("tokenizer.ggml.add_bos_token").unwrap(), Some(false));
    for (first, wanted) in [("SpecialToken", true), ("Sequence", false)] {
        let template = format!(r#""post_processor":{{"type":"TemplateProcessing","single":[{{"{first}":{{}}}}]}}"#);
        let text = std::str::from_utf8(TOKENIZER).unwrap().replacen(r#""post_processor":null"#, &template, 1);
        let other = folder.path().join("other.gguf");
        write_model(&other, &model, &ExportSettings { tokenizer: Some(text.as_bytes()), ..settings(Format::F32) })
            .unwrap();
        let begins = GgufFile::open(&other).unwrap().metadata().optional_flag("tokenizer.ggml.add_bos_token").unwrap();
        assert_eq!(begins, Some(wanted));
    }
    for (from, to, wanted) in [
        ("\"ab\":3", "\"ab\":40", "`vocab`: wanted an id below the model's vocabulary of 40 for \"ab\", found 40"),
        ("[\"a\",\"b\"]", "7", "`model.merges`: wanted pairs of tokens"),
        ("\"type\":\"BPE\"", "\"type\":\"Unigram\"", "`model`: wanted byte-level BPE, found \"Unigram\" \"ByteLevel\""),
        ("\"use_regex\":true", "\"use_regex\":false", "`pre_tokenizer`: llama.cpp has no name for"),
    ] {
        let text = std::str::from_utf8(TOKENIZER).unwrap().replacen(from, to, 1);
        let other = ExportSettings { tokenizer: Some(text.as_bytes()), ..settings(Format::F32) };
        let error = write_model(&path, &model, &other).unwrap_err().to_string();
        assert!(error.starts_with(&format!("tokenizer.json: {wanted}")), "{error}");
    }
}
