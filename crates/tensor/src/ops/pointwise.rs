//! Functions and products number by number.

use super::same_shape;
use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::memory::Buffer;
use moebius_kernels::{pointwise, select};

pub use moebius_kernels::pointwise::Function;

/// A function of every number.
pub fn apply<'p>(g: &Graph<'p>, x: &Var, function: Function) -> Var {
    let mut y = Buffer::scratch(x.data().len());
    pointwise::apply(function, x.data(), &mut y);
    let input = x.clone();
    g.record_from(&[x], Tensor::new(x.shape(), y), move |mut d, back| {
        pointwise::apply_backward(function, input.data(), &mut d);
        back.give(&input, d);
    })
}

/// `a b`, of one shape.
pub fn multiply<'p>(g: &Graph<'p>, a: &Var, b: &Var) -> Result<Var, TensorError> {
    same_shape("multiply", a.value(), b.value())?;
    let product = |a: &[f32], b: &[f32]| {
        let mut out = Buffer::scratch(a.len());
        pointwise::multiply(a, b, &mut out);
        out
    };
    let output = Tensor::new(a.shape(), product(a.data(), b.data()));
    let (left, right) = (a.clone(), b.clone());
    Ok(g.record_from(&[a, b], output, move |d, back| {
        back.give(&left, product(&d, right.data()));
        back.give(&right, product(&d, left.data()));
    }))
}

/// Every row of x times one row.
///
/// # Shapes
/// x and result `[tokens, width]`, row `[width]`.
pub fn multiply_rows<'p>(g: &Graph<'p>, x: &Var, row: &Var) -> Result<Var, TensorError> {
    let [width] = row.dims()?;
    let rows = super::rows_of("multiply_rows input", x, width)?;
    let product = move |x: &[f32], row: &[f32]| {
        let mut out = Buffer::scratch(x.len());
        for (x, out) in x.chunks_exact(width.max(1)).zip(out.chunks_exact_mut(width.max(1))) {
            pointwise::multiply(x, row, out);
        }
        out
    };
    let output = Tensor::new(&[rows, width], product(x.data(), row.data()));
    let (left, right) = (x.clone(), row.clone());
    Ok(g.record_from(&[x, row], output, move |d, back| {
        if let Some(sum) = back.sum_of(&right) {
            // Row after row: one order, whatever the threads.
            product_rows(&d, left.data(), width)
                .chunks_exact(width.max(1))
                .for_each(|row| select::add_assign(sum, row));
        }
        back.give(&left, product(&d, right.data()));
    }))
}

fn product_rows(a: &[f32], b: &[f32], width: usize) -> Buffer<f32> {
    debug_assert!(a.len().is_multiple_of(width.max(1)));
    let mut out = Buffer::scratch(a.len());
    pointwise::multiply(a, b, &mut out);
    out
}

/// −exp(w) of a weight: rates of decay, which are learned by their logarithm (Gu and Dao 2023).
pub fn minus_exp<'p>(g: &Graph<'p>, weight: &'p Param) -> Var {
    let value: Buffer<f32> = weight.value().data().iter().map(|x| -x.exp()).collect();
    let output = Tensor::new(weight.shape(), value);
    let saved = output.clone();
    g.record(output, move |mut d, back| {
        // The value is its own slope.
        d.iter_mut().zip(saved.data()).for_each(|(d, value)| *d *= value);
        back.give_weight(weight, d);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients, check_gradients_with_params, random};

    #[test]
    fn gradients_match_finite_differences() {
        for function in [Function::Sigmoid, Function::Silu, Function::GeluTanh, Function::Softplus] {
            check_gradients(&[random(&[3, 7], 1)], |g, x| apply(g, &x[0], function));
        }
        // Away from the kink.
        let x = random(&[3, 7], 1).data().iter().map(|x| x + x.signum() / 4.0).collect::<Vec<_>>();
        check_gradients(&[Tensor::new(&[3, 7], x)], |g, x| apply(g, &x[0], Function::Relu));
        check_gradients(&[random(&[3, 7], 1), random(&[3, 7], 2)], |g, x| {
            multiply(g, &multiply(g, &x[0], &x[1]).unwrap(), &x[0]).unwrap()
        });
        check_gradients(&[random(&[3, 7], 1), random(&[7], 2)], |g, x| multiply_rows(g, &x[0], &x[1]).unwrap());
        check_gradients_with_params(&[], &[random(&[3, 4], 1)], |g, _, w| minus_exp(g, &w[0]));
    }
}
