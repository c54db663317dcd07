//! One token, one answer, on a model large enough that the kernels share its work among threads.

use moebius_kernels::attention::CacheFormat;
use moebius_kernels::gemm::Precision;
use moebius_model::{Batch, Ffn, KvCache, LossSettings, Model, Silent, UniformDecoder};
use moebius_tensor::{Gradients, Graph};

/// More tokens than a block of any kernel, and an odd number of them.
const TOKENS: usize = 301;

fn model(window: Option<usize>) -> Model {
    let decoder = UniformDecoder {
        family: "mixtral",
        vocab_size: 700,
        hidden: 128,
        head_dim: 32,
        max_positions: 512,
        window,
        tie_embeddings: window.is_some(),
        ffn: Ffn::moe_of(5, 2, 200, true),
        ..UniformDecoder::default()
    };
    let config = decoder.config();
    let mut model = Model::new(&config, 3).unwrap();
    // Weights as large as a trained model's: with the initial ones all experts and keys are nearly alike.
    for param in model.params_mut().into_iter().filter(|param| param.shape().len() > 1) {
        param.update(|weights| weights.iter_mut().for_each(|w| *w *= 5.0));
    }
    model
}

fn tokens(first: usize) -> Vec<u32> {
    (first..first + TOKENS).map(|i| (i * i * 31 % 700) as u32).collect()
}

fn whole(model: &Model, precision: Precision, sequences: &[&[u32]]) -> Vec<f32> {
    let g = Graph::inference(precision);
    let hidden = model.forward(&g, &Batch::of_sequences(sequences), None, &mut Silent).unwrap();
    model.logits(&g, &hidden).data().to_vec()
}

fn in_pieces(model: &Model, precision: Precision, tokens: &[u32], pieces: &[usize]) -> Vec<f32> {
    let (g, mut cache, mut all) =
        (Graph::inference(precision), KvCache::new(&model.config, CacheFormat::F32), Vec::new());
    for &piece in pieces {
        let first = cache.len();
        let batch = Batch::continuing(&tokens[first..first + piece], first);
        let hidden = model.forward(&g, &batch, Some(&mut [&mut cache]), &mut Silent).unwrap();
        all.extend_from_slice(model.logits(&g, &hidden).data());
    }
    assert_eq!(cache.len(), tokens.len());
    all
}

#[test]
fn logits_depend_on_neither_pieces_nor_company_nor_threads() {
    for window in [None, Some(100)] {
        let (model, own) = (model(window), tokens(0));
        for precision in [Precision::F32, Precision::Bf16] {
            let wanted = moebius_testkit::threads(1).install(|| whole(&model, precision, &[&own]));
            assert!(wanted.iter().all(|logit| logit.is_finite()));
            for threads in [1, 2, 3] {
                moebius_testkit::threads(threads).install(|| {
                    let what = format!("{precision:?}, window {window:?}, {threads} threads");
                    assert!(whole(&model, precision, &[&own]) == wanted, "whole: {what}");
                    let company = whole(&model, precision, &[&tokens(7)[..40], &own, &tokens(9)]);
                    assert!(company[40 * 700..][..TOKENS * 700] == wanted, "among others: {what}");
                    for pieces in [vec![128, 1, 100, 72], vec![300, 1]] {
                        assert!(in_pieces(&model, precision, &own, &pieces) == wanted, "{pieces:?}: {what}");
                    }
                });
            }
            let one_by_one = in_pieces(&model, precision, &own, &[1; TOKENS]);
            assert!(one_by_one == wanted, "token by token: {precision:?}, window {window:?}");
        }
    }
}

/// The logits of the last token of sequences that read `prompts`, then decode `steps` tokens each, all together.
fn decoded(model: &Model, precision: Precision, prompts: &[&[u32]], steps: usize) -> Vec<Vec<f32>> {
    let g = Graph::inference(precision);
    let mut caches: Vec<KvCache> = prompts.iter().map(|_| KvCache::new(&model.config, CacheFormat::F32)).collect();
    let mut caches: Vec<&mut KvCache> = caches.iter_mut().collect();
    let mut logits = vec![Vec::new(); prompts.len()];
    let mut next: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.to_vec()).collect();
    for step in 0..=steps {
        let parts: Vec<(&[u32], usize)> =
            next.iter().zip(&caches).map(|(part, cache)| (&part[..], cache.len())).collect();
        let batch = Batch::continuing_together(&parts);
        let hidden = model.forward(&g, &batch, Some(&mut caches), &mut Silent).unwrap();
        let all = model.logits(&g, &hidden);
        for (sequence, logits) in logits.iter_mut().enumerate() {
            *logits = all.data()[(batch.starts[sequence + 1] - 1) * 700..][..700].to_vec();
            next[sequence] = vec![(prompts[sequence][0] as usize + 31 * step) as u32 % 700];
        }
    }
    logits
}

#[test]
fn sixteen_sequences_decode_as_each_does_alone() {
    for window in [None, Some(20)] {
        let (model, tokens) = (model(window), tokens(3));
        let prompts: Vec<&[u32]> = (0..16).map(|i| &tokens[i..][..1 + 7 * i % 90]).collect();
        for precision in [Precision::F32, Precision::Bf16] {
            let alone: Vec<Vec<f32>> =
                prompts.iter().flat_map(|prompt| decoded(&model, precision, &[prompt], 5)).collect();
            assert_ne!(alone[0], alone[1]);
            for threads in [1, 2, 3] {
                let together = moebius_testkit::threads(threads).install(|| decoded(&model, precision, &prompts, 5));
                assert!(together == alone, "{precision:?}, window {window:?}, {threads} threads");
            }
        }
    }
}

#[test]
fn gradients_do_not_depend_on_threads() {
    let (model, batch) = (model(Some(100)), Batch::of_sequences(&[tokens(0), tokens(5)]));
    let targets: Vec<u32> = batch.tokens.iter().map(|token| (token + 1) % 700).collect();
    for precision in [Precision::F32, Precision::Bf16] {
        let gradients = |threads| {
            moebius_testkit::threads(threads).install(|| {
                let (g, mut gradients) = (Graph::training(precision), Gradients::new());
                let settings = LossSettings { balance_coefficient: 0.01, z_coefficient: 0.001, ..Default::default() };
                let loss = model.loss(&g, &batch, &targets, &settings).unwrap();
                g.backward(&loss.total, &mut gradients);
                (loss.total.data()[0], gradients)
            })
        };
        let (wanted_loss, wanted) = gradients(1);
        for threads in [2, 3] {
            let (loss, found) = gradients(threads);
            assert_eq!(loss, wanted_loss);
            for param in model.params() {
                let [wanted, found] = [&wanted, &found].map(|gradients| gradients.get(param.id()).unwrap());
                assert!(wanted == found, "{precision:?}, {threads} threads: {}", param.name());
                assert!(wanted.iter().any(|&d| d != 0.0), "{}", param.name());
            }
            assert_eq!(found.norm(), wanted.norm());
        }
    }
}
