//! Finite differences for the operations' tests.

use crate::{Gradients, Graph, Param, Rng, Tensor, Var};
use moebius_kernels::gemm::Precision;
use moebius_testkit::{check_gradient, same_bits};

/// Standard normal numbers.
pub(crate) fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut data = vec![0.0; shape.iter().product()];
    Rng::new(seed).fill_normal(&mut data, 1.0);
    Tensor::new(shape, data)
}

/// As [`check_gradients_with_params`], without weights.
pub(crate) fn check_gradients(inputs: &[Tensor], op: impl for<'p> Fn(&Graph<'p>, &[Var]) -> Var) {
    check_gradients_with_params(inputs, &[], |g, x, _| op(g, x));
}

fn params(weights: &[Tensor]) -> Vec<Param> {
    weights.iter().enumerate().map(|(id, w)| Param::new(id, format!("w{id}"), w.clone())).collect()
}

/// Compares the gradients of a random projection of what `op` gives with differences. The operation stands twice on the
/// tape, each time with a projection of its own: the later one finds all gradients fresh, the other adds to them.
pub(crate) fn check_gradients_with_params(
    inputs: &[Tensor],
    weights: &[Tensor],
    op: impl for<'p> Fn(&Graph<'p>, &[Var], &'p [Param]) -> Var,
) {
    let projections = |len: usize| [random(&[len], 98), random(&[len], 99)];
    let value = |inputs: &[Tensor], weights: &[Tensor]| -> f64 {
        let (params, g) = (params(weights), Graph::inference(Precision::F32));
        let y = op(&g, &inputs.iter().cloned().map(Var::constant).collect::<Vec<_>>(), &params);
        let [first, second] = projections(y.data().len());
        let both = first.data().iter().zip(second.data()).map(|(&a, &b)| f64::from(a) + f64::from(b));
        y.data().iter().zip(both).map(|(&y, p)| f64::from(y) * p).sum()
    };
    let params = params(weights);
    let run = |reached: bool| {
        let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
        let leaf = |x: &Tensor| if reached { g.variable(x.clone()) } else { Var::constant(x.clone()) };
        let leaves: Vec<Var> = inputs.iter().map(leaf).collect();
        let outputs = [op(&g, &leaves, &params), op(&g, &leaves, &params)];
        let seeds = projections(outputs[0].data().len());
        let seeds: Vec<(&Var, &[f32])> = outputs.iter().zip(&seeds).map(|(y, p)| (y, p.data())).collect();
        let found = g.backward_from(&seeds, &mut gradients);
        (leaves.iter().map(|x| found.get(x).map(<[f32]>::to_vec)).collect::<Vec<_>>(), gradients)
    };
    let (of_inputs, of_weights) = run(true);
    for (i, x) in inputs.iter().enumerate() {
        let mut moved = inputs.to_vec();
        check_gradient(&format!("input {i}"), x.data(), of_inputs[i].as_ref().expect("a gradient"), |at| {
            moved[i] = Tensor::new(x.shape(), at.to_vec());
            value(&moved, weights)
        });
    }
    for (id, weight) in weights.iter().enumerate() {
        let mut moved = weights.to_vec();
        check_gradient(&format!("weight {id}"), weight.data(), of_weights.get(id).expect("a gradient"), |at| {
            moved[id] = Tensor::new(weight.shape(), at.to_vec());
            value(inputs, &moved)
        });
    }
    // Inputs that need no gradient leave the weights' as it is.
    let (none, alone) = run(false);
    assert!(none.iter().all(Option::is_none));
    for id in 0..weights.len() {
        same_bits(&format!("weight {id} alone"), alone.get(id).unwrap(), of_weights.get(id).unwrap());
    }
}
