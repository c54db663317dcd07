//! A tiny encoder-decoder against what transformers computes (tests/fixtures/make_mixers.py made it), some of whose tokens
//! are dropped; its bits in pieces; its files.

use moebius_kernels::gemm::Precision;
use moebius_model::checkpoint::StoredAs;
use moebius_model::encoder_decoder::{DecodingState, EncoderDecoder};
use moebius_model::safetensors::{SafetensorsFile, TensorData, TensorToWrite, write_safetensors};
use moebius_model::{Batch, Observer, Silent, Survey, SurveySource};
use moebius_moe::Routing;
use moebius_tensor::{Gradients, Graph, Var};
use std::path::{Path, PathBuf};

const TOLERANCE: f32 = 1e-4;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/switch")
}

struct Golden {
    model: EncoderDecoder,
    expected: SafetensorsFile<'static>,
}

impl Golden {
    fn open() -> Self {
        let expected = SafetensorsFile::open(&folder().join("expected.safetensors")).unwrap();
        Self { model: EncoderDecoder::load(&folder()).unwrap(), expected }
    }

    fn rows(&self, name: &str) -> Vec<Vec<u32>> {
        let tensor = self.expected.tensor(name).unwrap();
        let tokens: Vec<u32> = tensor.to_i64().unwrap().into_iter().map(|token| token as u32).collect();
        tokens.chunks(tensor.shape[1]).map(<[u32]>::to_vec).collect()
    }

    fn close(&self, what: &str, found: &[f32]) {
        let wanted = self.expected.tensor(what).unwrap().to_f32().unwrap();
        assert_eq!(wanted.len(), found.len(), "{what}");
        for (i, (wanted, found)) in wanted.iter().zip(found).enumerate() {
            assert!((wanted - found).abs() < TOLERANCE, "{what}[{i}]: wanted {wanted}, found {found}");
        }
    }
}

#[derive(Default)]
struct Seen {
    hidden: Vec<Var>,
    routing: Vec<(usize, Routing)>,
}

impl Observer for Seen {
    fn hidden(&mut self, _: usize, hidden: &Var) {
        self.hidden.push(hidden.clone());
    }

    fn routing(&mut self, layer: usize, routing: &Routing) {
        self.routing.push((layer, routing.clone()));
    }
}

#[test]
fn forward_and_routing_with_dropped_tokens() {
    let golden = Golden::open();
    let (g, mut encoder, mut decoder) = (Graph::inference(Precision::F32), Seen::default(), Seen::default());
    let encoded = golden.model.encode(&g, &Batch::of_sequences(&golden.rows("input_ids")), &mut encoder).unwrap();
    golden.close("encoder_last_hidden", encoded.hidden.data());
    let targets = Batch::of_sequences(&golden.rows("decoder_input_ids"));
    let hidden = golden.model.decode(&g, &encoded, &targets, &mut decoder).unwrap();
    for (i, hidden) in decoder.hidden.iter().enumerate() {
        golden.close(&format!("hidden.{i}"), hidden.data());
    }
    golden.close("logits", golden.model.logits(&g, &hidden).data());
    let mut dropped = 0;
    for (stack, seen) in [("enc", &encoder), ("dec", &decoder)] {
        for (layer, routing) in &seen.routing {
            golden.close(&format!("router_logits.{stack}.{layer}"), routing.logits.data());
            golden.close(&format!("topk_weight.{stack}.{layer}"), routing.topk_weight.data());
            let wanted = golden.expected.tensor(&format!("topk_index.{stack}.{layer}")).unwrap().to_i64().unwrap();
            let found = routing.topk_index.iter().map(|&e| if e == u32::MAX { -1 } else { i64::from(e) });
            assert!(found.eq(wanted.iter().copied()), "{stack}.{layer}: wanted {wanted:?}");
            dropped += wanted.iter().filter(|&&expert| expert < 0).count();
        }
    }
    assert!(dropped > 0, "the fixture is there to drop tokens");
}

