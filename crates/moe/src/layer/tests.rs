//! A whole layer: gradients against finite differences, bits that do not depend on the company a token keeps, and the
//! corner cases of routing.

use super::*;
use crate::{LoadStatistics, Plan, load_balancing_loss, z_loss};
use moebius_kernels::gemm::Precision;
use moebius_tensor::{Gradients, Rng, Tensor};
use moebius_testkit::{check_gradient, same_bits, same_bits_on_any_threads};
use std::rc::Rc;

/// What a layer is made of.
#[derive(Clone, Copy)]
struct Shape {
    experts: usize,
    hidden: usize,
    width: usize,
    top_k: usize,
    renormalise: bool,
}

const SMALL: Shape = Shape { experts: 5, hidden: 6, width: 4, top_k: 2, renormalise: true };
/// Large enough for every kernel to share its work among threads, and no multiple of a vector.
const LARGE: Shape = Shape { experts: 6, hidden: 72, width: 41, top_k: 2, renormalise: true };
const LARGE_TOKENS: usize = 301;

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut data = vec![0.0; shape.iter().product()];
    Rng::new(seed).fill_normal(&mut data, 0.7);
    Tensor::new(shape, data)
}

/// The router's weight, gate_up and down.
fn weights(shape: &Shape, seed: u64) -> Vec<Tensor> {
    let Shape { experts, hidden, width, .. } = *shape;
    let shapes = [&[experts, hidden][..], &[experts, 2 * width, hidden], &[experts, hidden, width]];
    shapes.iter().zip(seed..).map(|(shape, seed)| random(shape, seed)).collect()
}

fn layer(shape: &Shape, weights: &[Tensor]) -> MoeLayer {
    let param = |id: usize| Param::new(id, format!("w{id}"), weights[id].clone());
    MoeLayer {
        router: TopKRouter::new(param(0), shape.top_k, shape.renormalise).unwrap(),
        experts: ExpertBank::new(param(1), param(2)).unwrap(),
    }
}

/// How much the output (projected at random), the balance loss and the z-loss count.
type Coefficients = [f32; 3];

fn projection(len: usize, factor: f32) -> Tensor {
    let mut projection = random(&[len], 77);
    projection.data_mut().iter_mut().for_each(|p| *p *= factor);
    projection
}

/// The objective at x, router, gate_up, down.
fn objective(shape: &Shape, all: &[Tensor], [output, balance, z]: Coefficients) -> f64 {
    let (layer, g) = (layer(shape, &all[1..]), Graph::inference(Precision::F32));
    let (y, routing) = layer.forward(&g, &Var::constant(all[0].clone())).unwrap();
    let projection = projection(y.data().len(), output);
    let losses = [(balance, load_balancing_loss(&g, &[&routing])), (z, z_loss(&g, &[&routing]))];
    let projected: f64 = y.data().iter().zip(projection.data()).map(|(&y, &p)| f64::from(y) * f64::from(p)).sum();
    projected + losses.iter().map(|(factor, loss)| f64::from(*factor) * f64::from(loss.data()[0])).sum::<f64>()
}

/// Output, and gradients of x, router, gate_up, down; in one run or with the layer recomputed.
fn differentiate(
    shape: &Shape,
    all: &[Tensor],
    precision: Precision,
    [output, balance, z]: Coefficients,
    recompute: bool,
) -> Vec<(String, Vec<f32>)> {
    let (layer, plan) = (layer(shape, &all[1..]), std::cell::OnceCell::new());
    let (g, mut gradients) = (Graph::training(precision), Gradients::new());
    let x = g.variable(all[0].clone());
    let outputs = if recompute {
        g.checkpoint(&x, |g, x| layer_outputs(&layer, g, x, &plan))
    } else {
        layer_outputs(&layer, &g, &x, &plan)
    };
    let outputs = outputs.unwrap();
    let [y, logits, probabilities, weights] = <[Var; 4]>::try_from(outputs).unwrap();
    let routing = Routing {
        plan: plan.get().unwrap().clone(),
        topk_weight: weights.value().clone(),
        topk_index: vec![],
        losses: vec![],
        dropped: 0,
        weights,
        logits,
        probabilities,
    };
    let losses = [(balance, load_balancing_loss(&g, &[&routing])), (z, z_loss(&g, &[&routing]))];
    let seed = projection(y.data().len(), output);
    let factors = [[losses[0].0], [losses[1].0]];
    let seeds = [(&y, seed.data()), (&losses[0].1, &factors[0][..]), (&losses[1].1, &factors[1][..])];
    let leaves = g.backward_from(&seeds, &mut gradients);
    let mut found = vec![("y".to_owned(), y.data().to_vec()), ("dx".to_owned(), leaves.get(&x).unwrap().to_vec())];
    for (id, name) in ["drouter", "dgate_up", "ddown"].iter().enumerate() {
        found.push(((*name).to_owned(), gradients.get(id).unwrap().to_vec()));
    }
    found
}

