//! Models through GGUF files and back.

mod common;

use common::{Metadata, Tensors, contents, weights, write_contents};
use moebius_kernels::formats::Format;
use moebius_kernels::gemm::Precision;
use moebius_model::config::{Mixer, Reach};
use moebius_model::gguf::{ExportSettings, GgufFile, ValueToWrite, write_model};
use moebius_model::{Batch, Checkpoint, Ffn, Model, ModelConfig, QkNorm, Silent, UniformDecoder, families};
use moebius_tensor::Graph;
use serde_json::{Value, json};
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
    let wanted =
        "`sliding_window`: wanted [All, All], which the architecture llama means; found [Window(8), Window(8)]";
    assert!(error.ends_with(wanted), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "only the first file");
}

/// A fixture's configuration with some keys set or (null) taken away, inside objects too.
fn patched(family: &str, patch: &Value) -> ModelConfig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family).join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    fn apply(config: &mut Value, patch: &Value) {
        for (key, value) in patch.as_object().unwrap() {
            match value {
                Value::Object(_) if config[key].is_object() => apply(&mut config[key], value),
                Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
                value => config[key] = value.clone(),
            }
        }
    }
    apply(&mut config, patch);
    families::read_config(config.to_string().as_bytes(), "config.json").unwrap()
}

/// Each architecture, by a family's fixture: what is changed there so that the architecture can say it.
fn architectures() -> Vec<(&'static str, &'static str, Value)> {
    let yarn = json!({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8});
    let mut scaled = yarn.clone();
    (scaled["mscale"], scaled["mscale_all_dim"]) = (json!(0.7), json!(0.7));
    let llama3 = json!({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16});
    let short = json!({"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.5, 2.5], "long_factor": [3.5, 4.5],
        "short_mscale": 1.25, "long_mscale": 1.25, "original_max_position_embeddings": 16});
    vec![
        ("llama", "llama", json!({"rope_parameters": llama3})),
        ("llama", "mixtral", json!({})),
        ("qwen2", "qwen2", json!({"rope_parameters": {"rope_type": "linear", "factor": 3.0}})),
        ("qwen3", "qwen3", json!({})),
        ("qwen2moe", "qwen2_moe", json!({"mlp_only_layers": []})),
        ("qwen3moe", "qwen3_moe", json!({"rope_parameters": yarn})),
        ("olmoe", "olmoe", json!({})),
        ("deepseek2", "deepseek_v2", json!({})),
        ("deepseek2", "deepseek_v3", json!({"rope_parameters": scaled})),
        ("deepseek2", "deepseek_v3", json!({"q_lora_rank": null, "rope_interleave": false, "rope_parameters": null})),
        ("glm4moe", "glm4_moe", json!({})),
        ("dots1", "dots1", json!({"layer_types": null, "sliding_window": null})),
        ("ernie4_5-moe", "ernie4_5_moe", json!({})),
        ("hunyuan-moe", "hunyuan_v1_moe", json!({})),
        ("minimax-m2", "minimax_m2", json!({})),
        ("granitemoe", "granitemoeshared", json!({})),
        ("granitemoe", "granitemoeshared", json!({"model_type": "granitemoe", "shared_intermediate_size": null})),
        ("phimoe", "phimoe", json!({"router_jitter_noise": 0.01, "rope_parameters": short})),
        ("dbrx", "dbrx", json!({"ffn_config": {"moe_normalize_expert_weights": 1.0}})),
        (
            "llama4",
            "llama4_text",
            json!({"attention_chunk_size": 8192, "floor_scale": 8192, "no_rope_layers": [1, 1],
            "layer_types": ["chunked_attention", "chunked_attention"], "interleave_moe_layer_step": 2}),
        ),
        ("gpt-oss", "gpt_oss", json!({"rope_parameters": {"truncate": false}})),
        ("grok", "grok", json!({})),
    ]
}

/// Logits of some tokens.
fn logits(model: &Model) -> Vec<f32> {
    let tokens = [1, 7, 30, 2, 2, 41, 9, 0, 12, 33, 8];
    let graph = Graph::inference(Precision::F32);
    let hidden = model.forward(&graph, &Batch::of_sequences(&[tokens]), None, &mut Silent).unwrap();
    model.logits(&graph, &hidden).data().to_vec()
}

