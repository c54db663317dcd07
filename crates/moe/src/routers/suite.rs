//! What every router of the registry must keep, tested with each; a line of [`CASES`] enters a router.

use super::*;
use crate::{ExpertBank, LoadStatistics, MoeLayer};
use moebius_kernels::gemm::Precision;
use moebius_tensor::{Gradients, Rng, Tensor, ops};
use moebius_testkit::compare_gradient;
use proptest::prelude::*;

/// A router with options, and what holds for it.
struct Case {
    name: &'static str,
    top_k: usize,
    options: &'static [(&'static str, f64)],
    flags: &'static [&'static str],
    words: &'static [(&'static str, &'static str)],
    /// Whether it decides by scores alone, so that permuted experts give the same answer.
    permutes: bool,
}

const fn case(name: &'static str, top_k: usize, permutes: bool) -> Case {
    Case { name, top_k, options: &[], flags: &[], words: &[], permutes }
}

const LEAK: &[&str] = &["allow_future_leak"];

const CASES: &[Case] = &[
    Case { options: &[("z", 0.1), ("balance", 0.5)], ..case("top_k", 2, true) },
    Case { options: &[("importance", 0.5), ("load", 0.5)], ..case("noisy_top_k", 2, false) },
    Case {
        options: &[("groups", 2.0), ("groups_per_token", 1.0), ("importance", 0.5), ("load", 0.5)],
        ..case("hierarchical", 2, false)
    },
    Case { options: &[("jitter", 0.0), ("balance", 0.5)], ..case("switch", 1, true) },
    Case { options: &[("capacity_factor", 0.7), ("jitter", 0.1)], ..case("switch", 1, false) },
    Case { options: &[("group", 8.0), ("balance", 0.5)], ..case("gshard", 2, false) },
    Case { options: &[("importance", 0.5), ("load", 0.5)], ..case("vision", 2, false) },
    Case {
        options: &[("capacity_factor", 0.5)],
        flags: &["allow_future_leak", "batch_priority"],
        ..case("vision", 1, false)
    },
    Case { flags: LEAK, ..case("expert_choice", 2, true) },
    Case { flags: LEAK, options: &[("cap", 2.0), ("entropy", 0.1)], ..case("expert_choice", 2, true) },
    case("hash", 1, false),
    Case { words: &[("table", "balanced")], ..case("hash", 2, false) },
    Case { flags: LEAK, ..case("base", 1, false) },
    Case { flags: LEAK, ..case("sinkhorn", 2, true) },
    Case { flags: LEAK, words: &[("weight", "sigmoid")], ..case("sinkhorn", 1, true) },
    Case { options: &[("sequence", 0.5), ("balance", 0.5), ("scale", 2.5)], ..case("loss_free", 2, true) },
    Case { words: &[("score", "softmax")], ..case("loss_free", 2, true) },
    Case { options: &[("groups", 3.0), ("groups_per_token", 2.0)], ..case("loss_free", 2, false) },
    Case { words: &[("score", "sigmoid")], options: &[("scale", 2.0)], ..case("top_k", 2, true) },
    Case { words: &[("score", "softmax_of_chosen")], flags: &["bias"], ..case("top_k", 2, true) },
    Case { words: &[("score", "sigmoid_of_chosen")], ..case("top_k", 1, true) },
    Case { words: &[("score", "sigmoid_of_chosen")], flags: &["weighs_input"], ..case("top_k", 1, true) },
    Case { words: &[("score", "sparse_mixer")], options: &[("jitter", 1.0)], ..case("top_k", 2, true) },
    Case {
        words: &[("group_score", "best")],
        options: &[("groups", 3.0), ("groups_per_token", 1.0)],
        ..case("top_k", 2, false)
    },
    Case { options: &[("devices", 3.0), ("devices_per_token", 2.0), ("scale", 4.0)], ..case("deepseek_v2", 2, false) },
    case("forced", 2, false),
    Case { flags: LEAK, words: &[("by", "quantile")], ..case("forced", 2, true) },
];

const HIDDEN: usize = 5;
const EXPERTS: usize = 6;
const TOKENS: usize = 12;
const IDS: [u32; TOKENS] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8];

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut data = vec![0.0; shape.iter().product()];
    Rng::new(seed).fill_normal(&mut data, 1.0);
    Tensor::new(shape, data)
}

impl Case {
    fn label(&self) -> String {
        format!("{} {:?} {:?}", self.name, self.options, self.words)
    }

