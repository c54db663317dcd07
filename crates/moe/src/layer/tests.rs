//! A whole layer: gradients against finite differences, and bits that do not depend on the company a token keeps.

use super::*;
use crate::{load_balancing_loss, z_loss};
use moebius_kernels::gemm::Precision;
use moebius_tensor::{Gradients, Rng, Tensor, ops};

const EXPERTS: usize = 5;
const HIDDEN: usize = 6;
const WIDTH: usize = 4;

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut data = vec![0.0; shape.iter().product()];
    Rng::new(seed).fill_normal(&mut data, 0.7);
    Tensor::new(shape, data)
}

fn weights() -> Vec<Tensor> {
    vec![random(&[EXPERTS, HIDDEN], 1), random(&[EXPERTS, 2 * WIDTH, HIDDEN], 2), random(&[EXPERTS, HIDDEN, WIDTH], 3)]
}

fn layer(weights: &[Tensor], top_k: usize, renormalise: bool) -> MoeLayer {
    let param = |id: usize| Param::new(id, format!("w{id}"), weights[id].clone());
    MoeLayer {
        router: TopKRouter::new(param(0), top_k, renormalise).unwrap(),
        experts: ExpertBank::new(param(1), param(2)).unwrap(),
    }
}

/// A random projection of the output, plus both balance losses.
fn objective<'p>(layer: &'p MoeLayer, g: &Graph<'p>, x: &Var, projection: &'p Param) -> Var {
    let (y, routing) = layer.forward(g, x).unwrap();
    let tokens = y.shape()[0];
    let targets: Vec<u32> = (0..tokens as u32).map(|t| t % 3).collect();
    let loss = ops::linear_cross_entropy(g, &y, projection, &targets).unwrap();
    let (balance, z) = (load_balancing_loss(g, &[&routing]), z_loss(g, &[&routing]));
    ops::weighted_sum(g, &[(1.0, &loss), (0.3, &balance), (0.2, &z)])
}

#[test]
fn gradients_match_finite_differences() {
    for (top_k, renormalise) in [(2, true), (2, false), (1, false), (EXPERTS, true)] {
        let (weights, x) = (weights(), random(&[7, HIDDEN], 4));
        let projection = Param::new(3, "projection", random(&[3, HIDDEN], 5));
        let value = |all: &[Tensor]| {
            let layer = layer(&all[1..], top_k, renormalise);
            let g = Graph::inference(Precision::F32);
            let loss = objective(&layer, &g, &Var::constant(all[0].clone()), &projection);
            f64::from(loss.data()[0])
        };
        let layer = layer(&weights, top_k, renormalise);
        let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
        let leaf = g.variable(x.clone());
        let loss = objective(&layer, &g, &leaf, &projection);
        let leaves = g.backward(&loss, &mut gradients);
        let all: Vec<Tensor> = std::iter::once(x).chain(weights).collect();
        for (which, tensor) in all.iter().enumerate() {
            for i in 0..tensor.data().len() {
                let at = |step: f32| {
                    let mut moved = all.clone();
                    moved[which].data_mut()[i] += step;
                    value(&moved)
                };
                let numeric = (at(4e-3) - at(-4e-3)) / 8e-3;
                let found = match which {
                    0 => leaves.get(&leaf),
                    _ => gradients.get(which - 1),
                };
                let found = f64::from(found.unwrap()[i]);
                assert!((numeric - found).abs() < 2e-3, "k {top_k}, operand {which}, {i}: {found}, wanted {numeric}");
            }
        }
    }
}

#[test]
fn a_tokens_output_does_not_depend_on_batch_or_threads() {
    for precision in [Precision::F32, Precision::Bf16] {
        let layer = layer(&weights(), 2, true);
        let x = random(&[33, HIDDEN], 8);
        let run = |rows: std::ops::Range<usize>| {
            let part = x.data()[rows.start * HIDDEN..rows.end * HIDDEN].to_vec();
            let part = Var::constant(Tensor::new(&[rows.len(), HIDDEN], part));
            layer.forward(&Graph::inference(precision), &part).unwrap().0.data().to_vec()
        };
        let whole = run(0..33);
        for threads in 1..=3 {
            let pool = moebius_testkit::threads(threads);
            assert_eq!(pool.install(|| run(0..33)), whole, "{threads} threads");
        }
        for token in 0..33 {
            assert_eq!(run(token..token + 1), whole[token * HIDDEN..(token + 1) * HIDDEN], "token {token} alone");
        }
        assert!(run(0..0).is_empty());
    }
}

#[test]
fn equal_experts_whose_weights_sum_to_one_act_as_one() {
    let mut weights = weights();
    for stacked in &mut weights[1..] {
        let one = stacked.data().len() / EXPERTS;
        let first = stacked.data()[..one].to_vec();
        stacked.data_mut().chunks_exact_mut(one).for_each(|expert| expert.copy_from_slice(&first));
    }
    let x = Var::constant(random(&[9, HIDDEN], 6));
    let one = layer(&weights, 1, true).forward(&Graph::inference(Precision::F32), &x).unwrap().0.data().to_vec();
    for top_k in 2..=EXPERTS {
        let layer = layer(&weights, top_k, true);
        let many = layer.forward(&Graph::inference(Precision::F32), &x).unwrap().0;
        for (a, b) in many.data().iter().zip(&one) {
            assert!((a - b).abs() < 1e-5, "top {top_k}: {a} {b}");
        }
    }
}

#[test]
fn an_even_load_costs_k_and_a_collapsed_one_more() {
    let x = Var::constant(Tensor::zeros(&[10, HIDDEN]));
    // Equal scores: probabilities are even, all choices fall on the first two experts.
    let mut zero = weights();
    zero[0] = Tensor::zeros(&[EXPERTS, HIDDEN]);
    let layer = layer(&zero, 2, true);
    let g = Graph::inference(Precision::F32);
    let (_, routing) = layer.forward(&g, &x).unwrap();
    assert!((load_balancing_loss(&g, &[&routing]).data()[0] - 2.0).abs() < 1e-6);
    assert!((z_loss(&g, &[&routing]).data()[0] - (EXPERTS as f32).ln().powi(2)).abs() < 1e-5);
}