fn are_alike(a: &Model, b: &Model) -> bool {
    logits(a).iter().zip(logits(b)).all(|(a, b)| (a - b).abs() <= 1e-5 * (1.0 + a.abs()))
}

/// Writes a file again in f32, its numbers of metadata and its tensors changed.
fn rewrite(path: &Path, change: impl FnOnce(&mut Metadata, &mut Tensors)) {
    let (mut metadata, mut tensors) = contents(path);
    change(&mut metadata, &mut tensors);
    write_contents(path, &metadata, &tensors);
}

#[test]
fn old_files_expand_latents_by_one_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(&patched("deepseek_v2", &json!({})), 5).unwrap();
    let path = export(folder.path(), &model, Format::F32);
    rewrite(&path, |metadata, tensors| {
        // Four heads: keys of 4 + 4 that turn, values of 3, a latent of 6.
        metadata.remove("deepseek2.attention.key_length_mla");
        metadata.remove("deepseek2.attention.value_length_mla");
        metadata.insert("deepseek2.attention.key_length".into(), ValueToWrite::U32(8));
        metadata.insert("deepseek2.attention.value_length".into(), ValueToWrite::U32(3));
        metadata.insert("deepseek2.attention.head_count_kv".into(), ValueToWrite::U32(4));
        metadata.remove("deepseek2.attention.q_lora_rank");
        metadata.remove("deepseek2.expert_gating_func");
        for layer in 0..2 {
            let mut take = |name: &str| tensors.remove(&format!("blk.{layer}.attn_{name}.weight")).unwrap().1;
            let (keys, values) = (take("k_b"), take("v_b"));
            let mut joined = Vec::new();
            for head in 0..4 {
                let key = &keys[head * 24..(head + 1) * 24];
                joined.extend((0..4).flat_map(|row| (0..6).map(move |col| key[col * 4 + row])));
                joined.extend(&values[head * 18..(head + 1) * 18]);
            }
            tensors.insert(format!("blk.{layer}.attn_kv_b.weight"), (vec![28, 6], joined));
        }
    });
    assert!(are_alike(&model, &Model::load(&Checkpoint::open(&path).unwrap()).unwrap()));
}

#[test]
fn other_layouts_of_the_same_tensors_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(&patched("glm4_moe", &json!({"attention_bias": false})), 5).unwrap();
    let path = export(folder.path(), &model, Format::F32);
    rewrite(&path, |metadata, tensors| {
        // Gates and ups of all experts in one tensor, queries, keys and values too, and a layer that only guesses.
        let mut take = |name: &str| tensors.remove(&format!("blk.1.{name}.weight")).unwrap();
        let ((shape, gate), (_, up)) = (take("ffn_gate_exps"), take("ffn_up_exps"));
        let size = shape[1] * shape[2];
        let both = gate.chunks(size).zip(up.chunks(size)).flat_map(|(gate, up)| [gate, up].concat()).collect();
        tensors.insert("blk.1.ffn_gate_up_exps.weight".into(), (vec![shape[0], 2 * shape[1], shape[2]], both));
        for layer in 0..2 {
            let parts = ["q", "k", "v"].map(|part| tensors.remove(&format!("blk.{layer}.attn_{part}.weight")).unwrap());
            let rows = parts.iter().map(|(shape, _)| shape[0]).sum();
            let joined = parts.iter().flat_map(|(_, values)| values.clone()).collect();
            tensors.insert(format!("blk.{layer}.attn_qkv.weight"), (vec![rows, 16], joined));
        }
        let (shape, bias) = tensors["blk.1.exp_probs_b.bias"].clone();
        tensors.insert("blk.1.exp_probs_b.bias".into(), ([&[1], &shape[..]].concat(), bias));
        tensors.insert("blk.2.nextn.enorm.weight".into(), (vec![16], vec![0.0; 16]));
        metadata.insert("glm4moe.block_count".into(), ValueToWrite::U32(3));
        metadata.insert("glm4moe.nextn_predict_layers".into(), ValueToWrite::U32(1));
    });
    assert!(are_alike(&model, &Model::load(&Checkpoint::open(&path).unwrap()).unwrap()));
    rewrite(&path, |metadata, _| drop(metadata.insert("glm4moe.expert_gating_func".into(), ValueToWrite::U32(1))));
    let error = Checkpoint::open(&path).err().unwrap().to_string();
    assert!(error.ends_with("`glm4moe.expert_gating_func`: wanted 2 (sigmoid), found 1"), "{error}");
}