    fn layer(&self, weights: &mut dyn FnMut(usize, &[usize]) -> Tensor) -> MoeLayer<Box<dyn RoutingMethod>> {
        let mut id = 0;
        let mut make = |name: &str, shape: &[usize]| {
            id += 1;
            Ok(Param::new(id - 1, name, weights(id - 1, shape)))
        };
        let mut setup = Setup::new(HIDDEN, EXPERTS, self.top_k, &mut make);
        setup.vocabulary = 10;
        for &(key, value) in self.options {
            setup.options.insert(key.into(), value.into());
        }
        self.flags.iter().for_each(|&key| drop(setup.options.insert(key.into(), true.into())));
        self.words.iter().for_each(|&(key, word)| drop(setup.options.insert(key.into(), word.into())));
        let router = build(self.name, &mut setup).unwrap();
        drop(setup);
        let gate_up = make("gate_up", &[EXPERTS, 6, HIDDEN]).unwrap();
        let down = make("down", &[EXPERTS, HIDDEN, 3]).unwrap();
        MoeLayer::by(router, ExpertBank::new(gate_up, down).unwrap())
    }

    fn random_layer(&self, seed: u64) -> MoeLayer<Box<dyn RoutingMethod>> {
        self.layer(&mut |id, shape| random(shape, seed * 100 + id as u64))
    }
}

fn context() -> Context<'static> {
    Context { token_ids: &IDS, starts: &[0, 5, TOKENS], seed: 7 }
}

fn all_params(layer: &MoeLayer<Box<dyn RoutingMethod>>) -> Vec<Tensor> {
    let router = layer.router.params().into_iter();
    router.chain(layer.experts.params()).map(|param| param.value().clone()).collect()
}

/// A projection of the layer's result plus the method's losses.
fn objective<'p>(g: &Graph<'p>, layer: &'p MoeLayer<Box<dyn RoutingMethod>>, x: &Var) -> (Var, Decision) {
    let (y, decision) = layer.forward_by(g, x, &context()).unwrap();
    let projected = math::multiply(g, &y, random(y.shape(), 99).data().to_vec());
    let value = projected.data().iter().map(|&v| f64::from(v)).sum();
    let ones = vec![1.0; y.data().len()];
    let projected = math::scalar(g, value, vec![(&projected, ones)]);
    (ops::sum(g, &[&projected, &decision.auxiliary(g)]), decision)
}

#[test]
fn every_method_is_here() {
    for entry in ALL {
        assert!(CASES.iter().any(|case| case.name == entry.name), "no case for {}", entry.name);
    }
}

#[test]
fn gradients_match_finite_differences() {
    for case in CASES {
        // A choice may change within the step: then these weights say nothing, and others are asked. A wrong slope agrees
        // nowhere.
        let mut complaints = Vec::new();
        let agreed =
            (1..60).filter(|&seed| gradients_agree(case, seed).map_err(|c| complaints.push(c)).is_ok()).take(2);
        assert_eq!(agreed.count(), 2, "{}: {complaints:#?}", case.label());
    }
}

fn gradients_agree(case: &Case, seed: u64) -> Result<(), String> {
    let layer = case.random_layer(seed);
    let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
    let input = random(&[TOKENS, HIDDEN], seed + 50);
    let x = g.variable(input.clone());
    let (loss, _) = objective(&g, &layer, &x);
    let leaves = g.backward(&loss, &mut gradients);
    let values = all_params(&layer);
    let at = |all: &[Tensor], x: &Tensor| {
        let layer = case.layer(&mut |id, _| all[id].clone());
        let g = Graph::training(Precision::F32);
        f64::from(objective(&g, &layer, &g.variable(x.clone())).0.data()[0])
    };
    compare_gradient(input.data(), leaves.get(&x).expect("x has a gradient"), |moved| {
        at(&values, &Tensor::new(&[TOKENS, HIDDEN], moved.to_vec()))
    })
    .map_err(|complaint| format!("x{complaint}"))?;
    for (id, param) in layer.router.params().iter().enumerate() {
        let Some(gradient) = gradients.get(id) else {
            assert!(param.name() == "selection_bias", "{}: nothing reached {}", case.label(), param.name());
            continue;
        };
        let mut moved = values.clone();
        compare_gradient(param.value().data(), gradient, |to| {
            moved[id] = Tensor::new(param.shape(), to.to_vec());
            at(&moved, &input)
        })
        .map_err(|complaint| format!("{}{complaint}", param.name()))?;
    }
    Ok(())
}

