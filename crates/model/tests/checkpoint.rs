//! Folders: what we write we read, and so does everyone; broken ones get one line that says what and where.

use moebius_model::checkpoint::StoredAs;
use moebius_model::safetensors::{SafetensorsFile, TensorData, TensorToWrite, write_safetensors};
use moebius_model::{Checkpoint, Ffn, Model, ModelConfig, UniformDecoder, save_model};
use serde_json::{Value, json};
use std::path::Path;

fn config() -> ModelConfig {
    let decoder = UniformDecoder {
        family: "mixtral",
        vocab_size: 20,
        hidden: 8,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 4,
        max_positions: 32,
        ffn: Ffn::moe_of(3, 2, 6, true),
        ..UniformDecoder::default()
    };
    ModelConfig { router_aux_loss_coef: 0.01, eos_tokens: vec![3], ..decoder.config() }
}

fn saved(stored_as: StoredAs) -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(&config(), 1).unwrap();
    save_model(folder.path(), &model, stored_as).unwrap();
    (folder, model)
}

fn load_error(folder: &Path) -> String {
    let message = match Checkpoint::open(folder).and_then(|checkpoint| Model::load(&checkpoint)) {
        Ok(_) => panic!("a broken folder was accepted"),
        Err(error) => error.to_string(),
    };
    assert!(!message.contains('\n'), "one line: {message}");
    message
}

fn same_weights(a: &Model, b: &Model) -> bool {
    a.params().iter().zip(b.params()).all(|(a, b)| a.value() == b.value() && a.name() == b.name())
}

#[test]
fn what_is_saved_is_loaded_to_the_bit() {
    let (folder, model) = saved(StoredAs::F32);
    let loaded = Model::load(&Checkpoint::open(folder.path()).unwrap()).unwrap();
    assert_eq!(loaded.config, model.config);
    assert!(same_weights(&loaded, &model));
    let mut names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "generation_config.json", "model.safetensors"]);
}

#[test]
fn half_precision_and_shards_are_loaded() {
    let (folder, model) = saved(StoredAs::Bf16);
    let loaded = Model::load(&Checkpoint::open(folder.path()).unwrap()).unwrap();
    for (a, b) in loaded.params().iter().zip(model.params()) {
        let rounded = b.value().data().iter().map(|&x| half::bf16::from_f32(x).to_f32());
        assert!(a.value().data().iter().copied().eq(rounded), "{}", b.name());
    }
    // The same tensors in two shards.
    let path = folder.path().join("model.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    let all: Vec<_> = file.tensors().map(|t| (t.name.to_string(), t.shape.to_vec(), t.to_f32().unwrap())).collect();
    let mut map = serde_json::Map::new();
    for (shard, part) in all.chunks(all.len() / 2 + 1).enumerate() {
        let name = format!("model-{shard}.safetensors");
        let tensors: Vec<_> =
            part.iter().map(|(n, s, d)| TensorToWrite::new(n.clone(), s, TensorData::BF16(d))).collect();
        write_safetensors(&folder.path().join(&name), &tensors).unwrap();
        map.extend(part.iter().map(|(n, ..)| (n.clone(), Value::from(name.clone()))));
    }
    drop(file);
    std::fs::remove_file(&path).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    std::fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
    let sharded = Model::load(&Checkpoint::open(folder.path()).unwrap()).unwrap();
    assert!(same_weights(&sharded, &loaded));

    map.insert("lm_head.weight".into(), "../elsewhere.safetensors".into());
    std::fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
    assert!(load_error(folder.path()).contains("tensor `lm_head.weight`: wanted the name of a file beside the index"));
    map.insert("lm_head.weight".into(), "model-0.safetensors".into());
    std::fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
    let elsewhere = load_error(folder.path());
    assert!(elsewhere.contains("model-0.safetensors: tensor `lm_head.weight`: missing, although"), "{elsewhere}");
    std::fs::remove_file(folder.path().join("model-1.safetensors")).unwrap();
    map.insert("lm_head.weight".into(), "model-1.safetensors".into());
    std::fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
    assert!(load_error(folder.path()).contains("model-1.safetensors: No such file"));
}

#[test]
fn broken_weights_are_named() {
    let (folder, model) = saved(StoredAs::F32);
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(load_error(folder.path()).contains("model.safetensors: tensor `lm_head.weight`: wanted bytes within"));
    let named = moebius_model::named_tensors(&model, |param| Some(param.value().data()));
    let write = |change: &dyn Fn(&mut Vec<TensorToWrite>)| {
        let mut tensors =
            named.iter().map(|t| TensorToWrite::f32(t.name.clone(), &t.shape, &t.data)).collect::<Vec<_>>();
        change(&mut tensors);
        write_safetensors(&path, &tensors).unwrap();
        load_error(folder.path())
    };
    let missing = write(&|tensors| drop(tensors.remove(5)));
    assert!(
        missing.contains("tensor `model.layers.0.self_attn.o_proj.weight`: missing; wanted shape [8, 8]"),
        "{missing}"
    );
    let surplus = write(&|tensors| tensors.push(TensorToWrite::f32("x", &[1], &[0.0])));
    assert!(surplus.contains("tensor `x`: the mixtral configuration has no such tensor"), "{surplus}");
    let shape = write(&|tensors| tensors[0].shape = vec![8, 20]);
    assert!(shape.contains("tensor `model.embed_tokens.weight`: wanted shape [20, 8], found [8, 20]"), "{shape}");
    let dtype = write(&|tensors| tensors[0].data = TensorData::I64(&[0; 160]));
    assert!(dtype.contains("wanted F32, F16 or BF16, or F8_E4M3 with weight_scale_inv, found I64"), "{dtype}");
}

#[test]
fn a_tied_head_may_be_stored_again_if_it_is_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new(&ModelConfig { tie_embeddings: true, ..config() }, 1).unwrap();
    save_model(folder.path(), &model, StoredAs::F32).unwrap();
    let named = moebius_model::named_tensors(&model, |param| Some(param.value().data()));
    let mut head = named[0].data.to_vec();
    let write = |head: &[f32]| {
        let mut tensors =
            named.iter().map(|t| TensorToWrite::f32(t.name.clone(), &t.shape, &t.data)).collect::<Vec<_>>();
        tensors.push(TensorToWrite::f32("lm_head.weight", &[20, 8], head));
        write_safetensors(&folder.path().join("model.safetensors"), &tensors).unwrap();
    };
    write(&head);
    assert!(same_weights(&Model::load(&Checkpoint::open(folder.path()).unwrap()).unwrap(), &model));
    head[3] += 1.0;
    write(&head);
    let error = load_error(folder.path());
    assert!(error.contains("tensor `lm_head.weight`: wanted what model.embed_tokens.weight holds"), "{error}");
}

