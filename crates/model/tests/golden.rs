//! Tiny models against what transformers computes (tests/fixtures/make.py made them): forward, routing, loss, gradients.

use moebius_kernels::attention::CacheFormat;
use moebius_kernels::gemm::Precision;
use moebius_model::checkpoint::StoredAs;
use moebius_model::safetensors::SafetensorsFile;
use moebius_model::{Batch, Checkpoint, KvCache, LossSettings, Model, Observer, RunFormat, Silent, named_tensors};
use moebius_moe::{Routing, load_balancing_loss};
use moebius_tensor::{Gradients, Graph, Tensor, Var};
use std::path::{Path, PathBuf};

const TOLERANCE: f32 = 1e-4;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

struct Golden {
    name: &'static str,
    model: Model,
    expected: SafetensorsFile<'static>,
    sequences: Vec<Vec<u32>>,
}

fn goldens() -> Vec<Golden> {
    let open = |name| {
        let model = Model::load(&Checkpoint::open(&folder(name)).unwrap()).unwrap();
        let expected = SafetensorsFile::open(&folder(name).join("expected.safetensors")).unwrap();
        let ids = expected.tensor("input_ids").unwrap();
        let tokens: Vec<u32> = ids.to_i64().unwrap().into_iter().map(|id| id as u32).collect();
        let sequences = tokens.chunks(ids.shape[1]).map(<[u32]>::to_vec).collect();
        Golden { name, model, expected, sequences }
    };
    let with_routing = ["mixtral", "mixtral_window_tied", "olmoe", "qwen2", "qwen3", "qwen3_moe", "llama"];
    let others = [
        "qwen2_moe",
        "flex_olmo",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "glm4_moe_lite",
        "dots1",
        "gpt_oss",
        "llama4_text",
        "granitemoeshared",
        "phimoe",
        "dbrx",
        "minimax_m2",
        "ernie4_5_moe",
        "hunyuan_v1_moe",
        "grok",
    ];
    let mixers = ["qwen3_next", "qwen3_5_moe", "lfm2_moe", "jamba", "jetmoe"];
    with_routing.into_iter().chain(others).chain(mixers).map(open).collect()
}

impl Golden {
    fn close(&self, what: &str, found: &[f32]) {
        let wanted = self.expected.tensor(what).unwrap().to_f32().unwrap();
        assert_eq!(wanted.len(), found.len(), "{}: {what}", self.name);
        // Gradients may be large, and are then as precise as their largest number allows.
        let largest = wanted.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let tolerance = if what.starts_with("grad.") { TOLERANCE * largest.max(1.0) } else { TOLERANCE };
        for (i, (wanted, found)) in wanted.iter().zip(found).enumerate() {
            assert!((wanted - found).abs() < tolerance, "{}: {what}[{i}]: wanted {wanted}, found {found}", self.name);
        }
    }

    fn targets(&self) -> Vec<u32> {
        self.sequences.iter().flat_map(|row| row[1..].iter().copied().chain([u32::MAX])).collect()
    }
}

#[derive(Default)]
struct Seen {
    hidden: Vec<Var>,
    /// With the name of its place.
    routing: Vec<(String, Routing)>,
}

impl Observer for Seen {
    fn hidden(&mut self, index: usize, hidden: &Var) {
        assert_eq!(index, self.hidden.len());
        self.hidden.push(hidden.clone());
    }

    fn routing(&mut self, layer: usize, routing: &Routing) {
        self.routing.push((layer.to_string(), routing.clone()));
    }

    fn mixer_routing(&mut self, layer: usize, routing: &Routing) {
        self.routing.push((format!("attn.{layer}"), routing.clone()));
    }
}

