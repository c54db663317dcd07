//! What the tests of the command share: running it, a tiny model, a tiny text.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

/// The command, with no colours forced by the surroundings.
pub fn moebius() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moebius"));
    command.env_remove("NO_COLOR").stdin(Stdio::null());
    command
}

/// Runs the command to its end.
pub fn run(arguments: &[&str]) -> Output {
    moebius().args(arguments).output().expect("the command starts")
}

/// Runs the command with bytes on standard input.
pub fn run_with_input(arguments: &[&str], input: &[u8]) -> Output {
    let mut command = moebius();
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the command starts");
    // The command may fail before it reads.
    let _ = child.stdin.take().expect("piped").write_all(input);
    child.wait_with_output().expect("the command ends")
}

/// Standard output of a run that must succeed.
pub fn succeed(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    stdout(&output)
}

/// Standard output as text.
pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

/// Asserts the shape of a failure: exit status 1, nothing on standard output, one line with every one of `parts`.
pub fn assert_fails(what: &str, output: &Output, parts: &[&str]) {
    let line = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{what}: {line}");
    assert_eq!(stdout(output), "", "{what}");
    assert!(line.starts_with("error: ") && line.ends_with('\n') && line.lines().count() == 1, "{what}: {line:?}");
    for part in parts {
        assert!(line.contains(part), "{what}: {part:?} is missing in {line:?}");
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Vocabulary of the tiny model: the end token and the 256 bytes.
pub const VOCABULARY: usize = 257;

/// The tiny model's configuration, in Mixtral's words.
pub fn config() -> Value {
    json!({
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 32,
        "intermediate_size": 24, "max_position_embeddings": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "float32",
        "router_aux_loss_coef": 0.001, "vocab_size": VOCABULARY, "eos_token_id": 0
    })
}

/// Names and shapes of the tiny model's tensors.
fn shapes() -> Vec<(String, Vec<usize>)> {
    let mut shapes = vec![
        ("lm_head.weight".to_string(), vec![VOCABULARY, 32]),
        ("model.embed_tokens.weight".to_string(), vec![VOCABULARY, 32]),
        ("model.norm.weight".to_string(), vec![32]),
    ];
    for layer in 0..2 {
        let mut add =
            |name: String, shape: &[usize]| shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        for expert in 0..4 {
            for (part, shape) in [("w1", [24, 32]), ("w2", [32, 24]), ("w3", [24, 32])] {
                add(format!("block_sparse_moe.experts.{expert}.{part}.weight"), &shape);
            }
        }
        add("block_sparse_moe.gate.weight".into(), &[4, 32]);
        add("input_layernorm.weight".into(), &[32]);
        add("post_attention_layernorm.weight".into(), &[32]);
        for (part, shape) in [("q", [32, 32]), ("k", [16, 32]), ("v", [16, 32]), ("o", [32, 32])] {
            add(format!("self_attn.{part}_proj.weight"), &shape);
        }
    }
    shapes
}

/// A tensor for [`write_safetensors`].
pub struct FileTensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl FileTensor {
    pub fn f32(name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.into(), dtype: "F32", shape: shape.to_vec(), bytes }
    }

    pub fn i64(name: &str, shape: &[usize], values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.into(), dtype: "I64", shape: shape.to_vec(), bytes }
    }
}

/// Writes a safetensors file with nobody's help, so that the reader is tested against another hand.
pub fn write_safetensors(path: &Path, tensors: &[FileTensor]) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for tensor in tensors {
        let begin = data.len();
        data.extend_from_slice(&tensor.bytes);
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()]});
        header.insert(tensor.name.clone(), entry);
    }
    write_safetensors_parts(path, &Value::Object(header).to_string(), &data);
}

/// A safetensors file of any header.
pub fn write_safetensors_parts(path: &Path, header: &str, data: &[u8]) {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    std::fs::write(path, file).expect("the file is written");
}

