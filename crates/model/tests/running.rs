//! Models that are only run: the same answers as trained ones where nothing is rounded, one answer a token whatever the
//! company, in every format, and packed folders that give back what was packed.

use moebius_kernels::attention::CacheFormat;
use moebius_kernels::formats::Format;
use moebius_kernels::gemm::Precision;
use moebius_kernels::isa::{Isa, with_isa};
use moebius_kernels::quantised::PACKED_FORMATS;
use moebius_model::checkpoint::StoredAs;
use moebius_model::packed::{is_packed, save_packed};
use moebius_model::safetensors::{SafetensorsFile, TensorData, TensorToWrite, write_safetensors};
use moebius_model::{
    Batch, Checkpoint, Ffn, KvCache, Model, ModelConfig, RunFormat, Silent, UniformDecoder, save_model,
};
use moebius_tensor::{Frozen, Graph};
use proptest::prelude::*;
use std::path::Path;

fn config() -> ModelConfig {
    let decoder = UniformDecoder {
        family: "mixtral",
        vocab_size: 72,
        hidden: 256,
        head_dim: 64,
        max_positions: 600,
        ffn: Ffn::moe_of(4, 2, 256, true),
        ..UniformDecoder::default()
    };
    decoder.config()
}

fn saved(stored_as: StoredAs) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut model = Model::new(&config(), 5).unwrap();
    // Large weights, so that the model has opinions.
    for param in model.params_mut().into_iter().filter(|param| !param.name().ends_with("norm")) {
        param.update(|weights| weights.iter_mut().for_each(|weight| *weight *= 4.0));
    }
    save_model(folder.path(), &model, stored_as).unwrap();
    folder
}

fn to_run(folder: &Path, format: RunFormat) -> Model {
    Model::load_to_run(&Checkpoint::open(folder).unwrap(), format, &mut |_| ()).unwrap()
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i * 31 % 72).collect()
}

/// Bits of the logits of all tokens, read in chunks over a cache.
fn logits(model: &Model, precision: Precision, tokens: &[u32], chunks: &[usize]) -> Vec<u32> {
    logits_over(CacheFormat::Bf16, model, precision, tokens, chunks)
}

fn logits_over(format: CacheFormat, model: &Model, precision: Precision, tokens: &[u32], chunks: &[usize]) -> Vec<u32> {
    let (g, mut cache) = (Graph::inference(precision), KvCache::new(&model.config, format));
    let (mut first, mut all) = (0, Vec::new());
    for &count in chunks {
        let batch = Batch::continuing(&tokens[first..first + count], first);
        let hidden = model.forward(&g, &batch, Some(&mut [&mut cache]), &mut Silent).unwrap();
        all.extend(model.logits(&g, &hidden).data().iter().map(|x| x.to_bits()));
        first += count;
    }
    all
}

#[test]
fn unrounded_weights_answer_as_the_model_that_was_saved() {
    for (stored_as, format, precision) in [
        (StoredAs::F32, RunFormat::F32, Precision::F32),
        (StoredAs::Bf16, RunFormat::AsStored, Precision::Bf16),
        (StoredAs::Bf16, RunFormat::Bf16, Precision::Bf16),
    ] {
        let folder = saved(stored_as);
        let whole = Model::load(&Checkpoint::open(folder.path()).unwrap()).unwrap();
        let tokens = tokens(20);
        let wanted = logits(&whole, precision, &tokens, &[20]);
        assert_eq!(logits(&to_run(folder.path(), format), precision, &tokens, &[20]), wanted, "{format}");
    }
}

#[test]
fn every_format_is_near_and_the_finer_the_nearer() {
    let folder = saved(StoredAs::F32);
    let tokens = tokens(24);
    let values = |format| -> Vec<f32> {
        logits(&to_run(folder.path(), format), Precision::F32, &tokens, &[24]).into_iter().map(f32::from_bits).collect()
    };
    let exact = values(RunFormat::F32);
    let norm = exact.iter().map(|x| x * x).sum::<f32>().sqrt();
    let error = |format| {
        let found = values(RunFormat::Block(format));
        found.iter().zip(&exact).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt() / norm
    };
    // Random weights lose a third of their norm in two bits, a sixth in three, layer after layer.
    let errors = [Format::Q8_0, Format::Q6_K, Format::Q5_K, Format::Q4_K, Format::Q3_K, Format::Q2_K].map(error);
    assert!(errors.is_sorted() && errors[4] < 0.75 && errors[5] < 1.0, "{errors:?}");
    for format in PACKED_FORMATS.into_iter().filter(|format| ![Format::Q2_K, Format::Q3_K].contains(format)) {
        assert!(error(format) < 0.5, "{}", format.name());
    }
}