#[test]
fn loss_and_every_gradient() {
    let golden = Golden::open();
    let targets = golden.rows("decoder_input_ids");
    let next: Vec<u32> = targets.iter().flat_map(|row| row[1..].iter().copied().chain([u32::MAX])).collect();
    let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
    let source = Batch::of_sequences(&golden.rows("input_ids"));
    let (loss, routing) = golden.model.loss(&g, &source, &Batch::of_sequences(&targets), &next).unwrap();
    assert_eq!(routing.len(), 2);
    golden.close("loss", loss.data());
    g.backward(&loss, &mut gradients);
    let named = golden.model.named_tensors(|param| gradients.get(param.id()));
    assert_eq!(named.len(), golden.expected.tensors().filter(|tensor| tensor.name.starts_with("grad.")).count());
    for tensor in named {
        golden.close(&format!("grad.{}", tensor.name), &tensor.data);
    }
}

#[test]
fn decoding_in_pieces_gives_the_bits_of_the_whole() {
    let golden = Golden::open();
    let model = &golden.model;
    let (sources, targets) = (golden.rows("input_ids"), golden.rows("decoder_input_ids"));
    for precision in [Precision::F32, Precision::Bf16] {
        let g = Graph::inference(precision);
        let encoded = model.encode(&g, &Batch::of_sequences(&sources), &mut Silent).unwrap();
        let whole = model.decode(&g, &encoded, &Batch::of_sequences(&targets), &mut Silent).unwrap();
        let width = model.config.hidden;
        for pieces in [&[9][..], &[1; 9], &[4, 5]] {
            let mut states = model.begin(&g, &encoded).unwrap();
            let (mut found, mut first) = (vec![Vec::new(); 2], 0);
            for piece in pieces {
                let parts: Vec<(&[u32], usize)> =
                    targets.iter().map(|row| (&row[first..first + piece], first)).collect();
                let batch = Batch::continuing_together(&parts);
                let mut states: Vec<&mut DecodingState> = states.iter_mut().collect();
                let hidden = model.decode_on(&g, &mut states, &batch, &mut Silent).unwrap();
                let rows = found.iter_mut().zip(hidden.data().chunks(piece * width));
                rows.for_each(|(found, rows)| found.extend_from_slice(rows));
                first += piece;
            }
            assert!(found.concat() == whole.data(), "{precision:?} {pieces:?}");
        }
        // A sequence alone, as among others.
        let alone = model.encode(&g, &Batch::of_sequences(&sources[1..]), &mut Silent).unwrap();
        assert!(encoded.hidden.data().ends_with(alone.hidden.data()));
    }
}

#[test]
fn greedy_text() {
    let golden = Golden::open();
    let wanted = golden.expected.tensor("greedy").unwrap().to_i64().unwrap();
    let g = Graph::inference(Precision::F32);
    let found = golden.model.generate(&g, &golden.rows("input_ids")[0], wanted.len()).unwrap();
    assert!(found.iter().map(|&token| i64::from(token)).eq(wanted.iter().copied()), "{found:?} {wanted:?}");
}

#[test]
fn what_is_saved_is_loaded() {
    let golden = Golden::open();
    let folder = tempfile::tempdir().unwrap();
    golden.model.save(folder.path(), StoredAs::F32).unwrap();
    assert!(EncoderDecoder::is_in(folder.path()));
    let again = EncoderDecoder::load(folder.path()).unwrap();
    assert_eq!(again.config, golden.model.config);
    for (a, b) in again.params().into_iter().zip(golden.model.params()) {
        assert_eq!((a.name(), a.value()), (b.name(), b.value()));
    }
}

#[test]
fn bad_input_is_named() {
    let golden = Golden::open();
    let g = Graph::inference(Precision::F32);
    let encode =
        |rows: &[Vec<u32>]| golden.model.encode(&g, &Batch::of_sequences(rows), &mut Silent).err().unwrap().to_string();
    assert_eq!(encode(&[vec![1, 48]]), "token 48 at position 1: the vocabulary has 48 tokens");
    assert!(encode(&[vec![1], vec![]]).contains("wanted at least one token"));
    let folder = tempfile::tempdir().unwrap();
    assert!(!EncoderDecoder::is_in(folder.path()));
    golden.model.save(folder.path(), StoredAs::F32).unwrap();
    let config = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    std::fs::write(folder.path().join("config.json"), config.replace("\"d_ff\": 12", "\"d_ff\": 13")).unwrap();
    let error = EncoderDecoder::load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("wanted shape [13, 16], found [12, 16]"), "{error}");
}

