//! The search for scales: which of many candidates leaves the smallest squared error.
//!
//! Sixteen candidates stand in the lanes of a vector and meet the numbers of a block one by one, so that nothing is
//! summed over lanes and every instruction set gives the same bits. A first look judges a candidate by its codes with
//! the scale that least squares gives for them (as llama.cpp's k-quants do); a second takes scales as they are stored,
//! rounded, and the error that decoding will have. The plain rule's scale (largest number to largest code) is among
//! the candidates of the second look, so that the result is never worse than rounding to it.
//!
//! Every number counts alike. llama.cpp's search weighs large numbers more, which costs squared error.

use super::numbers::{f16_to_f32, nearest_scale, round_to_f16};
use crate::simd::{LANES, Lanes, Simd};

/// One candidate in each lane.
pub(super) type Candidates = [f32; LANES];

/// `1.5 * 2^23`: adding it and taking it away rounds to the nearest whole number.
const SHIFT: f32 = 12_582_912.0;
/// Blocks of smaller numbers are written as zeros: no format with scales in f16 tells them from that.
const NOTHING: f32 = 1e-20;

/// The numbers that codes stand for, before scales.
pub(super) trait CodeSet: Copy {
    /// Where candidates put the number of largest magnitude, the plain rule first.
    const TARGETS: &'static [Candidates];

    /// The number nearest to `y`, ties to either side.
    fn nearest<S: Simd>(self, y: Lanes<S>) -> Lanes<S>;

    /// The code of the number nearest to `y`.
    fn code<S: Simd>(self, y: Lanes<S>) -> Lanes<S>;
}

/// Whole numbers `LOWEST..=HIGHEST`, whose codes begin with 0 for the lowest.
#[derive(Clone, Copy)]
pub(super) struct Whole<const LOWEST: i32, const HIGHEST: i32>;

impl<const LOWEST: i32, const HIGHEST: i32> CodeSet for Whole<LOWEST, HIGHEST> {
    const TARGETS: &'static [Candidates] = &[spread(LOWEST as f32, HIGHEST), spread(HIGHEST as f32, HIGHEST)];

    #[inline(always)]
    fn nearest<S: Simd>(self, y: Lanes<S>) -> Lanes<S> {
        let splat = |value| Lanes::splat(y.simd, value);
        y.max(splat(LOWEST as f32)).min(splat(HIGHEST as f32)) + splat(SHIFT) - splat(SHIFT)
    }

    #[inline(always)]
    fn code<S: Simd>(self, y: Lanes<S>) -> Lanes<S> {
        self.nearest(y) - Lanes::splat(y.simd, LOWEST as f32)
    }
}

/// Candidates around `end`, the plain rule's choice, first: the fewer the codes, the further it pays to go.
const fn spread(end: f32, highest: i32) -> Candidates {
    let (below, above) = match highest {
        ..4 => (0.55, 0.35),
        4..8 => (0.3, 0.16),
        8..16 => (0.2, 0.08),
        16..32 => (0.12, 0.04),
        _ => (0.03, 0.004),
    };
    let mut candidates = [end; LANES];
    let mut i = 1;
    while i < LANES {
        let place = (i - 1) as f32 / (LANES - 2) as f32;
        candidates[i] = end * (1.0 - below + place * (below + above));
        i += 1;
    }
    candidates
}