#[test]
fn forward_and_routing() {
    for golden in goldens() {
        let g = Graph::inference(Precision::F32);
        let mut seen = Seen::default();
        let hidden = golden.model.forward(&g, &Batch::of_sequences(&golden.sequences), None, &mut seen).unwrap();
        golden.close("logits", golden.model.logits(&g, &hidden).data());
        for (i, hidden) in seen.hidden.iter().enumerate() {
            golden.close(&format!("hidden.{i}"), hidden.data());
        }
        if golden.expected.get("aux_loss").is_none() {
            continue;
        }
        for (layer, routing) in &seen.routing {
            golden.close(&format!("router_logits.{layer}"), routing.logits.data());
            golden.close(&format!("topk_weight.{layer}"), routing.topk_weight.data());
            let index = golden.expected.tensor(&format!("topk_index.{layer}")).unwrap().to_i64().unwrap();
            assert!(index.iter().copied().eq(routing.topk_index.iter().map(|&e| i64::from(e))), "{}", golden.name);
        }
        if !seen.routing.is_empty() {
            let networks = seen.routing.iter().filter(|(place, _)| !place.starts_with("attn."));
            let layers: Vec<&Routing> = networks.map(|(_, routing)| routing).collect();
            golden.close("aux_loss", load_balancing_loss(&g, &layers).data());
        }
    }
}

#[test]
fn loss_and_every_gradient_with_and_without_recomputation() {
    for golden in goldens() {
        let batch = Batch::of_sequences(&golden.sequences);
        let gradients = [false, true].map(|recompute| {
            let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
            let settings = LossSettings { recompute, ..Default::default() };
            let loss = golden.model.loss(&g, &batch, &golden.targets(), &settings).unwrap();
            golden.close("loss", loss.total.data());
            g.backward(&loss.total, &mut gradients);
            gradients
        });
        let named = |i: usize| named_tensors(&golden.model, |param| gradients[i].get(param.id()));
        assert_eq!(named(0).len(), golden.model_tensors(), "{}: a gradient for each tensor", golden.name);
        for (kept, again) in named(0).iter().zip(named(1)) {
            golden.close(&format!("grad.{}", kept.name), &kept.data);
            assert_eq!(kept.data, again.data, "{}: {} recomputed", golden.name, kept.name);
        }
    }
}

impl Golden {
    fn model_tensors(&self) -> usize {
        self.expected.tensors().filter(|tensor| tensor.name.starts_with("grad.")).count()
    }
}

#[test]
fn what_is_saved_is_what_was_published() {
    for golden in goldens() {
        let saved = tempfile::tempdir().unwrap();
        moebius_model::save_model(saved.path(), &golden.model, StoredAs::F32).unwrap();
        let again = Checkpoint::open(saved.path()).unwrap();
        assert_eq!(again.config(), &golden.model.config, "{}", golden.name);
        let open = |folder: &Path| SafetensorsFile::open(&folder.join("model.safetensors")).unwrap();
        let (ours, theirs) = (open(saved.path()), open(&folder(golden.name)));
        assert_eq!(ours.tensors().count(), theirs.tensors().count(), "{}", golden.name);
        for tensor in theirs.tensors() {
            let found = ours.tensor(tensor.name).unwrap();
            assert_eq!((found.shape, found.bytes), (tensor.shape, tensor.bytes), "{}: {}", golden.name, tensor.name);
        }
    }
}

/// Block formats take what their blocks divide; of the rest nothing is lost.
#[test]
fn every_family_runs_with_weights_that_are_only_run() {
    for golden in goldens() {
        let checkpoint = Checkpoint::open(&folder(golden.name)).unwrap();
        let model = Model::load_to_run(&checkpoint, RunFormat::F32, &mut |_| ()).unwrap();
        let g = Graph::inference(Precision::F32);
        let hidden = model.forward(&g, &Batch::of_sequences(&golden.sequences), None, &mut Silent).unwrap();
        golden.close("logits", model.logits(&g, &hidden).data());
    }
}

#[test]
fn recomputation_carries_the_routing_losses() {
    let golden = &goldens()[0];
    let batch = Batch::of_sequences(&golden.sequences);
    let gradients = [false, true].map(|recompute| {
        let (g, mut gradients) = (Graph::training(Precision::Bf16), Gradients::new());
        let settings = LossSettings { balance_coefficient: 0.5, z_coefficient: 0.25, recompute, ..Default::default() };
        let loss = golden.model.loss(&g, &batch, &golden.targets(), &settings).unwrap();
        g.backward(&loss.total, &mut gradients);
        (loss.total.data()[0], gradients)
    });
    assert_eq!(gradients[0].0, gradients[1].0);
    for param in golden.model.params() {
        let [kept, again] = [0, 1].map(|i| gradients[i].1.get(param.id()).unwrap());
        let close = kept.iter().zip(again).all(|(a, b)| (a - b).abs() <= 1e-6 * (1.0 + a.abs()));
        assert!(close, "{}", param.name());
    }
}

