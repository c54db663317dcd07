//! Functions of one number, over many.

use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::math::sigmoid;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::for_each_block;

/// Cycles that one number takes, roughly.
const CYCLES: usize = 2;

/// A function of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// `1 / (1 + exp(-x))`
    Sigmoid,
    /// `x sigmoid(x)` (Elfwing et al. 2017).
    Silu,
    /// `x / 2 (1 + tanh(√(2/π) (x + 0.044715 x³)))` (Hendrycks and Gimpel 2016).
    GeluTanh,
    /// `max(x, 0)`
    Relu,
    /// `ln(1 + exp(x))`
    Softplus,
}

/// `√(2/π)`, doubled: `(1 + tanh u) / 2` is the logistic function of `2 u`.
const GELU_SLOPE: f32 = 2.0 * 0.797_884_6;
const GELU_CUBE: f32 = 0.044_715;

impl Function {
    /// The value at `x`.
    #[inline(always)]
    fn of<S: Simd>(self, x: Lanes<S>) -> Lanes<S> {
        let splat = |value| Lanes::splat(x.simd, value);
        match self {
            Self::Sigmoid => sigmoid(x),
            Self::Silu => x * sigmoid(x),
            Self::GeluTanh => x * sigmoid(gelu_inner(x)),
            Self::Relu => splat(0.0).max(x),
            Self::Softplus => lane_by_lane(x, softplus),
        }
    }

    /// The slope at `x`.
    #[inline(always)]
    fn slope<S: Simd>(self, x: Lanes<S>) -> Lanes<S> {
        let splat = |value| Lanes::splat(x.simd, value);
        match self {
            Self::Sigmoid => {
                let open = sigmoid(x);
                open * (splat(1.0) - open)
            }
            Self::Silu => {
                let open = sigmoid(x);
                open * x.fma(splat(1.0) - open, splat(1.0))
            }
            Self::GeluTanh => {
                let open = sigmoid(gelu_inner(x));
                let inner = (x * x).fma(splat(3.0 * GELU_SLOPE * GELU_CUBE), splat(GELU_SLOPE));
                open * (x * inner).fma(splat(1.0) - open, splat(1.0))
            }
            Self::Relu => splat(0.0).select_less(x, splat(1.0), splat(0.0)),
            Self::Softplus => sigmoid(x),
        }
    }

    /// The value at `x` by the definition, in f64.
    pub fn reference(self, x: f64) -> f64 {
        let logistic = |x: f64| 1.0 / (1.0 + (-x).exp());
        match self {
            Self::Sigmoid => logistic(x),
            Self::Silu => x * logistic(x),
            Self::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                x / 2.0 * (1.0 + inner.tanh())
            }
            Self::Relu => x.max(0.0),
            Self::Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
        }
    }
}

#[inline(always)]
fn gelu_inner<S: Simd>(x: Lanes<S>) -> Lanes<S> {
    let cube = (x * x) * Lanes::splat(x.simd, GELU_SLOPE * GELU_CUBE);
    x * (cube + Lanes::splat(x.simd, GELU_SLOPE))
}

fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[inline(always)]
fn lane_by_lane<S: Simd>(x: Lanes<S>, f: impl Fn(f32) -> f32) -> Lanes<S> {
    let mut lanes = [0.0; LANES];
    x.store(&mut lanes);
    Lanes::load(x.simd, &lanes.map(f))
}

/// `y = f(x)`.
///
/// # Shapes
/// Both of one length.
pub fn apply(function: Function, x: &[f32], y: &mut [f32]) {
    apply_on(Isa::current(), function, x, y);
}

fn apply_on(isa: Isa, function: Function, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    let y = DisjointMut::new(y);
    for_each_block(x.len(), CYCLES, |part| {
        // SAFETY: blocks are disjoint.
        dispatch(isa, Apply { function, x: &x[part.clone()], y: unsafe { y.range(part) } });
    });
}

struct Apply<'a> {
    function: Function,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (x, y) in self.x.chunks(LANES).zip(self.y.chunks_mut(LANES)) {
            self.function.of(Lanes::load_any(simd, x, 0.0)).store_any(y);
        }
    }
}

/// `d = d f'(x)`: turns the gradient of the value into that of `x`, in place.
///
/// # Shapes
/// Both of one length.
pub fn apply_backward(function: Function, x: &[f32], d: &mut [f32]) {
    apply_backward_on(Isa::current(), function, x, d);
}

fn apply_backward_on(isa: Isa, function: Function, x: &[f32], d: &mut [f32]) {
    assert_eq!(x.len(), d.len());
    let d = DisjointMut::new(d);
    for_each_block(x.len(), CYCLES, |part| {
        // SAFETY: blocks are disjoint.
        dispatch(isa, Slope { function, x: &x[part.clone()], d: unsafe { d.range(part) } });
    });
}

struct Slope<'a> {
    function: Function,
    x: &'a [f32],
    d: &'a mut [f32],
}

impl Kernel for Slope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (x, d) in self.x.chunks(LANES).zip(self.d.chunks_mut(LANES)) {
            (Lanes::load_any(simd, d, 0.0) * self.function.slope(Lanes::load_any(simd, x, 0.0))).store_any(d);
        }
    }
}

/// `out = a b`, number by number.
///
/// # Shapes
/// All of one length.
pub fn multiply(a: &[f32], b: &[f32], out: &mut [f32]) {
    assert!(a.len() == b.len() && b.len() == out.len());
    let out = DisjointMut::new(out);
    for_each_block(a.len(), 1, |part| {
        // SAFETY: blocks are disjoint.
        let out = unsafe { out.range(part.clone()) };
        out.iter_mut().zip(&a[part.clone()]).zip(&b[part]).for_each(|((out, a), b)| *out = a * b);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, numbers};

    const ALL: [Function; 5] =
        [Function::Sigmoid, Function::Silu, Function::GeluTanh, Function::Relu, Function::Softplus];

    #[test]
    fn values_and_slopes_are_the_references() {
        for function in ALL {
            for len in [0, 1, 16, 33, 20_001] {
                let x: Vec<f32> = numbers(1, len).iter().map(|x| 9.0 * x).collect();
                let d = numbers(2, len);
                let values: Vec<f32> = x.iter().map(|&x| function.reference(f64::from(x)) as f32).collect();
                let step = 1e-5;
                let slope = |x: f64| (function.reference(x + step) - function.reference(x - step)) / (2.0 * step);
                let slopes: Vec<f32> = x.iter().zip(&d).map(|(&x, &d)| d * slope(f64::from(x)) as f32).collect();
                check(&[values, slopes], 2e-6, |isa| {
                    let (mut y, mut d) = (vec![f32::NAN; len], d.clone());
                    apply_on(isa, function, &x, &mut y);
                    apply_backward_on(isa, function, &x, &mut d);
                    vec![y, d]
                });
            }
        }
    }

    #[test]
    fn far_out_nothing_overflows() {
        let x = [-200.0, 200.0, 0.0];
        for (function, wanted) in ALL.into_iter().zip([
            [0.0, 1.0, 0.5],
            [0.0, 200.0, 0.0],
            [0.0, 200.0, 0.0],
            [0.0, 200.0, 0.0],
            [0.0, 200.0, std::f32::consts::LN_2],
        ]) {
            let mut y = [0.0; 3];
            apply(function, &x, &mut y);
            assert_eq!(y.map(f32::abs), wanted, "{function:?}");
        }
    }
}