#[test]
fn broken_configurations_are_named() {
    let (folder, _) = saved(StoredAs::F32);
    let path = folder.path().join("config.json");
    let good: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let cases = [
        ("model_type", json!("mamba"), "`model_type`: family `mamba` is not known; known are dbrx, deepseek_v2"),
        ("model_type", json!("a\nb"), r"`model_type`: family `a\nb` is not known"),
        ("model_type", Value::Null, "`model_type`: wanted a text, found nothing"),
        ("hidden_size", json!("8"), "`hidden_size`: wanted a whole number, found \"8\""),
        ("hidden_size", json!(-8), "`hidden_size`: wanted a whole number, found -8"),
        ("hidden_size", json!(0), "`hidden_size`: wanted 1 to"),
        ("vocab_size", json!(u64::MAX), "`vocab_size`: wanted 1 to"),
        ("num_hidden_layers", json!(1u64 << 60), "`num_hidden_layers`: wanted 1 to"),
        ("num_key_value_heads", json!(3), "`num_key_value_heads`: wanted a divisor of num_attention_heads 2, found 3"),
        ("num_experts_per_tok", json!(4), "`num_experts_per_tok`: wanted 1 to the 3 experts, found 4"),
        ("hidden_act", json!("gelu"), "`hidden_act`: this family is computed for \"silu\" only, found \"gelu\""),
        ("rope_scaling", json!({"rope_type": "yarn"}), "`rope_scaling.factor`: wanted a number, found nothing"),
        ("head_dim", json!(3), "`head_dim`: wanted an even number, found 3"),
        ("eos_token_id", json!([1, 20]), "`eos_token_id`: wanted a token of the vocabulary of 20, found 20"),
        ("sliding_window", json!(0), "`sliding_window`: wanted at least 1"),
        ("rope_parameters", json!({"rope_type": "llama3"}), "`rope_parameters.factor`: wanted a number, found nothing"),
        ("attention_bias", json!(true), "`attention_bias`: this family is computed for false only, found true"),
        ("quantization_config", json!({"bits": 4}), "`quantization_config.quant_method`: wanted a text, found nothing"),
        ("quantization_config", json!({"quant_method": "gptq"}), "`quantization_config.quant_method`: wanted fp8"),
        ("layer_types", json!(["sliding_attention"]), "`layer_types`: wanted `full_attention` in every layer"),
        ("num_hidden_layers", json!(1 << 20), "`num_hidden_layers`: wanted 1 to 16384, found 1048576"),
        ("num_local_experts", json!(1 << 30), "`num_local_experts`: wanted 1 to 65536, found 1073741824"),
        ("max_position_embeddings", json!(0), "`max_position_embeddings`: wanted 1 to"),
        ("router_aux_loss_coef", json!(-1), "`router_aux_loss_coef`: wanted a number of at least 0, found -1"),
        ("bos_token_id", json!(20), "`bos_token_id`: wanted a token of the vocabulary of 20, found 20"),
    ];
    for (key, value, wanted) in cases {
        let mut config = good.clone();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let found = load_error(folder.path());
        assert!(found.contains("config.json: ") && found.contains(wanted), "wanted {wanted}\n found {found}");
    }
    std::fs::write(&path, b"{\"a\": \xff}").unwrap();
    assert!(load_error(folder.path()).contains("config.json: wanted JSON"));
    std::fs::remove_file(&path).unwrap();
    assert!(load_error(folder.path()).contains("config.json: No such file"));
    assert!(load_error(&folder.path().join("nowhere")).ends_with("nowhere: no such folder or file"));
}

#[test]
fn an_unwritable_place_is_an_error_and_stays_clean() {
    let (folder, model) = saved(StoredAs::F32);
    let file = folder.path().join("config.json");
    let error = save_model(&file, &model, StoredAs::F32).unwrap_err().to_string();
    assert!(error.contains("config.json: "), "{error}");
    let names = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(names, 3, "nothing new in the folder");
    let error = save_model(Path::new("/proc/nowhere"), &model, StoredAs::F32).unwrap_err().to_string();
    assert!(error.starts_with("/proc/nowhere: "), "{error}");
}