/// The logits of every position of a sequence, read in the pieces given.
fn logits_in_pieces(model: &Model, precision: Precision, tokens: &[u32], pieces: &[usize]) -> Vec<f32> {
    let (g, mut cache, mut all) =
        (Graph::inference(precision), KvCache::new(&model.config, CacheFormat::F32), Vec::new());
    let mut first = 0;
    for &piece in pieces {
        let batch = Batch::continuing(&tokens[first..first + piece], first);
        let hidden = model.forward(&g, &batch, Some(&mut [&mut cache]), &mut Silent).unwrap();
        all.extend_from_slice(model.logits(&g, &hidden).data());
        first += piece;
    }
    assert_eq!(first, tokens.len());
    all
}

#[test]
fn a_tokens_logits_are_the_same_bits_in_any_company() {
    for golden in goldens() {
        let (model, vocab) = (&golden.model, golden.model.config.vocab_size);
        let tokens: Vec<u32> = (0..41).map(|i| (i * 29 % vocab) as u32).collect();
        for precision in [Precision::F32, Precision::Bf16] {
            let whole = |sequences: &[&[u32]]| {
                let g = Graph::inference(precision);
                let hidden = model.forward(&g, &Batch::of_sequences(sequences), None, &mut Silent).unwrap();
                model.logits(&g, &hidden).data().to_vec()
            };
            let wanted = whole(&[&tokens]);
            for pieces in [&[41][..], &[1; 41], &[7, 1, 20, 13], &[40, 1]] {
                assert!(logits_in_pieces(model, precision, &tokens, pieces) == wanted, "{} {pieces:?}", golden.name);
            }
            let among = whole(&[&tokens[5..9], &tokens, &tokens[..1]]);
            assert!(among[4 * vocab..][..41 * vocab] == wanted, "{} among others", golden.name);
            for threads in 1..=3 {
                let pool = moebius_testkit::threads(threads);
                assert!(pool.install(|| whole(&[&tokens])) == wanted, "{} {threads} threads", golden.name);
            }
        }
    }
}

#[test]
fn greedy_text_with_and_without_cache() {
    for golden in goldens() {
        let wanted = golden.expected.tensor("greedy").unwrap().to_i64().unwrap();
        let vocab = golden.model.config.vocab_size;
        for cached in [true, false] {
            let mut tokens = golden.sequences[0].clone();
            for _ in 0..wanted.len() {
                let pieces = if cached { vec![1; tokens.len()] } else { vec![tokens.len()] };
                let logits = logits_in_pieces(&golden.model, Precision::F32, &tokens, &pieces);
                let last = &logits[logits.len() - vocab..];
                tokens.push(moebius_kernels::select::argmax(last).unwrap() as u32);
            }
            let found = tokens[golden.sequences[0].len()..].iter().map(|&token| i64::from(token));
            assert!(found.eq(wanted.iter().copied()), "{}", golden.name);
        }
    }
}

#[test]
fn inputs_that_the_model_lacks_are_errors() {
    let model = &goldens()[0].model;
    let forward = |batch: &Batch| {
        model.forward(&Graph::inference(Precision::F32), batch, None, &mut Silent).err().unwrap().to_string()
    };
    assert_eq!(forward(&Batch::of_sequences(&[[1, 48]])), "token 48 at position 1: the vocabulary has 48 tokens");
    assert_eq!(forward(&Batch::of_sequences(&[[1; 65]])), "a sequence of 65 tokens: the model's context has 64");
    let empty = Batch::of_sequences::<[u32; 0]>(&[]);
    let hidden = model.forward(&Graph::inference(Precision::F32), &empty, None, &mut Silent).unwrap();
    assert_eq!(hidden.value(), &Tensor::zeros(&[0, 16]));
}
