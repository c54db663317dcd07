//! Every family's experts in block formats: packed in memory and from a folder the same bits, and near the exact numbers.

use moebius_kernels::formats::Format;
use moebius_kernels::gemm::Precision;
use moebius_model::checkpoint::StoredAs;
use moebius_model::families::read_config;
use moebius_model::packed::save_packed;
use moebius_model::{Batch, Checkpoint, Model, ModelConfig, RunFormat, Silent, save_model};
use moebius_tensor::{Frozen, Graph};
use serde_json::Value;
use std::path::Path;

/// Four times as wide as a fixture, enough for blocks of 32.
fn widened(value: &mut Value) {
    const WIDTHS: [&str; 6] = [
        "hidden_size",
        "d_model",
        "intermediate_size",
        "intermediate_size_mlp",
        "moe_intermediate_size",
        "ffn_hidden_size",
    ];
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                let is_width = WIDTHS.contains(&&key[..]) || key.starts_with("shared_");
                match value.as_u64().filter(|_| is_width) {
                    Some(width) => *value = (4 * width).next_multiple_of(32).into(),
                    None => widened(value),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(widened),
        _ => {}
    }
}

/// The fixtures' families, each once.
fn configs() -> Vec<ModelConfig> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut names: Vec<_> = std::fs::read_dir(fixtures).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    let mut all: Vec<ModelConfig> = Vec::new();
    for path in names.into_iter().map(|folder| folder.join("config.json")).filter(|path| path.exists()) {
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        widened(&mut json);
        let Ok(config) = read_config(json.to_string().as_bytes(), &path.display().to_string()) else {
            // An encoder-decoder is none of these models.
            assert_eq!(json["model_type"], "switch_transformers", "{}", path.display());
            continue;
        };
        if config.moe().is_some() && all.iter().all(|other| other.family != config.family) {
            all.push(config);
        }
    }
    all
}

fn logits(model: &Model) -> Vec<f32> {
    let tokens: Vec<u32> = (0..20).map(|i| i * 31 % 48).collect();
    let g = Graph::inference(Precision::F32);
    let hidden = model.forward(&g, &Batch::of_sequences(&[tokens]), None, &mut Silent).unwrap();
    model.logits(&g, &hidden).data().to_vec()
}

/// The relative error of a token's logits that half of the tokens stay below: where an expert is just not chosen any more,
/// the token's own is large.
fn median_error(found: &[f32], wanted: &[f32], vocab: usize) -> f32 {
    let norm = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| x * x).sum::<f32>().sqrt();
    let mut errors: Vec<f32> = (found.chunks(vocab).zip(wanted.chunks(vocab)))
        .map(|(found, wanted)| {
            norm(&mut found.iter().zip(wanted).map(|(a, b)| a - b)) / norm(&mut wanted.iter().copied())
        })
        .collect();
    errors.sort_by(f32::total_cmp);
    errors[errors.len() / 2]
}

#[test]
fn experts_of_every_family_run_in_blocks_and_from_packed_folders() {
    let configs = configs();
    assert!(configs.len() >= 23, "{}", configs.len());
    for config in configs {
        let (family, folder) = (&config.family, tempfile::tempdir().unwrap());
        let mut model = Model::new(&config, 5).unwrap();
        for param in model.params_mut().into_iter().filter(|param| param.shape().len() > 1) {
            param.update(|weights| weights.iter_mut().for_each(|weight| *weight *= 4.0));
        }
        save_model(folder.path(), &model, StoredAs::F32).unwrap();
        let (exact, checkpoint) = (logits(&model), Checkpoint::open(folder.path()).unwrap());
        for (format, tolerance) in [(Format::Q8_0, 0.1), (Format::Q4_0, 0.5)] {
            let in_memory = Model::load_to_run(&checkpoint, RunFormat::Block(format), &mut |_| ()).unwrap();
            let banks = || {
                in_memory
                    .params()
                    .into_iter()
                    .filter(|param| param.name().contains(".moe.") && param.shape().len() == 3)
            };
            assert!(banks().count() >= 2, "{family}");
            for bank in banks().filter(|bank| !bank.name().ends_with("bias")) {
                let Some(Frozen::Quantised(matrices)) = bank.frozen_matrices() else {
                    panic!("{family}: {} {:?} is not in blocks", bank.name(), bank.shape());
                };
                assert!(matrices.iter().all(|matrix| matrix.format() == format), "{family}: {}", bank.name());
            }
            let found = logits(&in_memory);
            let error = median_error(&found, &exact, config.vocab_size);
            assert!(error < tolerance, "{family} in {}: {error}", format.name());
            let packed = folder.path().join(format.name());
            save_packed(&packed, &in_memory, &mut |_| ()).unwrap();
            assert!(logits(&Model::open_packed(&packed).unwrap()) == found, "{family} in {}", format.name());
        }
    }
}
