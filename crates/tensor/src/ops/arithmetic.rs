//! Sums: residual additions and the weighted sum of losses.

use super::same_shape;
use crate::{Graph, Place, Tensor, TensorError, Var};
use moebius_kernels::memory::Buffer;
use moebius_kernels::select;

/// `a + b`, of one shape; in the place of b, if nobody else holds it.
pub fn add<'p>(g: &Graph<'p>, a: &Var, b: Var) -> Result<Var, TensorError> {
    same_shape("add", a.value(), b.value())?;
    let (to_a, to_b) = (a.place(), b.place());
    let mut sum = b.into_value();
    select::add_assign(sum.data_mut(), a.data());
    Ok(g.record_from_places(&[to_a, to_b], sum, move |dy, back| {
        back.add(to_a, &dy);
        back.give(to_b, dy);
    }))
}

/// `factor * x`.
pub fn scale<'p>(g: &Graph<'p>, x: &Var, factor: f32) -> Var {
    let mut out = Buffer::from_slice(x.data());
    select::scale(&mut out, factor);
    let to_x = x.place();
    g.record_from(&[x], Tensor::new(x.shape(), out), move |mut dy, back| {
        select::scale(&mut dy, factor);
        back.give(to_x, dy);
    })
}

/// Each row of x times its number, which has no gradient.
///
/// # Shapes
/// x and result `[rows, cols]`, factors `[rows]`.
pub fn scale_rows_by<'p>(g: &Graph<'p>, x: &Var, factors: Vec<f32>) -> Result<Var, TensorError> {
    let [rows, cols] = x.dims()?;
    assert_eq!(rows, factors.len(), "a factor for each row");
    let scaled = move |values: &mut [f32], factors: &[f32]| {
        for (row, factor) in values.chunks_exact_mut(cols.max(1)).zip(factors) {
            row.iter_mut().for_each(|x| *x *= factor);
        }
    };
    let mut out = Buffer::from_slice(x.data());
    scaled(&mut out, &factors);
    let to_x = x.place();
    Ok(g.record_from(&[x], Tensor::new(x.shape(), out), move |mut dy, back| {
        scaled(&mut dy, &factors);
        back.give(to_x, dy);
    }))
}

/// x cut to at most `limit` either way; what is cut has no gradient.
pub fn clamp<'p>(g: &Graph<'p>, x: &Var, limit: f32) -> Var {
    let out: Buffer<f32> = x.data().iter().map(|x| x.clamp(-limit, limit)).collect();
    let input = x.clone();
    g.record_from(&[x], Tensor::new(x.shape(), out), move |mut dy, back| {
        dy.iter_mut().zip(input.data()).filter(|(_, x)| x.abs() > limit).for_each(|(d, _)| *d = 0.0);
        back.give(&input, dy);
    })
}

/// The sum of numbers (shape `[1]` each), each with its weight, added in the order given.
pub fn weighted_sum<'p>(g: &Graph<'p>, terms: &[(f32, &Var)]) -> Var {
    let total = terms.iter().fold(0.0, |sum, (weight, x)| sum + weight * x.data()[0]);
    let places: Vec<(f32, Place)> = terms.iter().map(|&(weight, x)| (weight, x.place())).collect();
    let vars: Vec<&Var> = terms.iter().map(|(_, x)| *x).collect();
    g.record_from(&vars, Tensor::scalar(total), move |dy, back| {
        places.iter().for_each(|&(weight, to_x)| back.add(to_x, &[weight * dy[0]]));
    })
}

/// The sum of numbers (shape `[1]` each), added in the order given.
pub fn sum<'p>(g: &Graph<'p>, terms: &[&Var]) -> Var {
    weighted_sum(g, &terms.iter().map(|&x| (1.0, x)).collect::<Vec<_>>())
}

/// The mean of numbers (shape `[1]` each); zero of none.
pub fn mean<'p>(g: &Graph<'p>, terms: &[&Var]) -> Var {
    let share = 1.0 / terms.len().max(1) as f32;
    weighted_sum(g, &terms.iter().map(|&x| (share, x)).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients, random};

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients(&[random(&[3, 5], 1), random(&[3, 5], 2)], |g, x| {
            add(g, &scale(g, &x[0], 1.5), add(g, &x[1], x[0].clone()).unwrap()).unwrap()
        });
    }

    #[test]
    fn gradients_of_factors_and_cuts_match_finite_differences() {
        check_gradients(&[random(&[3, 5], 1)], |g, x| {
            clamp(g, &scale_rows_by(g, &x[0], vec![1.0, -2.0, 0.5]).unwrap(), 0.9)
        });
    }

    #[test]
    fn gradients_of_sums_match_finite_differences() {
        check_gradients(&[random(&[1], 1), random(&[1], 2), random(&[1], 3)], |g, x| {
            let (sum, mean) = (sum(g, &[&x[0], &x[1]]), mean(g, &[&x[1], &x[2], &x[2]]));
            weighted_sum(g, &[(0.5, &sum), (-2.0, &mean), (3.0, &x[0])])
        });
    }

    #[test]
    fn sums_on_paper() {
        let g = Graph::inference(moebius_kernels::gemm::Precision::F32);
        let [a, b] = [1.0, 4.0].map(|x| Var::constant(Tensor::scalar(x)));
        assert_eq!(sum(&g, &[&a, &b]).data(), [5.0]);
        assert_eq!(mean(&g, &[&a, &b]).data(), [2.5]);
        assert_eq!(mean(&g, &[]).data(), [0.0]);
        assert_eq!(weighted_sum(&g, &[(2.0, &a), (-1.0, &b)]).data(), [-2.0]);
    }

    #[test]
    fn shapes_must_agree() {
        let g = Graph::inference(moebius_kernels::gemm::Precision::F32);
        let (a, b) = (Var::constant(Tensor::zeros(&[2, 3])), Var::constant(Tensor::zeros(&[3, 2])));
        assert_eq!(add(&g, &a, b).unwrap_err().to_string(), "add: wanted shape [2, 3], found [3, 2]");
    }
}