/// Reads a safetensors file: (name, dtype, shape, bytes).
pub fn read_safetensors(path: &Path) -> Vec<FileTensor> {
    let file = std::fs::read(path).expect("the file is there");
    let length = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + length]).expect("a header");
    let entries = header.as_object().expect("an object").iter().filter(|(name, _)| *name != "__metadata__");
    let tensors = entries.map(|(name, entry)| {
        let offset = |at: usize| 8 + length + entry["data_offsets"][at].as_u64().expect("an offset") as usize;
        let shape = entry["shape"].as_array().expect("a shape").iter();
        FileTensor {
            name: name.clone(),
            dtype: match entry["dtype"].as_str() {
                Some("F32") => "F32",
                Some("I64") => "I64",
                other => panic!("{other:?}"),
            },
            shape: shape.map(|size| size.as_u64().expect("a size") as usize).collect(),
            bytes: file[offset(0)..offset(1)].to_vec(),
        }
    });
    tensors.collect()
}

/// The tiny model's tensors: noise from a small generator, scaled so that the logits differ well.
pub fn tensors() -> Vec<FileTensor> {
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.9
    };
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let count = shape.iter().product();
        let values: Vec<f32> =
            if name.ends_with("norm.weight") { vec![1.0; count] } else { (0..count).map(|_| noise()).collect() };
        FileTensor::f32(&name, &shape, &values)
    };
    shapes().into_iter().map(tensor).collect()
}

/// Writes the tiny model as a folder in Hugging Face's layout.
pub fn write_model(folder: &Path) -> PathBuf {
    std::fs::create_dir_all(folder).expect("a folder");
    let write = |name: &str, json: &Value| std::fs::write(folder.join(name), json.to_string()).expect("a file");
    write("config.json", &config());
    write("generation_config.json", &json!({"eos_token_id": 0}));
    write("tokenizer.json", &tokenizer());
    write_safetensors(&folder.join("model.safetensors"), &tensors());
    folder.to_path_buf()
}

/// A byte-level tokenizer: token 0 ends a text, byte b is token b + 1.
fn tokenizer() -> Value {
    let mut spare = 256..;
    let letter = |b: u32| match b {
        33..=126 | 161..=172 | 174..=255 => b,
        _ => spare.next().expect("endless"),
    };
    let letters: Vec<char> = (0..256u32).map(letter).map(|b| char::from_u32(b).expect("a letter")).collect();
    let mut vocab = serde_json::Map::new();
    vocab.insert("<|end|>".into(), 0.into());
    for (byte, letter) in letters.iter().enumerate() {
        vocab.insert(letter.to_string(), (byte + 1).into());
    }
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": byte_level,
        "post_processor": null, "decoder": byte_level,
        "added_tokens": [{"id": 0, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}

/// Writes a text of made-up sentences and a recipe that trains on it; gives the recipe's path.
pub fn write_recipe(folder: &Path, steps: usize) -> PathBuf {
    const WORDS: [&str; 16] = [
        "the", "sea", "old", "man", "and", "went", "down", "a", "ship", "of", "stars", "in", "night", "cold", "was",
        "light",
    ];
    let sentences = |seed: usize, count: usize| {
        let mut state = seed;
        let mut text = String::new();
        for at in 0..count {
            state = (state * 1_103_515_245 + 12_345) & 0x7FFF_FFFF;
            text.push_str(WORDS[(state >> 16) % WORDS.len()]);
            text.push_str(if at % 9 == 8 { ".\n" } else { " " });
        }
        text
    };
    std::fs::write(folder.join("train.txt"), sentences(1, 6000)).expect("a file");
    std::fs::write(folder.join("valid.txt"), sentences(2, 900)).expect("a file");
    let recipe = format!(
        "[model]\nhidden = 32\nlayers = 2\nheads = 4\nkv_heads = 2\nffn = 48\nexperts = 4\nexperts_per_token = 2\n\
         context = 64\n\n[tokenizer]\nvocab_size = 300\n\n[data]\ntrain = [\"train.txt\"]\nvalid = [\"valid.txt\"]\n\n\
         [train]\nseed = 7\nsteps = {steps}\nsequence_length = 32\nsequences = 8\nvalidate_every = 20\n\
         validate_batches = 2\nsave_every = 10\n\n[optimizer]\nlearning_rate = 3e-3\nminimum_learning_rate = 3e-4\n\
         warmup_steps = 5\n\n[balance]\nload_balancing = 0.01\nz = 0.001\n"
    );
    let path = folder.join("recipe.toml");
    std::fs::write(&path, recipe).expect("a file");
    path
}