/// Sixteen numbers in rising order.
#[derive(Clone, Copy)]
pub(super) struct Table(pub(super) &'static [f32; 16]);

impl Table {
    #[inline(always)]
    fn choose<S: Simd>(self, y: Lanes<S>, answers: impl Fn(usize) -> f32) -> Lanes<S> {
        let splat = |value| Lanes::splat(y.simd, value);
        let mut chosen = splat(answers(0));
        for i in 1..self.0.len() {
            let border = splat((self.0[i - 1] + self.0[i]) / 2.0);
            chosen = y.select_less(border, chosen, splat(answers(i)));
        }
        chosen
    }
}

impl CodeSet for Table {
    const TARGETS: &'static [Candidates] = &[spread(-127.0, 6), spread(113.0, 6)];

    #[inline(always)]
    fn nearest<S: Simd>(self, y: Lanes<S>) -> Lanes<S> {
        self.choose(y, |i| self.0[i])
    }

    #[inline(always)]
    fn code<S: Simd>(self, y: Lanes<S>) -> Lanes<S> {
        self.choose(y, |i| i as f32)
    }
}

/// What `scale` is multiplied by instead of dividing by it.
#[inline(always)]
pub(super) fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The number of largest magnitude.
#[inline(always)]
pub(super) fn extreme(x: &[f32]) -> f32 {
    let (mut high, mut low) = (0.0f32, 0.0f32);
    for &x in x {
        high = if x > high { x } else { high };
        low = if x < low { x } else { low };
    }
    if high >= -low { high } else { low }
}

/// The scale, not yet rounded, with which `codes` fit `x` best; 0 for nothing but zeros.
#[inline(always)]
fn fit_scale<S: Simd, C: CodeSet>(simd: S, codes: C, x: &[f32]) -> f32 {
    let extreme = extreme(x);
    if extreme.abs() < NOTHING {
        return 0.0;
    }
    let (mut best_gain, mut best) = (0.0, 0.0);
    for targets in C::TARGETS {
        let inverses = Lanes::load(simd, targets) * Lanes::splat(simd, 1.0 / extreme);
        let (mut xq, mut qq) = (Lanes::splat(simd, 0.0), Lanes::splat(simd, 0.0));
        for &x in x {
            let x = Lanes::splat(simd, x);
            let q = codes.nearest(x * inverses);
            xq = x.fma(q, xq);
            qq = q.fma(q, qq);
        }
        // Least squares: the scale is xq / qq, and takes xq² / qq off the sum of squares.
        let qq = qq.max(Lanes::splat(simd, 1e-10));
        let (mut scales, mut gains) = ([0.0; LANES], [0.0; LANES]);
        let scale = xq / qq;
        scale.store(&mut scales);
        (scale * xq).store(&mut gains);
        for (gain, scale) in gains.into_iter().zip(scales) {
            if gain > best_gain {
                (best_gain, best) = (gain, scale);
            }
        }
    }
    best
}

/// The squared error of `x` written with each of sixteen scales.
#[inline(always)]
pub(super) fn errors<S: Simd, C: CodeSet>(simd: S, codes: C, x: &[f32], scales: &Candidates) -> Candidates {
    let inverses = Lanes::load(simd, &scales.map(inverse));
    let negative = Lanes::load(simd, &scales.map(|scale| -scale));
    let mut sum = Lanes::splat(simd, 0.0);
    for &x in x {
        let x = Lanes::splat(simd, x);
        let rest = codes.nearest(x * inverses).fma(negative, x);
        sum = rest.fma(rest, sum);
    }
    let mut errors = [0.0; LANES];
    sum.store(&mut errors);
    errors
}

/// The first place of the smallest error, and the error.
#[inline(always)]
pub(super) fn least(errors: &Candidates) -> (usize, f32) {
    let mut best = 0;
    for i in 1..LANES {
        if errors[i] < errors[best] {
            best = i;
        }
    }
    (best, errors[best])
}

/// The f16 scale of a block with one scale.
#[inline(always)]
pub(super) fn search_scale<S: Simd, C: CodeSet>(simd: S, codes: C, x: &[f32]) -> u16 {
    let fitted = fit_scale(simd, codes, x);
    let plain = extreme(x) / C::TARGETS[0][0];
    let scales = std::array::from_fn(|i| match i {
        0 => round_to_f16(plain),
        _ => f16_to_f32(nearest_scale(fitted * (1.0 + 0.003 * (i as f32 - 8.0)))),
    });
    let (best, _) = least(&errors(simd, codes, x, &scales));
    nearest_scale(scales[best])
}

/// The codes of `x` under a scale.
#[inline(always)]
pub(super) fn write_codes<S: Simd, C: CodeSet>(simd: S, codes: C, x: &[f32], scale: f32, out: &mut [u8]) {
    let inverse = Lanes::splat(simd, inverse(scale));
    for (x, out) in x.chunks_exact(LANES).zip(out.chunks_exact_mut(LANES)) {
        let mut found = [0.0; LANES];
        codes.code(Lanes::load(simd, x.try_into().expect("16 numbers")) * inverse).store(&mut found);
        // No number is beyond 255 or below 0, which `as` would have to look at.
        out.iter_mut().zip(found).for_each(|(out, code)| *out = code as i32 as u8);
    }
}

/// A block of `N` parts, each with a signed scale of few bits times the block's own.
pub(super) struct ScaledBlock<const N: usize> {
    /// The block's scale as f16.
    pub(super) d: u16,
    /// The parts' scales.
    pub(super) scales: [i8; N],
}

/// How often the block's own scale is fitted again to what was chosen under the last one.
const ROUNDS: usize = 3;

/// Chooses the scales of a block of `N` parts; those of parts lie in `lowest..=-lowest - 1`.
#[inline(always)]
pub(super) fn search_scaled<const N: usize, S: Simd, C: CodeSet>(
    simd: S,
    codes: C,
    x: &[f32],
    lowest: f32,
) -> ScaledBlock<N> {
    let len = x.len() / N;
    let mut fitted = [0.0; N];
    for (fitted, x) in fitted.iter_mut().zip(x.chunks_exact(len)) {
        *fitted = fit_scale(simd, codes, x);
    }
    let mut d = nearest_scale(extreme(&fitted) / lowest);
    let (mut best_error, mut best) = (f32::INFINITY, ScaledBlock { d: 0, scales: [0; N] });
    for _ in 0..ROUNDS {
        let scale = f16_to_f32(d);
        let (mut error, mut chosen, mut sums) = (0.0, ScaledBlock { d, scales: [0; N] }, (0.0, 0.0));
        for ((x, fitted), factor) in x.chunks_exact(len).zip(fitted).zip(&mut chosen.scales) {
            let middle = (fitted * inverse(scale)).clamp(lowest, -lowest - 1.0).round_ties_even();
            let factors: Candidates = std::array::from_fn(|i| (middle + i as f32 - 8.0).clamp(lowest, -lowest - 1.0));
            let (place, its_error) = least(&errors(simd, codes, x, &factors.map(|factor| scale * factor)));
            error += its_error;
            *factor = factors[place] as i8;
            let (xq, qq) = products(simd, codes, x, scale * factors[place]);
            sums = (sums.0 + factors[place] * xq, sums.1 + factors[place] * factors[place] * qq);
        }
        if error < best_error {
            (best_error, best) = (error, chosen);
        }
        if sums.1 <= 0.0 || nearest_scale(sums.0 / sums.1) == d {
            break;
        }
        d = nearest_scale(sums.0 / sums.1);
    }
    best
}

/// The sums of `x * q` and of `q * q`, q what the codes of `x` stand for under a scale.
#[inline(always)]
fn products<S: Simd, C: CodeSet>(simd: S, codes: C, x: &[f32], scale: f32) -> (f32, f32) {
    let inverse = Lanes::splat(simd, inverse(scale));
    let (mut xq, mut qq) = (Lanes::splat(simd, 0.0), Lanes::splat(simd, 0.0));
    for x in x.chunks_exact(LANES) {
        let x = Lanes::load(simd, x.try_into().expect("16 numbers"));
        let q = codes.nearest(x * inverse);
        xq = x.fma(q, xq);
        qq = q.fma(q, qq);
    }
    (xq.sum(), qq.sum())
}
