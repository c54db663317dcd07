//! One token, one answer, on a model large enough that the kernels share its work among threads.

use moebius_kernels::gemm::Precision;
use moebius_model::{Batch, Ffn, KvCache, LossSettings, Model, ModelConfig, Silent};
use moebius_tensor::{Gradients, Graph};

/// More tokens than a block of any kernel, and an odd number of them.
const TOKENS: usize = 301;

fn model(window: Option<usize>) -> Model {
    let config = ModelConfig {
        family: "mixtral".into(),
        vocab_size: 700,
        hidden: 128,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 32,
        max_positions: 512,
        rope_theta: 1e4,
        rms_eps: 1e-5,
        window,
        tie_embeddings: window.is_some(),
        ffn: Ffn::Moe { n_experts: 5, top_k: 2, width: 200, renormalise: true },
        router_aux_loss_coef: 0.01,
        bos_token: None,
        eos_tokens: Vec::new(),
    };
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
    let (g, mut cache, mut all) = (Graph::inference(precision), KvCache::new(&model.config), Vec::new());
    for &piece in pieces {
        let first = cache.len();
        let batch = Batch::continuing(&tokens[first..first + piece], first);
        let hidden = model.forward(&g, &batch, Some(&mut cache), &mut Silent).unwrap();
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

#[test]
fn gradients_do_not_depend_on_threads() {
    let (model, batch) = (model(Some(100)), Batch::of_sequences(&[tokens(0), tokens(5)]));
    let targets: Vec<u32> = batch.tokens.iter().map(|token| (token + 1) % 700).collect();
    for precision in [Precision::F32, Precision::Bf16] {
        let gradients = |threads| {
            moebius_testkit::threads(threads).install(|| {
                let (g, mut gradients) = (Graph::training(precision), Gradients::new());
                let settings = LossSettings { balance_coefficient: 0.01, z_coefficient: 0.001, recompute: false };
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