#[test]
fn permuted_experts_give_the_same_answer() {
    for case in CASES.iter().filter(|case| case.permutes) {
        let layer = case.random_layer(3);
        let order = [4, 2, 0, 5, 1, 3];
        let permuted = |id: usize, _: &[usize]| {
            let value = &all_params(&layer)[id];
            let size = value.data().len() / EXPERTS;
            let rows = order.iter().flat_map(|&e| value.data()[e * size..(e + 1) * size].to_vec());
            Tensor::new(value.shape(), rows.collect::<Vec<f32>>())
        };
        let other = case.layer(&mut { permuted });
        let x = Var::constant(random(&[TOKENS, HIDDEN], 4));
        let g = Graph::training(Precision::F32);
        let (y, first) = layer.forward_by(&g, &x, &context()).unwrap();
        let (z, second) = other.forward_by(&g, &x, &context()).unwrap();
        let (a, b) = (first.plan.counts(), second.plan.counts());
        assert!(order.iter().enumerate().all(|(to, &from)| b[to] == a[from]), "{}: {a:?} {b:?}", case.label());
        let close = y.data().iter().zip(z.data()).all(|(y, z)| (y - z).abs() < 1e-4);
        assert!(close, "{}", case.label());
    }
}

/// Whether an answer depends on where a token stands, when not training: by construction, or because who comes first is
/// served first.
fn minds_the_order(case: &Case) -> bool {
    let by_order = case.name == "vision" && !case.flags.contains(&"batch_priority");
    by_order || case.name == "forced" && case.words.is_empty()
}

#[test]
fn permuted_tokens_give_permuted_answers() {
    let order: Vec<usize> = (0..TOKENS).map(|t| (5 * t + 3) % TOKENS).collect();
    for case in CASES.iter().filter(|case| !minds_the_order(case)) {
        let (layer, x) = (case.random_layer(6), random(&[TOKENS, HIDDEN], 8));
        let run = |order: &[usize]| {
            let rows =
                order.iter().flat_map(|&t| x.data()[t * HIDDEN..(t + 1) * HIDDEN].to_vec()).collect::<Vec<f32>>();
            let ids: Vec<u32> = order.iter().map(|&t| IDS[t]).collect();
            let context = Context { token_ids: &ids, starts: &[], seed: 7 };
            let x = Var::constant(Tensor::new(&[TOKENS, HIDDEN], rows));
            layer.forward_by(&Graph::inference(Precision::F32), &x, &context).unwrap().0.data().to_vec()
        };
        let (straight, permuted) = (run(&(0..TOKENS).collect::<Vec<_>>()), run(&order));
        for (to, &from) in order.iter().enumerate() {
            let (a, b) = (&permuted[to * HIDDEN..(to + 1) * HIDDEN], &straight[from * HIDDEN..(from + 1) * HIDDEN]);
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4), "{}: token {from}", case.label());
        }
    }
}

/// Experts that are all one network f: each token gets f(x) times the sum of its weights, and x as often as it skips.
#[test]
fn equal_experts_act_as_one() {
    for case in CASES {
        let layer = case.layer(&mut |id, shape| {
            let mut value = random(shape, 100 + id as u64);
            if shape.len() == 3 {
                let one = value.data()[..value.data().len() / EXPERTS].to_vec();
                value.data_mut().chunks_exact_mut(one.len()).for_each(|expert| expert.copy_from_slice(&one));
            }
            value
        });
        let (g, x) = (Graph::training(Precision::F32), random(&[TOKENS, HIDDEN], 9));
        let (y, decision) = layer.forward_by(&g, &Var::constant(x.clone()), &context()).unwrap();
        // Each of the plan's rows by itself, through the first expert.
        let mut wanted = vec![0.0; TOKENS * HIDDEN];
        for (&token, &weight) in decision.plan.token().iter().zip(decision.weights.data()) {
            let at = token as usize * HIDDEN..(token as usize + 1) * HIDDEN;
            let (before, after) = if layer.router.settings().is_some_and(|settings| settings.weighs_input) {
                (weight, 1.0)
            } else {
                (1.0, weight)
            };
            let row = x.data()[at.clone()].iter().map(|x| before * x).collect::<Vec<f32>>();
            let row = Var::constant(Tensor::new(&[1, HIDDEN], row));
            let plan = Rc::new(Plan::from_choices(EXPERTS, 1, &[0]).unwrap());
            let weight = Var::constant(Tensor::new(&[1], vec![after]));
            let answer = layer.experts.forward(&Graph::inference(Precision::F32), &row, &plan, &weight).unwrap();
            wanted[at].iter_mut().zip(answer.data()).for_each(|(sum, y)| *sum += y);
        }
        if let Some(skip) = &decision.skip {
            wanted.iter_mut().enumerate().for_each(|(i, sum)| *sum += skip.data()[i / HIDDEN] * x.data()[i]);
        }
        let close = y.data().iter().zip(&wanted).all(|(y, wanted)| (y - wanted).abs() < 1e-3);
        assert!(close, "{}", case.label());
    }
}