#[test]
fn positions_that_cannot_be_read_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(&patched("qwen3", &json!({})), 5).unwrap();
    for (key, value, wanted) in [
        ("rope.scaling.type", ValueToWrite::Text("dynamic".into()), "found `dynamic`"),
        ("rope.scaling.type", ValueToWrite::Text("yarn".into()), "`qwen3.rope.scaling.factor`: wanted a number"),
        ("rope.scaling.type", ValueToWrite::Text("longrope".into()), "found `longrope`"),
        ("rope.dimension_count", ValueToWrite::U32(5), "wanted an even number up to the width of a head, 6, found 5"),
        ("rope.dimension_count", ValueToWrite::U32(8), "wanted an even number up to the width of a head, 6, found 8"),
        ("attention.value_length", ValueToWrite::U32(8), "wanted the width of a head, 6, found 8"),
        ("attn_logit_softcapping", ValueToWrite::F32(30.0), "wanted 0, which changes nothing"),
        ("expert_count", ValueToWrite::U32(4), "`qwen3.expert_count`: wanted 0 for this architecture"),
    ] {
        let path = export(folder.path(), &model, Format::F32);
        rewrite(&path, |metadata, _| drop(metadata.insert(format!("qwen3.{key}"), value)));
        let error = Checkpoint::open(&path).err().unwrap().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    let path = export(folder.path(), &model, Format::F32);
    rewrite(&path, |_, tensors| drop(tensors.insert("rope_freqs.weight".into(), (vec![3], vec![1.0, 0.0, 2.0]))));
    let error = Checkpoint::open(&path).err().unwrap().to_string();
    assert!(error.ends_with("tensor `rope_freqs.weight`: wanted numbers above 0, found 0"), "{error}");
}

#[test]
fn every_architecture_brings_its_models_back() {
    let folder = tempfile::tempdir().unwrap();
    for (architecture, family, patch) in architectures() {
        let model = Model::new(&patched(family, &patch), 5).unwrap();
        let path = folder.path().join("m.gguf");
        write_model(&path, &model, &settings(Format::F32)).unwrap_or_else(|error| panic!("{family}: {error}"));
        let name = GgufFile::open(&path).unwrap().metadata().text("general.architecture").unwrap().to_string();
        assert_eq!(name, architecture);
        let again = Model::load(&Checkpoint::open(&path).unwrap()).unwrap_or_else(|error| panic!("{family}: {error}"));
        assert!(are_alike(&model, &again), "{family} {patch}");
    }
}

#[test]
fn what_an_architecture_cannot_say_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let ends = json!({"truncate": true, "rope_theta": 100.0, "original_max_position_embeddings": 64});
    for (family, patch, wanted) in [
        ("qwen2_moe", json!({}), "which the architecture qwen2moe means"),
        ("dbrx", json!({}), "`ffn_config`: wanted"),
        (
            "llama4_text",
            json!({"no_rope_layers": [1, 1], "layer_types": ["chunked_attention", "chunked_attention"]}),
            "`sliding_window`: wanted [All, All], which the architecture llama4 means; found [Chunk(4), Chunk(4)]",
        ),
        ("llama4_text", json!({"attention_chunk_size": 8192}), "`rope_parameters`: wanted Some"),
        ("dots1", json!({}), "`sliding_window`: wanted [All, All]"),
        ("phimoe", json!({}), "`router_jitter_noise`: wanted 0.01, which the architecture phimoe means; found 0.2"),
        ("gpt_oss", json!({"rope_parameters": ends}), "`rope_parameters`: wanted Some"),
        ("deepseek_v3", json!({}), "`rope_parameters`: wanted Some"),
        ("jamba", json!({}), "no GGUF architecture is known for family `jamba`"),
    ] {
        let model = Model::new(&patched(family, &patch), 5).unwrap();
        let error = write_model(&path, &model, &settings(Format::F32)).unwrap_err().to_string();
        assert!(error.contains(wanted), "{family}: {error}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
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