/// What of a layer's results can have a gradient.
fn layer_outputs<'p>(
    layer: &'p MoeLayer,
    g: &Graph<'p>,
    x: &Var,
    plan: &std::cell::OnceCell<Rc<Plan>>,
) -> Result<Vec<Var>, MoeError> {
    let (y, routing) = layer.forward(g, x)?;
    plan.get_or_init(|| routing.plan.clone());
    Ok(vec![y, routing.logits, routing.probabilities, routing.weights])
}

/// x and weights whose choices are so clear that the steps of finite differences change none.
fn clear_choices(shape: &Shape, tokens: usize) -> Vec<Tensor> {
    let all = |seed: u64| -> Vec<Tensor> {
        std::iter::once(random(&[tokens, shape.hidden], 1000 + seed)).chain(weights(shape, 7 * seed)).collect()
    };
    let margin = |all: &[Tensor]| -> f32 {
        let (layer, g) = (layer(shape, &all[1..]), Graph::inference(Precision::F32));
        let routing = layer.router.route(&g, &Var::constant(all[0].clone())).unwrap();
        let of_token = |scores: &[f32]| {
            let mut scores = scores.to_vec();
            scores.sort_by(|a, b| b.total_cmp(a));
            scores.get(shape.top_k).map_or(f32::INFINITY, |next| scores[shape.top_k - 1] - next)
        };
        routing.logits.data().chunks_exact(shape.experts).map(of_token).fold(f32::INFINITY, f32::min)
    };
    (0..500).map(all).find(|all| margin(all) > 0.3).expect("clear choices")
}

#[test]
fn gradients_match_finite_differences() {
    for (top_k, renormalise) in [(2, true), (2, false), (1, false), (3, true), (5, true), (5, false)] {
        let shape = Shape { top_k, renormalise, ..SMALL };
        let all = clear_choices(&shape, 5);
        // Each part alone, so that none hides behind a larger one, and all together.
        for coefficients in [[1.0, 0.0, 0.0], [0.0, 10.0, 0.0], [0.0, 0.0, 1.0], [1.0, 3.0, 0.5]] {
            let found = differentiate(&shape, &all, Precision::F32, coefficients, false);
            for (which, (name, gradient)) in found[1..].iter().enumerate() {
                let mut moved = all.clone();
                let what = format!("{name}, k {top_k}, renormalise {renormalise}, parts {coefficients:?}");
                check_gradient(&what, all[which].data(), gradient, |at| {
                    moved[which] = Tensor::new(all[which].shape(), at.to_vec());
                    objective(&shape, &moved, coefficients)
                });
            }
        }
    }
}

#[test]
fn recomputation_changes_no_bit_of_a_layer_and_its_losses() {
    for (shape, tokens) in [(SMALL, 33), (LARGE, LARGE_TOKENS)] {
        let all: Vec<Tensor> = std::iter::once(random(&[tokens, shape.hidden], 8)).chain(weights(&shape, 1)).collect();
        for precision in [Precision::F32, Precision::Bf16] {
            let [kept, again] =
                [false, true].map(|recompute| differentiate(&shape, &all, precision, [1.0, 0.5, 0.25], recompute));
            for ((name, kept), (_, again)) in kept.iter().zip(&again) {
                same_bits(name, again, kept);
            }
        }
    }
}

#[test]
fn results_and_gradients_do_not_depend_on_threads() {
    for precision in [Precision::F32, Precision::Bf16] {
        let compute = || {
            let x = random(&[LARGE_TOKENS, LARGE.hidden], 8);
            let all: Vec<Tensor> = std::iter::once(x).chain(weights(&LARGE, 1)).collect();
            differentiate(&LARGE, &all, precision, [1.0, 0.5, 0.25], false)
        };
        let found = same_bits_on_any_threads(compute);
        assert!(found.iter().all(|(_, numbers)| numbers.iter().any(|&x| x != 0.0)));
    }
}

