//! Finite differences for the operations' tests.

use crate::{Gradients, Graph, Param, Rng, Tensor, Var};
use moebius_kernels::gemm::Precision;

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

/// Compares the gradients of a random projection of what `op` gives with central differences.
pub(crate) fn check_gradients_with_params(
    inputs: &[Tensor],
    weights: &[Tensor],
    op: impl for<'p> Fn(&Graph<'p>, &[Var], &'p [Param]) -> Var,
) {
    let params = |weights: &[Tensor]| -> Vec<Param> {
        weights.iter().enumerate().map(|(id, w)| Param::new(id, format!("w{id}"), w.clone())).collect()
    };
    let value = |inputs: &[Tensor], weights: &[Tensor]| -> f64 {
        let (params, g) = (params(weights), Graph::inference(Precision::F32));
        let y = op(&g, &inputs.iter().cloned().map(Var::constant).collect::<Vec<_>>(), &params);
        let projection = random(&[y.data().len()], 99);
        y.data().iter().zip(projection.data()).map(|(&y, &p)| f64::from(y) * f64::from(p)).sum()
    };
    let params = params(weights);
    let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
    let leaves: Vec<Var> = inputs.iter().map(|x| g.variable(x.clone())).collect();
    let y = op(&g, &leaves, &params);
    let projection = random(&[y.data().len()], 99);
    let leaf_gradients = g.backward_from(&[(&y, projection.data())], &mut gradients);
    let analytic = |which: usize| -> &[f32] {
        match which.checked_sub(inputs.len()) {
            None => leaf_gradients.get(&leaves[which]).expect("a gradient for each input"),
            Some(param) => gradients.get(param).expect("a gradient for each weight"),
        }
    };
    let all: Vec<Tensor> = inputs.iter().chain(weights).cloned().collect();
    const STEP: f32 = 1e-2;
    for which in 0..all.len() {
        for i in 0..all[which].data().len() {
            let at = |step: f32| {
                let mut moved = all.clone();
                moved[which].data_mut()[i] += step;
                value(&moved[..inputs.len()], &moved[inputs.len()..])
            };
            let numeric = (at(STEP) - at(-STEP)) / (2.0 * f64::from(STEP));
            let found = f64::from(analytic(which)[i]);
            let tolerance = 2e-3 * (1.0 + numeric.abs());
            assert!(
                (numeric - found).abs() < tolerance,
                "operand {which}, element {i}: {found}, differences say {numeric}"
            );
        }
    }
}