/// Every format that a model can be run in.
fn formats() -> Vec<RunFormat> {
    [RunFormat::F32, RunFormat::Bf16].into_iter().chain(PACKED_FORMATS.map(RunFormat::Block)).collect()
}

/// That of a format's products.
fn precision_of(format: RunFormat) -> Precision {
    if format == RunFormat::F32 { Precision::F32 } else { Precision::Bf16 }
}

#[test]
fn five_hundred_and_twelve_tokens_are_the_bits_of_one_by_one() {
    let (folder, tokens) = (saved(StoredAs::F32), tokens(512));
    for format in formats() {
        let (model, precision) = (to_run(folder.path(), format), precision_of(format));
        let whole = logits(&model, precision, &tokens, &[512]);
        assert!(logits(&model, precision, &tokens, &[1; 512]) == whole, "{format}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn one_token_has_one_answer_in_every_format(
        format in prop::sample::select(formats()), isa in prop::sample::select(Isa::available()),
        threads in 1usize..4, alone in 1usize..4,
        length in 1usize..=512, mut cuts in prop::collection::vec(1usize..512, 0..6),
        cache in prop::sample::select(vec![CacheFormat::F32, CacheFormat::Bf16, CacheFormat::Q8]),
    ) {
        let (folder, tokens) = (saved(StoredAs::F32), tokens(length));
        let (model, precision) = (to_run(folder.path(), format), precision_of(format));
        let wanted = with_isa(isa, || logits_over(cache, &model, precision, &tokens, &[length]));
        cuts.retain(|&cut| cut < length);
        cuts.push(length);
        cuts.sort_unstable();
        cuts.dedup();
        let mut before = 0;
        let chunks: Vec<usize> = cuts.iter().map(|&cut| std::mem::replace(&mut before, cut)).zip(&cuts)
            .map(|(start, end)| end - start).collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let found = pool.install(|| with_isa(isa, || logits_over(cache, &model, precision, &tokens, &chunks)));
        prop_assert!(found == wanted, "{:?}", chunks);
        // Beside other sequences.
        let together: Vec<u32> = with_isa(isa, || {
            let g = Graph::inference(precision);
            let mut caches: Vec<KvCache> = (0..=alone).map(|_| KvCache::new(&model.config, cache)).collect();
            let (mut caches, parts) = (caches.iter_mut().collect::<Vec<_>>(), vec![(tokens.as_slice(), 0); alone + 1]);
            let batch = Batch::continuing_together(&parts);
            let hidden = model.forward(&g, &batch, Some(&mut caches), &mut Silent).unwrap();
            model.logits(&g, &hidden).data().iter().map(|x| x.to_bits()).collect()
        });
        prop_assert!(together == wanted.repeat(alone + 1));
    }
}

#[test]
fn quantised_products_are_alike_on_every_instruction_set() {
    let folder = saved(StoredAs::F32);
    let model = to_run(folder.path(), RunFormat::Block(Format::Q4_K));
    let tokens = tokens(9);
    let run = |isa| with_isa(isa, || logits(&model, Precision::F32, &tokens, &[9]));
    for isa in Isa::available() {
        let found = run(isa);
        // The router's f32 products add in other orders, which moves the last bits.
        let near = |(a, b): (&u32, &u32)| (f32::from_bits(*a) - f32::from_bits(*b)).abs() < 1e-2;
        assert!(found.iter().zip(&run(Isa::Portable)).all(near), "{isa}");
    }
}

#[test]
fn a_packed_folder_gives_back_what_was_packed() {
    for format in [RunFormat::Bf16, RunFormat::Block(Format::Q4_K), RunFormat::Block(Format::MXFP4)] {
        let (folder, packed) = (saved(StoredAs::F32), tempfile::tempdir().unwrap());
        let model = to_run(folder.path(), format);
        let target = packed.path().join("new");
        let mut told = Vec::new();
        save_packed(&target, &model, &mut |progress| told.push((progress.done, progress.total))).unwrap();
        assert!(is_packed(&target));
        let weights = SafetensorsFile::open(&target.join("packed.safetensors")).unwrap();
        let bytes = weights.tensors().map(|tensor| tensor.bytes.len()).sum();
        assert_eq!((told.last(), told.is_sorted()), (Some(&(bytes, bytes)), true));
        let opened = Model::open_packed(&target).unwrap();
        let tokens = tokens(17);
        let bits = |model| logits(model, Precision::Bf16, &tokens, &[17]);
        assert_eq!(bits(&opened), bits(&model), "{format}");
        let error = Checkpoint::open(&target).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("can only be run"), "{error}");
    }
}