#[test]
fn a_tokens_output_does_not_depend_on_the_batch() {
    for (shape, tokens) in [(SMALL, 33), (LARGE, LARGE_TOKENS)] {
        for precision in [Precision::F32, Precision::Bf16] {
            let (layer, hidden) = (layer(&shape, &weights(&shape, 1)), shape.hidden);
            let x = random(&[tokens, hidden], 8);
            let run = |rows: std::ops::Range<usize>| {
                let part = x.data()[rows.start * hidden..rows.end * hidden].to_vec();
                let part = Var::constant(Tensor::new(&[rows.len(), hidden], part));
                layer.forward(&Graph::inference(precision), &part).unwrap().0.data().to_vec()
            };
            let whole = run(0..tokens);
            for token in (0..tokens).step_by(5) {
                same_bits("a token alone", &run(token..token + 1), &whole[token * hidden..(token + 1) * hidden]);
            }
            let cuts = [0, 1, 2, 17, 30, tokens];
            let parts: Vec<f32> = cuts.windows(2).flat_map(|cut| run(cut[0]..cut[1])).collect();
            same_bits("in parts", &parts, &whole);
        }
    }
}

/// Of a layer with `share` of its inner activations dropped: output, and gradients of gate_up and down.
fn with_dropout(all: &[Tensor], share: f32, seed: u64) -> [Vec<f32>; 3] {
    let (layer, mut gradients) = (layer(&SMALL, &all[1..]), Gradients::new());
    let g = Graph::training(Precision::F32).with_expert_dropout(share).seeded(seed);
    let (y, _) = layer.forward(&g, &g.variable(all[0].clone())).unwrap();
    let seed = projection(y.data().len(), 1.0);
    let answer = y.data().to_vec();
    g.backward_from(&[(&y, seed.data())], &mut gradients);
    [answer, gradients.get(1).unwrap().to_vec(), gradients.get(2).unwrap().to_vec()]
}

#[test]
fn experts_drop_what_they_compute_inside_when_training() {
    let all = clear_choices(&SMALL, 9);
    let [whole, ..] = with_dropout(&all, 0.0, 1);
    let [dropped, gate_up, down] = with_dropout(&all, 0.4, 1);
    assert!(dropped != whole && dropped != with_dropout(&all, 0.4, 2)[0]);
    for (which, gradient) in [(2, &gate_up), (3, &down)] {
        let mut moved = all.clone();
        check_gradient("with dropout", all[which].data(), gradient, |at| {
            moved[which] = Tensor::new(all[which].shape(), at.to_vec());
            let y = &with_dropout(&moved, 0.4, 1)[0];
            y.iter().zip(projection(y.len(), 1.0).data()).map(|(&y, &p)| f64::from(y) * f64::from(p)).sum()
        });
    }
    // What is kept is raised, so that the mean over draws is the whole.
    let mut mean = vec![0.0; whole.len()];
    for seed in 0..600 {
        let [y, ..] = with_dropout(&all, 0.4, seed);
        mean.iter_mut().zip(y).for_each(|(mean, y)| *mean += y / 600.0);
    }
    let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
    assert!(distance(&mean, &whole) < 0.02 * distance(&dropped, &whole), "{mean:?} {whole:?}");
    // Nothing is dropped when not training.
    let (layer, g) = (layer(&SMALL, &all[1..]), Graph::inference(Precision::F32).with_expert_dropout(0.4));
    let (y, _) = layer.forward(&g, &Var::constant(all[0].clone())).unwrap();
    same_bits("inference", y.data(), &whole);
}

#[test]
fn without_tokens_there_is_nothing_to_do() {
    let (layer, mut gradients) = (layer(&SMALL, &weights(&SMALL, 1)), Gradients::new());
    let g = Graph::training(Precision::Bf16);
    let x = g.variable(Tensor::zeros(&[0, SMALL.hidden]));
    let (y, routing) = layer.forward(&g, &x).unwrap();
    assert_eq!((y.shape(), routing.plan.counts()), (&[0, SMALL.hidden][..], vec![0; SMALL.experts]));
    let (balance, z) = (load_balancing_loss(&g, &[&routing]), z_loss(&g, &[&routing]));
    assert_eq!((balance.data(), z.data()), (&[0.0][..], &[0.0][..]));
    let leaves = g.backward_from(&[(&y, &[]), (&balance, &[1.0]), (&z, &[1.0])], &mut gradients);
    assert_eq!(leaves.get(&x), Some(&[][..]));
    assert!((0..3).all(|id| gradients.get(id).is_none_or(|gradient| gradient.iter().all(|&g| g == 0.0))));
}

