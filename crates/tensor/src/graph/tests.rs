//! The tape itself: fan-out, the order of additions, what is kept and when it goes, recomputation.

use super::*;
use crate::ops::testing::random;
use crate::{Param, ops};
use std::rc::{Rc, Weak};

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn gradients_of_all_uses_add_up() {
    let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
    let x = g.variable(Tensor::new(&[2], vec![1.0, 2.0]));
    let y = ops::add(&g, &ops::scale(&g, &x, 3.0), x.clone()).unwrap();
    let z = ops::add(&g, &y, y.clone()).unwrap();
    let leaves = g.backward_from(&[(&z, &[1.0, 10.0]), (&x, &[0.5, 0.5])], &mut gradients);
    assert_eq!(leaves.get(&x), Some(&[8.5, 80.5][..]));
}

#[test]
fn nothing_flows_to_constants_or_without_a_tape() {
    let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
    let (x, constant) = (g.variable(Tensor::scalar(2.0)), Var::constant(Tensor::scalar(3.0)));
    assert!(!ops::add(&g, &constant, x.detach()).unwrap().needs_gradient());
    let y = ops::add(&g, &x, constant.clone()).unwrap();
    let unused = g.variable(Tensor::scalar(1.0));
    let leaves = g.backward(&y, &mut gradients);
    assert_eq!((leaves.get(&x), leaves.get(&constant), leaves.get(&unused)), (Some(&[1.0][..]), None, None));

    let g = Graph::inference(Precision::F32);
    let x = g.variable(Tensor::scalar(2.0));
    assert!(!ops::scale(&g, &x, 2.0).needs_gradient());
    assert!(g.backward(&x, &mut gradients).get(&x).is_none());
}

/// An identity that keeps `token`, and when its gradient comes notes whether `later` is gone.
fn keeps<'p>(g: &Graph<'p>, x: &Var, token: Rc<()>, later: Weak<()>, gone: &'p RefCell<Vec<bool>>) -> Var {
    let to_x = x.place();
    g.record(x.value().clone(), move |dy, back| {
        let _kept = token;
        gone.borrow_mut().push(later.upgrade().is_none());
        back.give(to_x, dy);
    })
}

#[test]
fn what_an_operation_saved_is_gone_before_the_one_below_runs() {
    let (gone, mut gradients) = (RefCell::new(Vec::new()), Gradients::new());
    let tokens: [Rc<()>; 3] = Default::default();
    let weak = tokens.each_ref().map(Rc::downgrade);
    let g = Graph::training(Precision::F32);
    let mut x = g.variable(Tensor::scalar(1.0));
    for (i, token) in tokens.into_iter().enumerate() {
        x = keeps(&g, &x, token, weak.get(i + 1).cloned().unwrap_or_default(), &gone);
    }
    g.backward(&x, &mut gradients);
    assert_eq!(*gone.borrow(), [true; 3]);
}

#[test]
fn sums_and_rotations_keep_no_numbers() {
    use moebius_kernels::rope::RopeTable;
    let g = Graph::training(Precision::F32);
    let x = g.variable(random(&[3, 8], 1));
    let table = std::sync::Arc::new(RopeTable::new(100.0, 4, 8));
    let results = [
        ops::scale(&g, &x, 2.0),
        ops::add(&g, &x, x.clone()).unwrap(),
        ops::rope(&g, x.clone(), 2, 4, &[0, 1, 2], &table).unwrap(),
    ];
    assert_eq!(x.value().holders(), 1, "the tape holds the input");
    assert!(results.iter().all(|y| y.value().holders() == 1), "the tape holds the output");
}