#[test]
fn an_expert_is_one_stretch_of_whole_pages() {
    const PAGE: usize = 4096;
    let (folder, packed) = (saved(StoredAs::F32), tempfile::tempdir().unwrap());
    let model = to_run(folder.path(), RunFormat::Block(Format::Q4_K));
    save_packed(packed.path(), &model, &mut |_| ()).unwrap();
    let file = SafetensorsFile::open(&packed.path().join("packed.safetensors")).unwrap();
    let params = model.params();
    let matrices = |name: &str| match params.iter().find(|param| param.name() == name).unwrap().frozen_matrices() {
        Some(Frozen::Quantised(matrices)) => matrices,
        _ => panic!("{name} is not in blocks"),
    };
    for layer in 0..model.config.n_layers() {
        let experts = file.tensor(&format!("layers.{layer}.moe.experts")).unwrap();
        let [gate_up, down] = ["gate_up", "down"].map(|part| matrices(&format!("layers.{layer}.moe.{part}")));
        assert_eq!(experts.shape[0], 4);
        // The file is mapped from a page on, so that addresses tell of places in it.
        assert!(experts.bytes.as_ptr().addr().is_multiple_of(PAGE) && experts.shape[1].is_multiple_of(PAGE));
        for (expert, found) in experts.bytes.chunks_exact(experts.shape[1]).enumerate() {
            let wanted = [gate_up[expert].bytes(), down[expert].bytes()].concat();
            assert!(found.starts_with(&wanted), "layer {layer}, expert {expert}");
            assert!(found.len() < wanted.len() + PAGE && found[wanted.len()..].iter().all(|&byte| byte == 0));
        }
    }
}

#[test]
fn broken_packed_folders_are_refused_by_name() {
    let (folder, packed) = (saved(StoredAs::F32), tempfile::tempdir().unwrap());
    save_packed(packed.path(), &to_run(folder.path(), RunFormat::Block(Format::Q8_0)), &mut |_| ()).unwrap();
    let error = || Model::open_packed(packed.path()).map(|_| ()).unwrap_err().to_string();
    let change = |file: &str, edit: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        let path = packed.path().join(file);
        let old = std::fs::read(&path).unwrap();
        std::fs::write(&path, edit(old.clone())).unwrap();
        let message = error();
        std::fs::write(&path, old).unwrap();
        message
    };
    let replace = |from: &'static str, to: &'static str| {
        move |old: Vec<u8>| String::from_utf8(old).unwrap().replacen(from, to, 1).into_bytes()
    };
    for (from, to, wanted) in [
        ("\"version\": 2", "\"version\": 1", "wanted 2, found 1: pack the model again"),
        ("q8_0", "q9_0", "found `q9_0`"),
        ("q8_0", "f16", "is packed in f16"),
        ("\"layers.0.moe.gate_up\"", "\"layers.7.moe.gate_up\"", "`layers.0.moe.gate_up`: no format"),
    ] {
        let found = change("packed.json", &replace(from, to));
        assert!(found.contains("packed.json") && found.contains(wanted), "{found}");
    }
    // A known format, but of other bytes than the file's: of a matrix, of experts' first part and of their second.
    for name in ["embedding", "layers.0.moe.gate_up", "layers.0.moe.down"] {
        let renamed = |old: Vec<u8>| {
            let mut index: serde_json::Value = serde_json::from_slice(&old).unwrap();
            index["formats"][name] = "q4_0".into();
            index.to_string().into_bytes()
        };
        let found = change("packed.json", &renamed);
        assert!(found.contains("packed.safetensors: tensor `") && found.contains("found U8 of shape ["), "{found}");
    }
    let scalar = TensorToWrite::new("embedding", &[], TensorData::Bytes(vec![&[7]]));
    let path = packed.path().join("other");
    write_safetensors(&path, &[scalar]).unwrap();
    let found = change("packed.safetensors", &|_| std::fs::read(&path).unwrap());
    assert!(found.contains("tensor `embedding`: wanted 1 rows") && found.ends_with("found U8 of shape []"), "{found}");
    let found = change("packed.safetensors", &|old| old[..old.len() - 1000].to_vec());
    assert!(found.contains("packed.safetensors"), "{found}");
    let found = change("config.json", &replace("\"hidden_size\": 256", "\"hidden_size\": 512"));
    assert!(found.contains("packed.safetensors") && found.contains("wanted"), "{found}");
    assert!(error_of_opening(packed.path()).is_none());
}

fn error_of_opening(folder: &Path) -> Option<String> {
    Model::open_packed(folder).err().map(|error| error.to_string())
}

#[test]
fn a_model_that_is_run_is_not_trained() {
    let folder = saved(StoredAs::F32);
    let model = to_run(folder.path(), RunFormat::Block(Format::Q8_0));
    let g = Graph::training(Precision::F32);
    let error = model.forward(&g, &Batch::of_sequences(&[tokens(4)]), None, &mut Silent).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("held for running only"), "{error}");
}
