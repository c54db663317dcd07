//! Routing on paper, in every setting, and its gradients against differences.

use super::*;
use moebius_kernels::gemm::Precision;

fn router(top_k: usize, renormalise: bool) -> TopKRouter {
    // Three experts that read one coordinate each.
    let weight = Tensor::new(&[3, 3], vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
    TopKRouter::new(Param::new(0, "gate", weight), top_k, renormalise).unwrap()
}

#[test]
fn routing_on_paper() {
    let ln = |p: f32| p.ln();
    let x = Var::constant(Tensor::new(&[2, 3], vec![ln(0.5), ln(0.2), ln(0.3), 0.0, 0.0, 0.0]));
    for (renormalise, expected) in [(true, [0.625, 0.375, 0.5, 0.5]), (false, [0.5, 0.3, 1.0 / 3.0, 1.0 / 3.0])] {
        let router = router(2, renormalise);
        let routing = router.route(&Graph::inference(Precision::Bf16), &x).unwrap();
        // Equal scores go to the lower index.
        assert_eq!(routing.topk_index, [0, 2, 0, 1]);
        for (found, wanted) in routing.topk_weight.data().iter().zip(expected) {
            assert!((found - wanted).abs() < 1e-6, "{found} {wanted}");
        }
        assert_eq!(routing.plan.counts(), [2, 1, 1]);
    }
}

#[test]
fn a_router_without_gradient_is_refused_in_training_only() {
    let router = router(1, true);
    let x = Var::constant(Tensor::zeros(&[1, 3]));
    assert!(router.route(&Graph::inference(Precision::F32), &x).is_ok());
    let error = router.route(&Graph::training(Precision::F32), &x).unwrap_err();
    assert_eq!(error, MoeError::NoRouterGradient);
}

#[test]
fn a_router_without_gradient_is_refused_before_it_is_recomputed() {
    let router = router(1, true);
    let g = Graph::training(Precision::F32);
    let x = g.variable(Tensor::zeros(&[1, 3]));
    let error = g.checkpoint(&x, |g, x| router.route(g, x).map(|routing| vec![routing.weights])).unwrap_err();
    assert_eq!(error, MoeError::NoRouterGradient);
    assert!(error.to_string().contains("use raw weights or at least two choices"));
}

#[test]
fn routing_is_f32_whatever_the_precision() {
    let mut data = vec![0.0; 64 * 96];
    moebius_tensor::Rng::new(3).fill_normal(&mut data, 1.0);
    let weight = Tensor::new(&[8, 96], data[..8 * 96].to_vec());
    let router = TopKRouter::new(Param::new(0, "gate", weight), 2, true).unwrap();
    let x = Var::constant(Tensor::new(&[64, 96], data));
    let [full, half] = [Precision::F32, Precision::Bf16].map(|p| router.route(&Graph::inference(p), &x).unwrap());
    moebius_testkit::same_bits("logits", half.logits.data(), full.logits.data());
    moebius_testkit::same_bits("weights", half.weights.data(), full.weights.data());
    assert_eq!(half.plan, full.plan);
}

#[test]
fn weights_stand_in_the_plans_order() {
    let x = Var::constant(Tensor::new(&[2, 3], vec![0.0, 1.0, 3.0, 2.0, 0.0, 1.0]));
    let routing = router(2, true).route(&Graph::inference(Precision::F32), &x).unwrap();
    assert_eq!(routing.topk_index, [2, 1, 0, 2]);
    for row in 0..4 {
        let (token, slot) = (routing.plan.token()[row] as usize, routing.plan.slot()[row] as usize);
        assert_eq!(routing.weights.data()[row], routing.topk_weight.data()[token * 2 + slot]);
    }
}

#[test]
fn more_choices_than_experts_are_refused() {
    let error = TopKRouter::new(Param::new(0, "gate", Tensor::zeros(&[3, 2])), 4, true).unwrap_err();
    assert_eq!(error.to_string(), "top-k router: wanted 1 to 3 choices a token, found 4");
}

/// A router whose logits are its input.
fn reading(settings: RouterSettings, bias: Option<[f32; 4]>) -> TopKRouter {
    let identity = (0..16).map(|i| f32::from(u8::from(i % 5 == 0))).collect::<Vec<_>>();
    let bias = bias.map(|bias| Param::new(1, "bias", Tensor::new(&[4], bias.to_vec())));
    let settings = RouterSettings { selection_bias: bias.is_some(), ..settings };
    TopKRouter::with(Param::new(0, "gate", Tensor::new(&[4, 4], identity)), [None, bias], settings).unwrap()
}

fn one(router: &TopKRouter, logits: [f32; 4]) -> (Vec<u32>, Vec<f32>) {
    let x = Var::constant(Tensor::new(&[1, 4], logits.to_vec()));
    let routing = router.route(&Graph::inference(Precision::F32), &x).unwrap();
    (routing.topk_index.clone(), routing.topk_weight.data().to_vec())
}

fn close(found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len());
    assert!(found.iter().zip(wanted).all(|(f, w)| (f - w).abs() < 1e-5), "{found:?}, wanted {wanted:?}");
}

