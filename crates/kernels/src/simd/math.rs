//! Functions of sixteen lanes: exponential and logarithm, the logistic, the hyperbolic tangent.

use super::{LANES, Lanes, Simd};

/// `1.5 * 2^23`: adding it leaves a number rounded to whole in the low bits.
const SHIFT: f32 = 12_582_912.0;
const LN_2_HIGH: f32 = std::f32::consts::LN_2;
/// `ln 2 - LN_2_HIGH`.
const LN_2_LOW: f32 = -1.904_654_3e-9;
/// `(exp(r) - 1 - r) / r²` on `|r| <= ln 2 / 2`, interpolated in Chebyshev's points; the error in exp is below 1e-8.
const EXP: [f32; 5] = [0.5, 0.166_665_78, 0.041_666_556, 0.008_363_174, 0.001_392_617_7];
/// The least number whose exponential is a normal f32: `-126 ln 2`.
const LEAST: f32 = -87.336_54;

/// The parts of `exp(x) = 2^n * p`: `n` shifted by [`SHIFT`], and `p` in `[0.7, 1.42]`.
#[inline(always)]
fn exp_parts<S: Simd>(x: Lanes<S>) -> (Lanes<S>, Lanes<S>) {
    let splat = |value| Lanes::splat(x.simd, value);
    let shifted = x.fma(splat(std::f32::consts::LOG2_E), splat(SHIFT));
    let n = shifted - splat(SHIFT);
    let r = n.fma(splat(-LN_2_LOW), n.fma(splat(-LN_2_HIGH), x));
    let mut p = splat(EXP[4]);
    for coefficient in [EXP[3], EXP[2], EXP[1], EXP[0], 1.0, 1.0] {
        p = p.fma(r, splat(coefficient));
    }
    (shifted, p)
}

/// `exp(x)` for `x <= 0` (right up to 88): relative error at most 1.2e-7 (two units in the last place of the result's
/// lower binade); exactly 1 at 0, exactly 0 below -87.3365 (where the result would be subnormal); NaN stays NaN.
#[inline(always)]
pub(crate) fn exp_nonpositive<S: Simd>(x: Lanes<S>) -> Lanes<S> {
    let splat = |value| Lanes::splat(x.simd, value);
    // The operands' order lets NaN through.
    let (shifted, p) = exp_parts(splat(LEAST).max(x));
    let scale = Lanes { simd: x.simd, value: x.simd.power_of_two(shifted.value) };
    x.select_less(splat(LEAST), splat(0.0), p * scale)
}

/// `exp(x)` for every `x`: as [`exp_nonpositive`], with subnormal results and infinity above 88.73.
#[inline(always)]
pub(crate) fn exp<S: Simd>(x: Lanes<S>) -> Lanes<S> {
    let splat = |value| Lanes::splat(x.simd, value);
    let (shifted, p) = exp_parts(splat(89.0).min(splat(-104.0).max(x)));
    // The power of two in two factors, for neither 2^128 nor 2^-150 is a normal number. The first half is rounded
    // to whole by the same shift.
    let half = (shifted - splat(SHIFT)).fma(splat(0.5), splat(SHIFT));
    let rest = (shifted - half) + splat(SHIFT);
    let power = |n: Lanes<S>| Lanes { simd: x.simd, value: x.simd.power_of_two(n.value) };
    (p * power(half)) * power(rest)
}

/// `1 / (1 + exp(-x))`, without overflow: relative error below 3e-7 where the result is normal, 0 where it is not.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(x: Lanes<S>) -> Lanes<S> {
    let splat = |value| Lanes::splat(x.simd, value);
    let zero = splat(0.0);
    let decay = exp_nonpositive(zero - x.abs());
    let numerator = x.select_less(zero, decay, splat(1.0));
    numerator / (decay + splat(1.0))
}

/// `ln(x)` for normal `x > 0`: absolute error below 3e-7 for results under 1, else relative.
#[inline(always)]
pub(crate) fn ln<S: Simd>(x: Lanes<S>) -> Lanes<S> {
    // An f32's bits are its logarithm, piece by piece linear: at most 0.06 off.
    let mut guess = [0.0; LANES];
    x.store(&mut guess);
    let of_bits = std::f32::consts::LN_2 / (1 << 23) as f32;
    guess = guess.map(|x| (x.to_bits() as i32 - (127 << 23)) as f32 * of_bits);
    let mut y = Lanes::load(x.simd, &guess);
    // Halley's step for exp(y) = x, which leaves a twelfth of the error's cube.
    for _ in 0..2 {
        let e = exp(y);
        let change = (x - e) / (x + e);
        y = y + (change + change);
    }
    y
}

/// `tanh(x)`: absolute error below 3e-7.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(x: Lanes<S>) -> Lanes<S> {
    let one = Lanes::splat(x.simd, 1.0);
    one - (one + one) / (exp(x + x) + one)
}

/// `Σ a b`: four sums of sixteen lanes each, in an order that depends on the length alone.
#[inline(always)]
pub(crate) fn sum_of_products<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut sums = [Lanes::splat(simd, 0.0); 4];
    for (a, b) in a.chunks(4 * LANES).zip(b.chunks(4 * LANES)) {
        for ((a, b), sum) in a.chunks(LANES).zip(b.chunks(LANES)).zip(&mut sums) {
            *sum = Lanes::load_any(simd, a, 0.0).fma(Lanes::load_any(simd, b, 0.0), *sum);
        }
    }
    ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum()
}