#[test]
fn an_expert_without_tokens_gets_no_gradient() {
    // Scores that keep the last expert out, whatever the token: the bias rides on a coordinate that is always one.
    let mut all = weights(&SMALL, 1);
    let hidden = SMALL.hidden;
    all[0].data_mut()[(SMALL.experts - 1) * hidden] = -100.0;
    let mut x = random(&[9, hidden], 6);
    x.data_mut().chunks_exact_mut(hidden).for_each(|row| row[0] = 1.0);
    let layer = layer(&SMALL, &all);
    let mut gradients = Gradients::new();
    let one = [2 * SMALL.width * hidden, hidden * SMALL.width];
    for run in 0..2 {
        // Zeros where nothing was; then marks that must stay.
        if run == 1 {
            (1..3).for_each(|id| gradients.get_mut(id, SMALL.experts * one[id - 1]).fill(3.5));
        }
        let g = Graph::training(Precision::F32);
        let leaf = g.variable(x.clone());
        let (y, routing) = layer.forward(&g, &leaf).unwrap();
        assert_eq!(routing.plan.counts()[SMALL.experts - 1], 0);
        let mut statistics = LoadStatistics::default();
        statistics.add(&routing.plan);
        assert!(statistics.dead_experts() >= 1);
        g.backward_from(&[(&y, &vec![1.0; y.data().len()])], &mut gradients);
        for id in 1..3 {
            let (busy, idle) = gradients.get(id).unwrap().split_at((SMALL.experts - 1) * one[id - 1]);
            assert_eq!(idle, vec![[0.0, 3.5][run]; one[id - 1]]);
            assert!(busy.iter().any(|&g| g != [0.0, 3.5][run]));
        }
    }
}

#[test]
fn a_routing_may_serve_two_banks() {
    let (layer, x) = (layer(&SMALL, &weights(&SMALL, 1)), random(&[9, SMALL.hidden], 6));
    let run = |times: usize| {
        let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
        let x = g.variable(x.clone());
        let routing = layer.router.route(&g, &x).unwrap();
        let outputs: Vec<Var> =
            (0..times).map(|_| layer.experts.forward(&g, &x, &routing.plan, &routing.weights).unwrap()).collect();
        let seed = projection(9 * SMALL.hidden, 1.0);
        let seeds: Vec<(&Var, &[f32])> = outputs.iter().map(|y| (y, seed.data())).collect();
        let leaves = g.backward_from(&seeds, &mut gradients);
        [leaves.get(&x), gradients.get(0), gradients.get(2)].map(|gradient| gradient.unwrap().to_vec())
    };
    for (once, twice) in run(1).iter().zip(&run(2)) {
        for (once, twice) in once.iter().zip(twice) {
            assert!((2.0 * once - twice).abs() <= 1e-5 * (1.0 + twice.abs()), "{once} {twice}");
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let (layer, g) = (layer(&SMALL, &weights(&SMALL, 1)), Graph::inference(Precision::F32));
    let x = Var::constant(random(&[3, SMALL.hidden], 1));
    let routing = layer.router.route(&g, &x).unwrap();
    let forward = |rows: usize, weights: usize| {
        let x = Var::constant(Tensor::zeros(&[rows, SMALL.hidden]));
        let weights = Var::constant(Tensor::zeros(&[weights]));
        layer.experts.forward(&g, &x, &routing.plan, &weights).unwrap_err().to_string()
    };
    assert_eq!(forward(4, 6), "experts' input: wanted shape [3, 6], found [4, 6]");
    assert_eq!(forward(3, 5), "experts' weights: wanted shape [6], found [5]");
    let narrow = Var::constant(Tensor::zeros(&[3, 5]));
    assert_eq!(layer.forward(&g, &narrow).unwrap_err().to_string(), "linear input: wanted shape [3, 6], found [3, 5]");
}

#[test]
fn equal_experts_whose_weights_sum_to_one_act_as_one() {
    let mut weights = weights(&SMALL, 1);
    for stacked in &mut weights[1..] {
        let one = stacked.data().len() / SMALL.experts;
        let first = stacked.data()[..one].to_vec();
        stacked.data_mut().chunks_exact_mut(one).for_each(|expert| expert.copy_from_slice(&first));
    }
    let x = Var::constant(random(&[9, SMALL.hidden], 6));
    let run = |top_k: usize| {
        let layer = layer(&Shape { top_k, ..SMALL }, &weights);
        layer.forward(&Graph::inference(Precision::F32), &x).unwrap().0.data().to_vec()
    };
    for top_k in 2..=SMALL.experts {
        for (a, b) in run(top_k).iter().zip(&run(1)) {
            assert!((a - b).abs() < 1e-5, "top {top_k}: {a} {b}");
        }
    }
}