#[test]
fn weights_on_paper() {
    let base = RouterSettings::softmax(2, false);
    // Softmax 0.1, 0.2, 0.3, 0.4.
    let logits = [0.1f32, 0.2, 0.3, 0.4].map(f32::ln);
    let weights = |settings| one(&reading(settings, None), logits);
    let (index, plain) = weights(base);
    assert_eq!(index, [3, 2]);
    close(&plain, &[0.4, 0.3]);
    close(&weights(RouterSettings { scale: 2.5, ..base }).1, &[1.0, 0.75]);
    close(&weights(RouterSettings { normalise: Normalise::Sum { plus: 0.1 }, ..base }).1, &[0.5, 0.375]);
    close(&weights(RouterSettings { normalise: Normalise::SumAtLeast { least: 0.8 }, ..base }).1, &[0.5, 0.375]);
    close(
        &weights(RouterSettings { normalise: Normalise::SumAtLeast { least: 0.1 }, ..base }).1,
        &[4.0 / 7.0, 3.0 / 7.0],
    );
    close(&weights(RouterSettings { normalise: Normalise::Norm { p: 2.0 }, ..base }).1, &[0.8, 0.6]);
    close(&weights(RouterSettings { score: Score::SoftmaxOfChosen, ..base }).1, &[4.0 / 7.0, 3.0 / 7.0]);
    // The logistic function of ln p is p / (1 + p).
    close(&weights(RouterSettings { score: Score::Sigmoid, ..base }).1, &[0.4 / 1.4, 0.3 / 1.3]);
    close(&weights(RouterSettings { score: Score::SigmoidOfChosen, ..base }).1, &[0.4 / 1.4, 0.3 / 1.3]);
}

#[test]
fn a_selection_bias_chooses_and_does_not_weigh() {
    let router = reading(RouterSettings::softmax(2, false), Some([0.35, 0.0, 0.0, 0.0]));
    let (index, weights) = one(&router, [0.1f32, 0.2, 0.3, 0.4].map(f32::ln));
    assert_eq!(index, [0, 3]);
    close(&weights, &[0.1, 0.4]);
}

#[test]
fn groups_on_paper() {
    let groups = |score| Some(ExpertGroups { count: 2, used: 1, score });
    let logits = [0.05f32, 0.4, 0.3, 0.25].map(f32::ln);
    // The best single expert stands in the first group, the best pair in the second.
    for (score, wanted) in [(GroupScore::Best, [1, 0]), (GroupScore::TwoBest, [2, 3])] {
        let settings = RouterSettings { groups: groups(score), ..RouterSettings::softmax(2, false) };
        assert_eq!(one(&reading(settings, None), logits).0, wanted);
    }
}

#[test]
fn a_logit_bias_is_part_of_the_logits() {
    let weight = Param::new(0, "gate", Tensor::zeros(&[3, 2]));
    let bias = Param::new(1, "bias", Tensor::new(&[3], vec![0.0, 2.0, 1.0]));
    let settings =
        RouterSettings { logit_bias: true, score: Score::SoftmaxOfChosen, ..RouterSettings::softmax(2, false) };
    let router = TopKRouter::with(weight, [Some(bias), None], settings).unwrap();
    let x = Var::constant(Tensor::new(&[1, 2], vec![5.0, 6.0]));
    let routing = router.route(&Graph::inference(Precision::F32), &x).unwrap();
    assert_eq!((routing.topk_index, routing.logits.data()), (vec![1, 2], &[0.0, 2.0, 1.0][..]));
    close(routing.topk_weight.data(), &[0.731_058_6, 0.268_941_43]);
}