/// The largest number; `-inf` of none, any answer when a NaN is there.
#[inline(always)]
pub(crate) fn largest<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let mut tops = [Lanes::splat(simd, f32::NEG_INFINITY); 4];
    for x in x.chunks(4 * LANES) {
        for (x, top) in x.chunks(LANES).zip(&mut tops) {
            *top = top.max(Lanes::load_any(simd, x, f32::NEG_INFINITY));
        }
    }
    tops[0].max(tops[1]).max(tops[2].max(tops[3])).largest()
}

/// `Σ exp(x - shift)` for `x <= shift`.
#[inline(always)]
pub(crate) fn sum_of_exponentials<S: Simd>(simd: S, x: &[f32], shift: f32) -> f32 {
    let shift = Lanes::splat(simd, shift);
    let mut sums = [Lanes::splat(simd, 0.0); 4];
    for x in x.chunks(4 * LANES) {
        for (x, sum) in x.chunks(LANES).zip(&mut sums) {
            *sum = *sum + exp_nonpositive(Lanes::load_any(simd, x, f32::NEG_INFINITY) - shift);
        }
    }
    ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::simd::{Kernel, LANES, dispatch};

    #[derive(Clone, Copy)]
    enum Function {
        ExpNonpositive,
        Exp,
        Sigmoid,
        Tanh,
        Ln,
    }

    struct Apply<'a>(Function, &'a [f32; LANES]);
    impl Kernel for Apply<'_> {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let x = Lanes::load(simd, self.1);
            let mut out = [0.0; LANES];
            match self.0 {
                Function::ExpNonpositive => exp_nonpositive(x),
                Function::Exp => exp(x),
                Function::Sigmoid => sigmoid(x),
                Function::Tanh => tanh(x),
                Function::Ln => ln(x),
            }
            .store(&mut out);
            out
        }
    }

    /// Numbers all over the range, with steps that hit no pattern.
    fn numbers(low: f32, high: f32) -> impl Iterator<Item = [f32; LANES]> {
        let count = 20_000;
        (0..count).map(move |i| {
            std::array::from_fn(|lane| {
                low + (high - low) * ((i * LANES + lane) as f32 / (count * LANES) as f32).powf(1.3)
            })
        })
    }

    fn worst(function: Function, low: f32, high: f32, exact: impl Fn(f64) -> f64) -> f64 {
        worst_by(|found, exact| (found / exact - 1.0).abs(), function, low, high, exact)
    }

    fn worst_by(
        error: fn(f64, f64) -> f64,
        function: Function,
        low: f32,
        high: f32,
        exact: impl Fn(f64) -> f64,
    ) -> f64 {
        let mut worst: f64 = 0.0;
        for x in numbers(low, high) {
            let reference = dispatch(Isa::Portable, Apply(function, &x));
            for isa in Isa::available() {
                let got = dispatch(isa, Apply(function, &x));
                assert_eq!(got.map(f32::to_bits), reference.map(f32::to_bits), "{isa:?}");
            }
            for (x, y) in x.into_iter().zip(reference) {
                worst = worst.max(error(f64::from(y), exact(f64::from(x))));
            }
        }
        worst
    }

    #[test]
    fn errors_are_as_documented() {
        assert!(worst(Function::ExpNonpositive, -87.336, 0.0, f64::exp) < 1.2e-7);
        assert!(worst(Function::Exp, -87.3, 88.72, f64::exp) < 1.2e-7);
        assert!(worst(Function::Sigmoid, -87.0, 87.0, |x| 1.0 / (1.0 + (-x).exp())) < 3e-7);
        let distance = |found: f64, exact: f64| (found - exact).abs();
        assert!(worst_by(distance, Function::Tanh, -20.0, 20.0, f64::tanh) < 3e-7);
        let either = |found: f64, exact: f64| (found - exact).abs() / exact.abs().max(1.0);
        for (low, high) in [(1e-37, 1.0), (0.5, 3.0), (1.0, 1e6), (1e6, 1e37)] {
            let error = worst_by(either, Function::Ln, low, high, f64::ln);
            assert!(error < 3e-7, "{error} between {low} and {high}");
        }
    }

    #[test]
    fn edges_are_exact() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let x = [
            0.0,
            -0.0,
            -inf,
            inf,
            nan,
            -87.4,
            -1e30,
            1e30,
            88.8,
            88.7,
            -103.0,
            -105.0,
            f32::MIN_POSITIVE,
            1.0,
            -1.0,
            2.0,
        ];
        for isa in Isa::available() {
            let y = dispatch(isa, Apply(Function::Exp, &x));
            assert_eq!((y[0], y[1], y[2], y[3]), (1.0, 1.0, 0.0, inf));
            assert!(y[4].is_nan() && y[9].is_finite() && y[8] == inf && y[7] == inf);
            assert!(y[10] > 0.0 && y[10] < f32::MIN_POSITIVE && y[11] == 0.0 && y[6] == 0.0);
            let y = dispatch(isa, Apply(Function::ExpNonpositive, &x));
            assert_eq!((y[0], y[1], y[2], y[5], y[6]), (1.0, 1.0, 0.0, 0.0, 0.0));
            assert!(y[4].is_nan());
            let y = dispatch(isa, Apply(Function::Sigmoid, &x));
            assert_eq!((y[0], y[2], y[3], y[6], y[7]), (0.5, 0.0, 1.0, 0.0, 1.0));
            assert!(y[4].is_nan());
        }
    }
}
