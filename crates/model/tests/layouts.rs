//! Published layouts that our own writer does not write: FP8 by blocks, layers that predict further tokens, text models
//! inside larger ones, experts that stand together, checkpoints of hundreds of gigabytes.

use moebius_kernels::formats::Format;
use moebius_kernels::gemm::Precision;
use moebius_model::families::{find, read_config, tensors};
use moebius_model::safetensors::SafetensorsFile;
use moebius_model::{Batch, Checkpoint, Model, RunFormat, Silent, Survey};
use moebius_tensor::{Frozen, Graph};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn config(name: &str) -> Map<String, Value> {
    serde_json::from_slice(&std::fs::read(fixture(name).join("config.json")).unwrap()).unwrap()
}

/// A tensor of a file: name, type, shape, bytes.
#[derive(Clone)]
struct Stored {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn stored(name: &str) -> Vec<Stored> {
    let file = SafetensorsFile::open(&fixture(name).join("model.safetensors")).unwrap();
    let tensor = |view: moebius_model::safetensors::TensorView<'_>| Stored {
        name: view.name.into(),
        dtype: view.dtype.to_string(),
        shape: view.shape.to_vec(),
        bytes: view.bytes.to_vec(),
    };
    file.tensors().map(tensor).collect()
}

fn header(entries: impl IntoIterator<Item = (String, String, Vec<usize>, usize)>) -> (Vec<u8>, usize) {
    let (mut map, mut end) = (Map::new(), 0);
    for (name, dtype, shape, bytes) in entries {
        map.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [end, end + bytes]}));
        end += bytes;
    }
    let text = Value::Object(map).to_string();
    ([&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat(), end)
}

fn open(config: &Map<String, Value>, all: &[Stored]) -> Result<Model, String> {
    let entries = all.iter().map(|t| (t.name.clone(), t.dtype.clone(), t.shape.clone(), t.bytes.len()));
    let mut file = header(entries).0;
    all.iter().for_each(|tensor| file.extend(&tensor.bytes));
    let bytes = Value::Object(config.clone()).to_string();
    let checkpoint = Checkpoint::from_bytes(bytes.as_bytes(), &file).map_err(|error| error.to_string())?;
    Model::load(&checkpoint).map_err(|error| error.to_string())
}

fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let g = Graph::inference(Precision::F32);
    let hidden = model.forward(&g, &Batch::of_sequences(&[tokens]), None, &mut Silent).unwrap();
    model.logits(&g, &hidden).data().to_vec()
}

/// Compares the logits of a fixture, loaded in two ways, with what transformers computes with its decoded numbers.
fn compare(name: &str) -> Checkpoint<'static> {
    let folder = fixture(name);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let expected = SafetensorsFile::open(&folder.join("expected.safetensors")).unwrap();
    let tokens: Vec<u32> =
        expected.tensor("input_ids").unwrap().to_i64().unwrap().into_iter().map(|id| id as u32).collect();
    let wanted = expected.tensor("logits").unwrap().to_f32().unwrap();
    for model in
        [Model::load(&checkpoint).unwrap(), Model::load_to_run(&checkpoint, RunFormat::F32, &mut |_| ()).unwrap()]
    {
        let found = logits(&model, &tokens);
        let worst = found.iter().zip(&wanted[..]).map(|(found, wanted)| (found - wanted).abs()).fold(0.0, f32::max);
        assert!(found.len() == wanted.len() && worst < 1e-4, "{name}: {worst}");
    }
    checkpoint
}

#[test]
fn gpt_osss_own_files_give_what_their_decoded_numbers_give() {
    let checkpoint = compare("gpt_oss_mxfp4");
    let types = Survey::open(&fixture("gpt_oss_mxfp4")).unwrap().stored.unwrap().types;
    assert_eq!(types["MXFP4"].elements + types["F32"].elements, checkpoint.config().inventory().unwrap().total());
    // Run as they are stored, the experts keep their blocks.
    let model = Model::load_to_run(&checkpoint, RunFormat::AsStored, &mut |_| ()).unwrap();
    for bank in
        model.params().iter().filter(|param| param.name().ends_with("gate_up") || param.name().ends_with("down"))
    {
        let Some(Frozen::Quantised(matrices)) = bank.frozen_matrices() else {
            panic!("{} is not in blocks", bank.name())
        };
        assert!(matrices.iter().all(|matrix| matrix.format() == Format::MXFP4), "{}", bank.name());
    }
}