/// A router that begins by sending nearly all to one expert: by its own losses, its bias, or by construction, the load
/// becomes even.
#[test]
fn every_method_balances() {
    const MANY: usize = 96;
    let mut x = random(&[MANY, HIDDEN], 31);
    x.data_mut().chunks_exact_mut(HIDDEN).for_each(|row| row[0] = 1.0);
    let ids: Vec<u32> = (0..MANY as u32).map(|t| t * 7 % 10).collect();
    for case in CASES.iter().filter(|case| case.name != "hash") {
        let mut layer = case.layer(&mut |id, shape| {
            let mut value = random(shape, 40 + id as u64);
            if shape == [EXPERTS, HIDDEN] && id == 0 {
                value.data_mut()[0] += 5.0;
            }
            if shape.len() == 1 {
                value.data_mut().fill(0.0);
            }
            value
        });
        let mut violations = Vec::new();
        for step in 0..600 {
            let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
            let load = {
                let context = Context { token_ids: &ids, starts: &[0, MANY / 2, MANY], seed: step };
                let decision = layer.router.decide(&g, &g.variable(x.clone()), &context).unwrap();
                let mut load = LoadStatistics::default();
                load.add(&decision.plan);
                let terms: Vec<(f32, &Var)> = decision.losses.iter().map(|loss| (1.0, &loss.value)).collect();
                let total = ops::weighted_sum(&g, &terms);
                g.backward(&total, &mut gradients);
                load
            };
            violations.push(load.max_violation());
            for param in layer.router.params_mut() {
                let Some(gradient) = gradients.get(param.id()) else { continue };
                let norm = gradient.iter().map(|d| d * d).sum::<f32>().sqrt().max(1e-6);
                param.update(|w| w.iter_mut().zip(gradient).for_each(|(w, d)| *w -= 0.02 * d / norm));
            }
            layer.router.after_step(&load.counts);
        }
        let (first, last) = (violations[0], violations[580..].iter().sum::<f64>() / 20.0);
        println!("{}: {first} {last}", case.label());
        assert!(last < 0.6 && !(0.6..=1.0).contains(&first), "{}: MaxVio {first} to {last}", case.label());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn decisions_keep_their_word(seed in 1u64..10_000) {
        for case in CASES {
            let layer = case.random_layer(seed);
            let x = Var::constant(random(&[TOKENS, HIDDEN], seed + 1));
            for g in [Graph::training(Precision::F32), Graph::inference(Precision::F32)] {
                let decision = layer.router.decide(&g, &x, &context()).unwrap();
                decision.plan.validate().unwrap();
                let n = decision.plan.n_assignments();
                prop_assert_eq!(decision.weights.shape(), &[n]);
                prop_assert!(decision.weights.data().iter().all(|w| w.is_finite() && *w >= 0.0), "{}", case.label());
                if let Some(capacity) = decision.capacity {
                    prop_assert!(decision.plan.counts().iter().all(|&c| c <= capacity), "{}", case.label());
                }
                let by_token = case.name != "expert_choice" && case.name != "gshard";
                prop_assert!(!by_token || n + decision.dropped == TOKENS * case.top_k, "{}", case.label());
                let again = layer.router.decide(&g, &x, &context()).unwrap();
                prop_assert_eq!(&again.plan, &decision.plan);
                moebius_testkit::same_bits("weights", again.weights.data(), decision.weights.data());
                prop_assert!(decision.losses.iter().all(|loss| loss.value.data()[0].is_finite()));
            }
        }
    }
}

/// The layer's answers to all tokens but the last, when the last is `last`.
fn earlier_answers(case: &Case, last: f32, seed: u64) -> Vec<f32> {
    let layer = case.random_layer(seed);
    let mut x = random(&[TOKENS, HIDDEN], 4);
    x.data_mut()[(TOKENS - 1) * HIDDEN..].fill(last);
    let (y, _) = layer.forward_by(&Graph::inference(Precision::F32), &Var::constant(x), &context()).unwrap();
    y.data()[..(TOKENS - 1) * HIDDEN].to_vec()
}

/// What may be built for a causal model without saying so sees no later token; expert choice does.
#[test]
fn only_what_is_refused_leaks_the_future() {
    for case in CASES {
        let same = (1..6).all(|seed| earlier_answers(case, 0.1, seed) == earlier_answers(case, 3.0, seed));
        let may_leak = case.flags.contains(&"allow_future_leak");
        assert!(same || may_leak, "{}", case.label());
        assert!(!same || case.name != "expert_choice", "{}", case.label());
    }
}

/// Plain gradient descent on a fixed linear map: every router's layer learns.
#[test]
fn every_layer_learns() {
    let (x, map) = (random(&[TOKENS, HIDDEN], 11), random(&[HIDDEN, HIDDEN], 12));
    // A rate at which every method is stable.
    let rate = 0.03;
    let target: Vec<f32> = (0..TOKENS * HIDDEN)
        .map(|i| {
            (0..HIDDEN).map(|j| x.data()[i / HIDDEN * HIDDEN + j] * map.data()[i % HIDDEN * HIDDEN + j] / 2.0).sum()
        })
        .collect();
    for case in CASES {
        let mut layer = case.layer(&mut |id, shape| {
            let mut value = random(shape, 20 + id as u64);
            value.data_mut().iter_mut().for_each(|v| *v *= 0.5);
            value
        });
        let mut losses = Vec::new();
        for _ in 0..400 {
            let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
            let counts = {
                let (y, decision) = layer.forward_by(&g, &g.variable(x.clone()), &context()).unwrap();
                let errors: Vec<f32> = y.data().iter().zip(&target).map(|(y, t)| y - t).collect();
                let value = errors.iter().map(|e| f64::from(e * e)).sum::<f64>() / TOKENS as f64;
                let slopes = errors.iter().map(|e| 2.0 * e / TOKENS as f32).collect();
                let loss = math::scalar(&g, value, vec![(&y, slopes)]);
                losses.push(value);
                let mut load = LoadStatistics::default();
                load.add(&decision.plan);
                let total = ops::sum(&g, &[&loss, &decision.auxiliary(&g)]);
                g.backward(&total, &mut gradients);
                load.counts
            };
            for param in layer.router.params_mut().into_iter().chain(layer.experts.params_mut()) {
                let Some(gradient) = gradients.get(param.id()) else { continue };
                param.update(|w| w.iter_mut().zip(gradient).for_each(|(w, d)| *w -= rate * d));
            }
            layer.router.after_step(&counts);
        }
        let (first, last) = (losses[0], losses[399]);
        assert!(last < 0.75 * first, "{}: {first} to {last}", case.label());
    }
}

fn refusal(name: &str, top_k: usize, options: &[(&str, OptionValue)]) -> String {
    let mut make = |name: &str, shape: &[usize]| Ok(Param::new(0, name, Tensor::zeros(shape)));
    let mut setup = Setup::new(HIDDEN, EXPERTS, top_k, &mut make);
    options.iter().for_each(|(key, value)| drop(setup.options.insert((*key).into(), value.clone())));
    build(name, &mut setup).map(|_| String::new()).unwrap_or_else(|error| error.to_string())
}

#[test]
fn wrong_combinations_are_refused() {
    assert!(refusal("topk", 2, &[]).starts_with("router: wanted one of top_k, noisy_top_k"));
    assert_eq!(
        refusal("switch", 1, &[("jiter", 0.1.into())]),
        "router switch: option jiter: wanted an option that this router has"
    );
    assert_eq!(
        refusal("switch", 1, &[("jitter", 2.0.into())]),
        "router switch: option jitter: wanted 0 to 0.99, found 2"
    );
    assert_eq!(
        refusal("switch", 1, &[("jitter", true.into())]),
        "router switch: option jitter: wanted 0 to 0.99, found true"
    );
    assert!(refusal("switch", 2, &[]).contains("wanted 1 choices a token"));
    assert!(refusal("expert_choice", 2, &[]).contains("must not see"));
    assert_eq!(refusal("expert_choice", 2, &[("allow_future_leak", true.into())]), "");
    assert!(refusal("base", 1, &[]).contains("must not see"));
    assert!(refusal("noisy_top_k", 6, &[]).contains("wanted fewer choices than the 6 experts"));
    assert!(refusal("top_k", 7, &[]).contains("wanted 1 to 6 choices"));
    for name in ["top_k", "noisy_top_k", "loss_free", "forced"] {
        assert!(refusal(name, 1, &[]).contains("gets no gradient"), "{name}");
    }
    assert!(refusal("hash", 1, &[]).contains("needs a vocabulary"));
    assert!(
        refusal("sinkhorn", 2, &[("allow_future_leak", true.into()), ("weight", "relu".into())])
            .contains("softmax, sigmoid")
    );
}