/// Two layers with norms, a residual around each part, and a use of the input beside them.
fn network<'p>(g: &Graph<'p>, x: &Var, weights: &'p [Param], recompute: bool) -> Vec<Var> {
    let part = move |g: &Graph<'p>, x: &Var| -> Result<Vec<Var>, TensorError> {
        let normed = ops::rms_norm(g, x, &weights[0], 1e-5)?;
        let inner = ops::swiglu(g, &ops::linear(g, &normed, &weights[1])?)?;
        let y = ops::linear(g, &inner, &weights[2])?;
        Ok(vec![ops::add(g, x, y)?, inner])
    };
    let run = |x: &Var| if recompute { g.checkpoint(x, part) } else { part(g, x) }.unwrap();
    let first = run(x);
    let second = run(&first[0]);
    // x and the inner activations are used again, after the parts that use them too.
    vec![ops::add(g, &second[0], x.clone()).unwrap(), ops::add(g, &first[1], second[1].clone()).unwrap()]
}

#[test]
fn recomputation_changes_no_bit() {
    let weights: Vec<Param> = [&[8][..], &[12, 8], &[8, 6]]
        .iter()
        .enumerate()
        .map(|(id, shape)| Param::new(id, format!("w{id}"), random(shape, id as u64)))
        .collect();
    for precision in [Precision::F32, Precision::Bf16] {
        let run = |recompute: bool, reached: bool| {
            let (g, mut gradients) = (Graph::training(precision), Gradients::new());
            let x = if reached { g.variable(random(&[37, 8], 7)) } else { Var::constant(random(&[37, 8], 7)) };
            let outputs = network(&g, &x, &weights, recompute);
            let seeds = outputs.iter().map(|y| random(y.shape(), 9)).collect::<Vec<_>>();
            let seeds: Vec<(&Var, &[f32])> = outputs.iter().zip(&seeds).map(|(y, dy)| (y, dy.data())).collect();
            let values: Vec<Vec<u32>> = outputs.iter().map(|y| bits(y.data())).collect();
            let leaves = g.backward_from(&seeds, &mut gradients);
            let weights: Vec<Vec<u32>> = (0..3).map(|id| bits(gradients.get(id).unwrap())).collect();
            (values, weights, leaves.get(&x).map(bits))
        };
        assert!(run(false, true).2.is_some());
        assert_eq!(run(true, true), run(false, true));
        assert_eq!(run(true, false), run(false, false));
    }
}

#[test]
fn outputs_without_a_gradient_are_left_out_of_a_recomputation() {
    let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
    let x = g.variable(Tensor::scalar(3.0));
    let part = |g: &Graph<'_>, x: &Var| {
        Ok::<_, TensorError>(vec![
            ops::scale(g, x, 2.0),
            x.clone(),
            ops::scale(g, x, 100.0),
            Var::constant(Tensor::scalar(1.0)),
        ])
    };
    let outputs = g.checkpoint(&x, part).unwrap();
    let y = ops::sum(&g, &[&outputs[0], &outputs[1], &outputs[3]]);
    assert_eq!(y.data(), [10.0]);
    assert_eq!(g.backward(&y, &mut gradients).get(&x), Some(&[3.0][..]));
}

#[test]
fn a_part_knows_in_its_rehearsal_that_it_will_be_trained() {
    let part = |g: &Graph<'_>, x: &Var| if g.is_training() { Err("not trainable") } else { Ok(vec![x.clone()]) };
    let x = Var::constant(Tensor::scalar(3.0));
    assert!(Graph::inference(Precision::F32).checkpoint(&x, part).is_ok());
    assert_eq!(Graph::training(Precision::F32).checkpoint(&x, part).unwrap_err(), "not trainable");
}

#[test]
#[should_panic(expected = "a value of another graph")]
fn a_captured_value_does_not_lose_its_gradient_in_silence() {
    let g = Graph::training(Precision::F32);
    let (x, captured) = (g.variable(Tensor::scalar(1.0)), g.variable(Tensor::scalar(2.0)));
    let _ = g.checkpoint(&x, move |g, x| ops::add(g, x, captured.clone()).map(|y| vec![y]));
}