#[test]
fn deepseeks_own_files_give_what_their_decoded_numbers_give() {
    let (folder, checkpoint) = (fixture("deepseek_v3_fp8"), compare("deepseek_v3_fp8"));
    assert_eq!(checkpoint.left_out().into_iter().collect::<Vec<_>>(), [("multi-token prediction", 5)]);
    let survey = Survey::open(&folder).unwrap().stored.unwrap();
    assert_eq!(survey.left_out["multi-token prediction"].tensors, 5);
    let numbers: u64 = ["F8_E4M3", "F32"].iter().map(|name| survey.types[*name].elements).sum();
    assert_eq!(numbers, checkpoint.config().inventory().unwrap().total());
    // Kimi-K2 is the same under another name.
    let mut kimi = config("deepseek_v3_fp8");
    kimi.insert("model_type".into(), "kimi_k2".into());
    let same = read_config(Value::Object(kimi).to_string().as_bytes(), "config.json").unwrap();
    assert_eq!(&same, checkpoint.config());
    assert_eq!(find("kimi_k2").unwrap().name, "deepseek_v3");
}

/// Makes something wrong of a configuration and its tensors.
type Change<'c> = dyn Fn(&mut Map<String, Value>, &mut Vec<Stored>) + 'c;

#[test]
fn other_ways_to_store_fp8_are_refused_by_name() {
    let (config, all) = (config("deepseek_v3_fp8"), stored("deepseek_v3_fp8"));
    let refused = |change: &Change<'_>| {
        let (mut config, mut all) = (config.clone(), all.clone());
        change(&mut config, &mut all);
        open(&config, &all).expect_err("what is wrong is refused")
    };
    let quantised = |key: &'static str, value: Value| {
        refused(&|config, _| {
            drop(config["quantization_config"].as_object_mut().unwrap().insert(key.into(), value.clone()))
        })
    };
    const SCALES: &str = "model.layers.0.self_attn.o_proj.weight_scale_inv";
    let find = |all: &[Stored]| all.iter().position(|tensor| tensor.name == SCALES).unwrap();
    for (message, parts) in [
        (
            quantised("quant_method", json!("compressed-tensors")),
            &["quantization_config.quant_method", "found compressed-tensors"][..],
        ),
        (
            quantised("weight_block_size", Value::Null),
            &["weight_block_size", "rows and columns of a block", "found nothing"],
        ),
        (quantised("weight_block_size", json!([8])), &["weight_block_size", "another number"]),
        (quantised("weight_block_size", json!([0, 8])), &["weight_block_size", "found [0,8]"]),
        (quantised("activation_scheme", json!("static")), &["activation_scheme", "\"dynamic\""]),
        (quantised("fmt", json!("e5m2")), &["fmt", "e5m2"]),
        (
            quantised("weight_block_size", json!([8, 16])),
            &["weight_scale_inv", "wanted shape [1, 1] for blocks of [8, 16]", "found [1, 2]"],
        ),
        (
            refused(&|_, all| all.retain(|tensor| tensor.name != SCALES)),
            &["o_proj.weight`", "F8_E4M3 with weight_scale_inv, found F8_E4M3"],
        ),
        (
            refused(&|_, all| {
                let at = find(all);
                all[at].name = SCALES.replace("_scale_inv", "_scale");
            }),
            &["o_proj.weight_scale`", "no such tensor"],
        ),
        (
            refused(&|config, _| drop(config.remove("quantization_config"))),
            &["no such tensor; FP8 is read", "weight_block_size"],
        ),
        (refused(&|config, _| drop(config.remove("num_nextn_predict_layers"))), &["model.layers.2.", "no such tensor"]),
    ] {
        for part in parts {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}

/// The configuration and the tensors of a text model inside a larger one.
fn inside(
    name: &str,
    model_type: &str,
    [before, after]: [&str; 2],
    others: &[&str],
) -> (Map<String, Value>, Vec<Stored>) {
    let (mut text, mut all) = (config(name), stored(name));
    for tensor in &mut all {
        if let Some(rest) = tensor.name.strip_prefix(before) {
            tensor.name = format!("{after}{rest}");
        }
    }
    all.extend(others.iter().map(|name| Stored {
        name: name.to_string(),
        dtype: "BF16".into(),
        shape: vec![2, 3],
        bytes: vec![0; 12],
    }));
    let tied = text.remove("tie_word_embeddings").unwrap_or(false.into());
    text.remove("architectures");
    let Value::Object(config) = json!({"model_type": model_type, "text_config": text, "tie_word_embeddings": tied,
        "vision_config": {"hidden_size": 8}, "image_token_index": 3})
    else {
        unreachable!()
    };
    (config, all)
}

/// Stacks the experts of each layer, as transformers holds them in memory and Qwen publishes them.
fn with_experts_together(all: Vec<Stored>) -> Vec<Stored> {
    let (experts, mut rest): (Vec<_>, Vec<_>) = all.into_iter().partition(|tensor| tensor.name.contains(".experts."));
    let mut layers: Vec<String> =
        experts.iter().map(|tensor| tensor.name.split(".experts.").next().unwrap().to_string()).collect();
    layers.sort();
    layers.dedup();
    for layer in layers {
        let find = |expert: usize, part: &str| {
            experts.iter().find(|tensor| tensor.name == format!("{layer}.experts.{expert}.{part}_proj.weight"))
        };
        let count = (0..).take_while(|&expert| find(expert, "up").is_some()).count();
        for (name, parts) in [("gate_up_proj", &["gate", "up"][..]), ("down_proj", &["down"])] {
            let whole: Vec<&Stored> = (0..count)
                .flat_map(|expert| parts.iter().map(move |part| (expert, part)))
                .map(|(e, p)| find(e, p).unwrap())
                .collect();
            rest.push(Stored {
                name: format!("{layer}.experts.{name}"),
                dtype: whole[0].dtype.clone(),
                shape: vec![count, parts.len() * whole[0].shape[0], whole[0].shape[1]],
                bytes: whole.iter().flat_map(|tensor| tensor.bytes.clone()).collect(),
            });
        }
    }
    rest
}

#[test]
fn a_text_model_inside_a_larger_one_is_the_text_model() {
    let llama = (
        "llama4_text",
        "llama4",
        ["", "language_model."],
        &["vision_model.class_embedding", "multi_modal_projector.linear_1.weight"][..],
    );
    let qwen = (
        "qwen3_5_moe",
        "qwen3_5_moe",
        ["model.", "model.language_model."],
        &["model.visual.pos_embed.weight", "mtp.fc.weight"][..],
    );
    let tokens: Vec<u32> = (0..12).map(|i| i * 7 % 48).collect();
    for (name, model_type, renamed, others) in [llama, qwen] {
        let alone = Model::load(&Checkpoint::open(&fixture(name)).unwrap()).unwrap();
        let (config, all) = inside(name, model_type, renamed, others);
        // Llama's stand together anyway.
        for all in [Some(all.clone()), (name != "llama4_text").then(|| with_experts_together(all.clone()))]
            .into_iter()
            .flatten()
        {
            let model = open(&config, &all).unwrap();
            assert_eq!(model.config, alone.config, "{name}");
            assert!(logits(&model, &tokens) == logits(&alone, &tokens), "{name}");
        }
        let mut foreign = all.clone();
        foreign.last_mut().unwrap().name = "audio.weight".into();
        let message = open(&config, &foreign).err().unwrap();
        assert!(message.contains("`audio.weight`") && message.contains("no such tensor"), "{message}");
        let mut bare = config.clone();
        bare.remove("text_config");
        assert!(open(&bare, &all).err().unwrap().contains("`text_config`"));
        let mut martian = config.clone();
        martian["text_config"]["model_type"] = "martian".into();
        assert!(open(&martian, &all).err().unwrap().contains("`text_config.model_type`"));
    }
}

#[test]
fn experts_together_in_another_shape_are_refused() {
    let (config, all) = (config("qwen3_moe"), with_experts_together(stored("qwen3_moe")));
    assert!(open(&config, &all).is_ok());
    let mut fewer = all.clone();
    let down = fewer.iter_mut().find(|tensor| tensor.name.ends_with("experts.down_proj")).unwrap();
    down.shape.swap(1, 2);
    let message = open(&config, &fewer).err().unwrap();
    assert!(message.contains("experts.down_proj") && message.contains("wanted shape [4, 16, 8]"), "{message}");
}

/// DeepSeek-V3 as published: 163 shards of FP8, here with holes for numbers.
fn write_deepseek_v3(folder: &Path) -> u64 {
    let mut published = json!({
        "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "vocab_size": 129_280, "max_position_embeddings": 163_840, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "q_lora_rank": 1536, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_shared_experts": 1,
        "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    });
    // The layer that predicts a second token is like the last one, but for a few tensors.
    published["num_hidden_layers"] = json!(62);
    let with_predictor = read_config(published.to_string().as_bytes(), "config.json").unwrap();
    published["num_hidden_layers"] = json!(61);
    published["num_nextn_predict_layers"] = json!(1);
    std::fs::write(folder.join("config.json"), published.to_string()).unwrap();
    let mut all: Vec<(String, String, Vec<usize>, usize)> = Vec::new();
    for map in tensors(&with_predictor) {
        if all.last().is_some_and(|(name, ..)| *name == map.file_name) {
            continue;
        }
        let elements = map.file_shape.iter().product::<usize>();
        let is_plain = ["embed_tokens", "lm_head", "norm", "mlp.gate"].iter().any(|part| map.file_name.contains(part));
        if is_plain {
            all.push((map.file_name, "BF16".into(), map.file_shape, 2 * elements));
        } else {
            let scales: Vec<usize> = map.file_shape.iter().map(|size| size.div_ceil(128)).collect();
            let bytes = 4 * scales.iter().product::<usize>();
            all.push((map.file_name.clone(), "F8_E4M3".into(), map.file_shape, elements));
            all.push((format!("{}_scale_inv", map.file_name), "F32".into(), scales, bytes));
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|(name, ..)| seen.insert(name.clone()));
    let (per_shard, mut index, mut size) = (all.len().div_ceil(163), Map::new(), 0);
    for (shard, tensors) in all.chunks(per_shard).enumerate() {
        let name = format!("model-{:05}-of-00163.safetensors", shard + 1);
        index.extend(tensors.iter().map(|(tensor, ..)| (tensor.clone(), name.clone().into())));
        let (header, data) = header(tensors.to_vec());
        let mut file = File::create(folder.join(&name)).unwrap();
        file.write_all(&header).unwrap();
        file.set_len((header.len() + data) as u64).unwrap();
        size += (header.len() + data) as u64;
    }
    let index = json!({"metadata": {"total_size": size}, "weight_map": index});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    size
}

/// A number of kilobytes or bytes that the system has of this process.
#[cfg(target_os = "linux")]
fn of_process(file: &str, key: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/self/{file}")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_matches([':', ' ', '\t']).split(' ').next().unwrap().parse().unwrap()
}

/// Reads whole files neither through the system nor through memory that is mapped. (Whoever wants the figures of the command
/// keeps the folder: `MOEBIUS_KEEP_SPARSE=DIR`.)
#[cfg(target_os = "linux")]
#[test]
fn seven_hundred_gigabytes_are_told_of_from_their_headers() {
    let kept = std::env::var_os("MOEBIUS_KEEP_SPARSE").map(PathBuf::from);
    let temporary = tempfile::tempdir().unwrap();
    let folder = kept.as_deref().unwrap_or(temporary.path());
    let size = write_deepseek_v3(folder);
    assert!(size > 680_000_000_000, "{size}");
    let before = (of_process("io", "rchar"), of_process("status", "VmHWM"));
    let survey = Survey::open(folder).unwrap();
    let (read, memory) = (of_process("io", "rchar") - before.0, of_process("status", "VmHWM") - before.1);
    // The index is read through the system, headers through mapped memory, of which one shard's is there at a time.
    assert!(read < 16 << 20 && memory < 8 << 10, "{read} bytes read, {memory} kB more memory");
    let stored = survey.stored.unwrap();
    assert_eq!(stored.files, 163);
    let numbers: u64 = ["F8_E4M3", "BF16"].iter().map(|name| stored.types[*name].elements).sum();
    assert_eq!(numbers, survey.config.inventory().unwrap().total());
    assert!(stored.left_out["multi-token prediction"].bytes > 11_000_000_000);
    // What is opened to be loaded keeps the headers, and reads no numbers either.
    let checkpoint = Checkpoint::open(folder).unwrap();
    let memory = of_process("status", "VmHWM") - before.1;
    assert!(checkpoint.left_out()["multi-token prediction"] > 1500 && memory < 128 << 10, "{memory} kB more memory");
}