#[test]
fn what_is_counted_is_what_is_stored() {
    let survey = Survey::open_encoder_decoder(&folder()).unwrap().unwrap();
    let (config, stored) = (&survey.config, survey.stored.unwrap());
    let found = config.inventory().unwrap();
    assert_eq!(found.total(), stored.types["F32"].elements);
    assert_eq!((stored.types.len(), stored.bytes()), (1, 4 * found.total()));
    // Two layers each, the second with three experts of 12 behind a router; 3 heads of 4, hidden 16.
    let attention = 4 * 16 * 12;
    for (stack, attentions) in [(&found.encoder, 1), (&found.decoder, 2)] {
        assert_eq!(stack.sum.mixers, 2 * attentions * attention + 8 * 3);
        assert_eq!((stack.layers[0].dense, stack.layers[0].experts), (2 * 16 * 12, 0));
        assert_eq!((stack.layers[1].dense, stack.layers[1].routers), (0, 3 * 16));
        assert_eq!((stack.layers[1].experts, stack.layers[1].chosen_experts), (3 * 2 * 16 * 12, 2 * 16 * 12));
        assert_eq!(stack.sum.norms, (2 * (attentions + 1) + 1) * 16);
    }
    assert_eq!((found.embedding, found.head), (48 * 16, 0));
    assert_eq!(found.active(), found.total() - 2 * 2 * (2 * 16 * 12));
    // A dense network, an expert and a router each; a token read also makes keys and values for two layers of the decoder.
    let networks = 2 * (2 * 16 * 12) + 3 * 16;
    let read = 2 * attention + networks + 2 * 2 * 16 * 12;
    let written = 2 * (attention + attention / 2) + networks + 48 * 16;
    let seen = |tokens: u64| 4 * tokens * 2 * 12;
    assert_eq!(config.encoder_operations(5).unwrap(), [2 * read, seen(5)]);
    assert_eq!(config.decoder_operations(5, 7).unwrap(), [2 * written, seen(12)]);
    assert_eq!(config.cache_bytes(), 2 * 2 * 12 * 4);
}

#[test]
fn copies_of_the_embedding_are_not_counted_and_other_families_are_not_told() {
    let folder = tempfile::tempdir().unwrap();
    let model = Golden::open().model;
    model.save(folder.path(), StoredAs::Bf16).unwrap();
    let named = model.named_tensors(|param| Some(param.value().data()));
    let mut tensors: Vec<TensorToWrite<'_>> = (named.iter())
        .map(|of| TensorToWrite { name: of.name.clone(), shape: of.shape.clone(), data: TensorData::BF16(&of.data) })
        .collect();
    let shared = &named.iter().find(|of| of.name == "shared.weight").unwrap();
    let (name, shape) = ("lm_head.weight".to_string(), shared.shape.clone());
    tensors.push(TensorToWrite { name, shape, data: TensorData::BF16(&shared.data) });
    write_safetensors(&folder.path().join("model.safetensors"), &tensors).unwrap();
    let survey = Survey::open_encoder_decoder(folder.path()).unwrap().unwrap();
    let stored = survey.stored.unwrap();
    assert_eq!(stored.types["BF16"].elements, survey.config.inventory().unwrap().total());
    assert_eq!(stored.left_out["copies of the embedding"].bytes, 2 * 48 * 16);
    let bare = Survey::open_encoder_decoder(&folder.path().join("config.json")).unwrap().unwrap();
    assert_eq!((bare.config, bare.source, bare.stored), (survey.config, SurveySource::Config, None));
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mixtral");
    assert!(Survey::open_encoder_decoder(&other).unwrap().is_none());
}
