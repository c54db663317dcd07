//! Sums: residual additions and the weighted sum of losses.

use super::same_shape;
use crate::{Graph, Tensor, TensorError, Var};
use moebius_kernels::memory::Buffer;
use moebius_kernels::select;

/// `a + b`, of one shape.
pub fn add<'p>(g: &Graph<'p>, a: &Var, b: &Var) -> Result<Var, TensorError> {
    same_shape("add", a.value(), b.value())?;
    let mut out = Buffer::scratch(a.data().len());
    select::add(a.data(), b.data(), &mut out);
    let inputs = [a.clone(), b.clone()];
    Ok(g.record_from(&[a, b], Tensor::new(a.shape(), out), move |dy, back| {
        inputs.iter().for_each(|x| back.add(x, dy));
    }))
}

/// `factor * x`.
pub fn scale<'p>(g: &Graph<'p>, x: &Var, factor: f32) -> Var {
    let mut out = Buffer::from_slice(x.data());
    select::scale(&mut out, factor);
    let input = x.clone();
    g.record_from(&[x], Tensor::new(x.shape(), out), move |dy, back| {
        let mut dx = Buffer::from_slice(dy);
        select::scale(&mut dx, factor);
        back.add(&input, &dx);
    })
}

/// The sum of numbers (shape `[1]` each), each with its weight, added in the order given.
pub fn weighted_sum<'p>(g: &Graph<'p>, terms: &[(f32, &Var)]) -> Var {
    let total = terms.iter().fold(0.0, |sum, (weight, x)| sum + weight * x.data()[0]);
    let inputs: Vec<(f32, Var)> = terms.iter().map(|&(weight, x)| (weight, x.clone())).collect();
    let vars: Vec<&Var> = terms.iter().map(|(_, x)| *x).collect();
    g.record_from(&vars, Tensor::scalar(total), move |dy, back| {
        inputs.iter().for_each(|(weight, x)| back.add(x, &[weight * dy[0]]));
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients, random};

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients(&[random(&[3, 5], 1), random(&[3, 5], 2)], |g, x| {
            add(g, &scale(g, &x[0], 1.5), &add(g, &x[1], &x[0]).unwrap()).unwrap()
        });
    }

    #[test]
    fn shapes_must_agree() {
        let g = Graph::inference(moebius_kernels::gemm::Precision::F32);
        let (a, b) = (Var::constant(Tensor::zeros(&[2, 3])), Var::constant(Tensor::zeros(&[3, 2])));
        assert_eq!(add(&g, &a, &b).unwrap_err().to_string(), "add: wanted shape [2, 3], found [3, 2]");
    }
}