#[test]
fn sparse_mixer_on_paper() {
    let settings = RouterSettings { score: Score::SparseMixer { jitter: 0.1 }, ..RouterSettings::softmax(2, false) };
    // From 2.0, 1.7 is 0.15 of 2.0 away and stays, 1.5 is 0.25 away and goes; from 1.7, 1.5 stays.
    let (index, weights) = one(&reading(settings, None), [1.5, 2.0, -3.0, 1.7]);
    assert_eq!(index, [1, 3]);
    let pair = |a: f32, b: f32| a.exp() / (a.exp() + b.exp());
    close(&weights, &[pair(2.0, 1.7), pair(1.7, 1.5)]);
}

#[test]
fn gradients_match_finite_differences_in_every_setting() {
    let base = RouterSettings { scale: 1.7, ..RouterSettings::softmax(2, true) };
    let groups = Some(ExpertGroups { count: 2, used: 1, score: GroupScore::TwoBest });
    let settings = [
        base,
        RouterSettings { normalise: Normalise::None, ..base },
        RouterSettings { score: Score::Sigmoid, normalise: Normalise::Sum { plus: 1e-3 }, groups, ..base },
        RouterSettings { score: Score::SoftmaxOfChosen, normalise: Normalise::None, ..base },
        RouterSettings { score: Score::SigmoidOfChosen, normalise: Normalise::None, ..base },
        RouterSettings { normalise: Normalise::Norm { p: 1.0 }, ..base },
        RouterSettings { normalise: Normalise::Norm { p: 2.0 }, ..base },
        RouterSettings { normalise: Normalise::SumAtLeast { least: 1e-3 }, ..base },
        RouterSettings { normalise: Normalise::SumAtLeast { least: 10.0 }, ..base },
        RouterSettings { score: Score::SparseMixer { jitter: 0.3 }, normalise: Normalise::None, scale: 1.0, ..base },
    ];
    let x = [0.9, 0.2, 1.1, 1.0, 0.5, 0.8, -0.4, 0.1];
    let answer = [0.3, -0.7, 1.1, 0.4];
    for settings in settings {
        let router = reading(settings, None);
        let value = |x: &[f32]| {
            let x = Var::constant(Tensor::new(&[2, 4], x.to_vec()));
            let routing = router.route(&Graph::inference(Precision::F32), &x).unwrap();
            routing.weights.data().iter().zip(&answer).map(|(w, a)| f64::from(w * a)).sum()
        };
        let (g, mut gradients) = (Graph::training(Precision::F32), moebius_tensor::Gradients::new());
        let leaf = g.variable(Tensor::new(&[2, 4], x.to_vec()));
        let routing = router.route(&g, &leaf).unwrap();
        let found = g.backward_from(&[(&routing.weights, &answer)], &mut gradients);
        moebius_testkit::check_gradient(&format!("{settings:?}"), &x, found.get(&leaf).unwrap(), value);
    }
}

#[test]
fn settings_that_do_not_fit_are_refused() {
    let base = RouterSettings::softmax(2, true);
    let groups = |count, used, score| RouterSettings { groups: Some(ExpertGroups { count, used, score }), ..base };
    for (settings, part) in [
        (groups(3, 1, GroupScore::Best), "wanted a divisor of 4 experts, found 3"),
        (groups(2, 3, GroupScore::Best), "wanted 1 to 2, found 3"),
        (groups(4, 1, GroupScore::Best), "wanted room for 2 choices"),
        (groups(4, 2, GroupScore::TwoBest), "at least 2 experts in each"),
        (RouterSettings { top_k: 3, score: Score::SparseMixer { jitter: 0.1 }, ..base }, "wanted 1 or 2 choices"),
    ] {
        let message = settings.check(4).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    let missing = RouterSettings { selection_bias: true, ..base };
    let weight = || Param::new(0, "gate", Tensor::zeros(&[3, 2]));
    let error = TopKRouter::with(weight(), [None, None], missing).unwrap_err();
    assert_eq!(error.to_string(), "router's bias: wanted shape [3], found []");
    let surplus = Some(Param::new(1, "bias", Tensor::zeros(&[3])));
    assert!(TopKRouter::with(weight(), [surplus, None], base).is_err());
}
