//! The search for a scale and a least number: `x` is written as `scale * code + least`, codes `0..=highest`.

use super::numbers::{f16_to_f32, nearest_f16, nearest_scale, round_to_f16};
use super::search::{Candidates, CodeSet, Whole, inverse, least};
use crate::simd::{LANES, Lanes, Simd};

/// A line through codes.
#[derive(Clone, Copy, Default)]
struct Line {
    scale: f32,
    least: f32,
}

/// How far candidates for the least and for the largest number stand inside of them, in parts of the range: four of
/// each, the fewer the codes the further.
const fn insets(highest: i32) -> [f32; 4] {
    match highest {
        ..4 => [-0.05, 0.08, 0.16, 0.26],
        4..16 => [-0.02, 0.01, 0.04, 0.08],
        _ => [-0.01, 0.005, 0.02, 0.04],
    }
}

/// The least (up to zero, if `from_zero`) and the largest number.
#[inline(always)]
fn ends(x: &[f32], from_zero: bool) -> (f32, f32) {
    let (mut low, mut high) = (if from_zero { 0.0 } else { x[0] }, x[0]);
    for &x in x {
        low = if x < low { x } else { low };
        high = if x > high { x } else { high };
    }
    (low, high)
}

/// The line, not yet rounded, whose codes fit `x` best; its least is at most zero if `from_zero`.
#[inline(always)]
fn fit_line<const HIGHEST: i32, S: Simd>(simd: S, x: &[f32], from_zero: bool) -> Line {
    let splat = |value| Lanes::splat(simd, value);
    let (low, high) = ends(x, from_zero);
    let range = high - low;
    if range < 1e-20 {
        return Line { scale: 0.0, least: low };
    }
    let insets = insets(HIGHEST);
    let lows: Candidates = std::array::from_fn(|i| low + range * insets[i / 4]);
    let inverses: Candidates =
        std::array::from_fn(|i| HIGHEST as f32 / (range * (1.0 - insets[i / 4] - insets[i % 4])));
    let (lows, inverses) = (Lanes::load(simd, &lows), Lanes::load(simd, &inverses));
    let (mut sum_q, mut sum_qq, mut sum_xq, mut sum_x) = (splat(0.0), splat(0.0), splat(0.0), 0.0);
    for &x in x {
        let q = Whole::<0, HIGHEST>.nearest((splat(x) - lows) * inverses);
        sum_q = sum_q + q;
        sum_qq = q.fma(q, sum_qq);
        sum_xq = splat(x).fma(q, sum_xq);
        sum_x += x;
    }
    // Least squares in two unknowns, or in one where the least number would be above zero and may not.
    let (zero, count, sum_x) = (splat(0.0), splat(x.len() as f32), splat(sum_x));
    let determinant = (count * sum_qq - sum_q * sum_q).max(splat(1e-10));
    let scale = (count * sum_xq - sum_x * sum_q) / determinant;
    let offset = (sum_x - scale * sum_q) / count;
    let (scale, offset) = if from_zero {
        let alone = sum_xq / sum_qq.max(splat(1e-10));
        (zero.select_less(offset, alone, scale), offset.min(zero))
    } else {
        (scale, offset)
    };
    let (mut gains, mut scales, mut offsets) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    (scale * sum_xq + offset * sum_x).store(&mut gains);
    scale.store(&mut scales);
    offset.store(&mut offsets);
    let (best, _) = least(&gains.map(|gain| -gain));
    Line { scale: scales[best], least: offsets[best] }
}

/// The squared error of `x` written with each of sixteen lines.
#[inline(always)]
fn line_errors<const HIGHEST: i32, S: Simd>(simd: S, x: &[f32], lines: &[Line; LANES]) -> Candidates {
    let inverses = Lanes::load(simd, &lines.map(|line| inverse(line.scale)));
    let negative = Lanes::load(simd, &lines.map(|line| -line.scale));
    let leasts = Lanes::load(simd, &lines.map(|line| line.least));
    let mut sum = Lanes::splat(simd, 0.0);
    for &x in x {
        let above = Lanes::splat(simd, x) - leasts;
        let rest = Whole::<0, HIGHEST>.nearest(above * inverses).fma(negative, above);
        sum = rest.fma(rest, sum);
    }
    let mut errors = [0.0; LANES];
    sum.store(&mut errors);
    errors
}

/// The codes of `x` on a line.
#[inline(always)]
fn write_line_codes<const HIGHEST: i32, S: Simd>(simd: S, x: &[f32], line: Line, out: &mut [u8]) {
    let (inverse, least) = (Lanes::splat(simd, inverse(line.scale)), Lanes::splat(simd, line.least));
    for (x, out) in x.chunks_exact(LANES).zip(out.chunks_exact_mut(LANES)) {
        let mut found = [0.0; LANES];
        let x = Lanes::load(simd, x.try_into().expect("16 numbers"));
        Whole::<0, HIGHEST>.nearest((x - least) * inverse).store(&mut found);
        out.iter_mut().zip(found).for_each(|(out, code)| *out = code as i32 as u8);
    }
}

/// Chooses scale and least number of a block with one of each, as f16, and writes the codes.
#[inline(always)]
pub(super) fn search_line<const HIGHEST: i32, S: Simd>(simd: S, x: &[f32], codes: &mut [u8]) -> (u16, u16) {
    let (low, high) = ends(x, false);
    // Around the middle, so that the sums of least squares do not cancel.
    let middle = low + (high - low) / 2.0;
    let mut centred = [0.0; 32];
    centred.iter_mut().zip(x).for_each(|(centred, x)| *centred = x - middle);
    let fitted = fit_line::<HIGHEST, S>(simd, &centred, false);
    let lines: [Line; LANES] = std::array::from_fn(|i| {
        let (scale, least) = match i {
            0 => ((high - low) / HIGHEST as f32, low),
            _ => {
                let scale = fitted.scale * (1.0 + 0.012 * ((i / 4) as f32 - 1.5));
                // Turned around the middle of the codes.
                let turn = (fitted.scale - scale) * HIGHEST as f32 / 2.0;
                (scale, fitted.least + middle + turn + fitted.scale * 0.12 * ((i % 4) as f32 - 1.5))
            }
        };
        Line { scale: f16_to_f32(nearest_scale(scale)), least: round_to_f16(least) }
    });
    let (best, _) = least(&line_errors::<HIGHEST, S>(simd, x, &lines));
    write_line_codes::<HIGHEST, S>(simd, x, lines[best], codes);
    (nearest_scale(lines[best].scale), nearest_f16(lines[best].least))
}

/// A block of `N` parts, each with a scale and a least number of few bits: `d * scale * code - d_least * least`.
pub(super) struct AffineBlock<const N: usize> {
    /// The unit of scales as f16.
    pub(super) d: u16,
    /// The unit of least numbers as f16.
    pub(super) d_least: u16,
    /// The parts' scales.
    pub(super) scales: [u8; N],
    /// The parts' least numbers, negated.
    pub(super) leasts: [u8; N],
}

impl<const N: usize> AffineBlock<N> {
    fn line(&self, part: usize) -> Line {
        let (scale, least) = (f32::from(self.scales[part]), f32::from(self.leasts[part]));
        Line { scale: f16_to_f32(self.d) * scale, least: -(f16_to_f32(self.d_least) * least) }
    }
}

/// How often the block's units are fitted again to what was chosen under the last ones.
const ROUNDS: usize = 3;

/// Chooses scales and least numbers, `0..=highest_scale`, of a block of `N` parts, and writes the codes.
#[inline(always)]
pub(super) fn search_lines<const N: usize, const HIGHEST: i32, S: Simd>(
    simd: S,
    x: &[f32],
    highest_scale: f32,
    codes: &mut [u8],
) -> AffineBlock<N> {
    let len = x.len() / N;
    let mut fitted = [Line::default(); N];
    for (fitted, x) in fitted.iter_mut().zip(x.chunks_exact(len)) {
        *fitted = fit_line::<HIGHEST, S>(simd, x, true);
    }
    let largest = |of: fn(&Line) -> f32| fitted.iter().map(of).fold(0.0, f32::max) / highest_scale;
    let mut units = (nearest_scale(largest(|line| line.scale)), nearest_scale(largest(|line| -line.least)));
    let (mut best_error, mut best) = (f32::INFINITY, None);
    for _ in 0..ROUNDS {
        let (chosen, error) = choose_parts::<N, HIGHEST, S>(simd, x, &fitted, units, highest_scale);
        let next = refit::<N, HIGHEST, S>(simd, x, &chosen);
        if error < best_error {
            (best_error, best) = (error, Some(chosen));
        }
        if next == units {
            break;
        }
        units = next;
    }
    let best = best.expect("an error is a number");
    for (part, (x, codes)) in x.chunks_exact(len).zip(codes.chunks_exact_mut(len)).enumerate() {
        write_line_codes::<HIGHEST, S>(simd, x, best.line(part), codes);
    }
    best
}

/// The best scale and least number of each part under the block's units, and the whole error.
#[inline(always)]
fn choose_parts<const N: usize, const HIGHEST: i32, S: Simd>(
    simd: S,
    x: &[f32],
    fitted: &[Line; N],
    (d, d_least): (u16, u16),
    highest_scale: f32,
) -> (AffineBlock<N>, f32) {
    let mut chosen = AffineBlock { d, d_least, scales: [0; N], leasts: [0; N] };
    let (d, d_least, mut error) = (f16_to_f32(d), f16_to_f32(d_least), 0.0);
    for (part, x) in x.chunks_exact(x.len() / N).enumerate() {
        // Four whole numbers around the wanted one.
        let bottom = |wanted: f32| wanted.floor() - 1.0;
        let scale = bottom(fitted[part].scale * inverse(d));
        let below = bottom(-fitted[part].least * inverse(d_least));
        let around = |bottom: f32, i: usize| (bottom + i as f32).clamp(0.0, highest_scale);
        let lines =
            std::array::from_fn(|i| Line { scale: d * around(scale, i % 4), least: -(d_least * around(below, i / 4)) });
        let (best, its_error) = least(&line_errors::<HIGHEST, S>(simd, x, &lines));
        chosen.scales[part] = around(scale, best % 4) as u8;
        chosen.leasts[part] = around(below, best / 4) as u8;
        error += its_error;
    }
    (chosen, error)
}

/// The units that least squares gives for the codes, scales and least numbers of a block.
#[inline(always)]
fn refit<const N: usize, const HIGHEST: i32, S: Simd>(simd: S, x: &[f32], block: &AffineBlock<N>) -> (u16, u16) {
    let len = x.len() / N;
    let (mut aa, mut ab, mut bb, mut xa, mut xb) = (0.0f64, 0.0f64, 0.0f64, 0.0f64, 0.0f64);
    for (part, x) in x.chunks_exact(len).enumerate() {
        let line = block.line(part);
        let (inverse, least) = (Lanes::splat(simd, inverse(line.scale)), Lanes::splat(simd, line.least));
        let zero = Lanes::splat(simd, 0.0);
        let (mut sum_x, mut sum_q, mut sum_qq, mut sum_xq) = (zero, zero, zero, zero);
        for x in x.chunks_exact(LANES) {
            let x = Lanes::load(simd, x.try_into().expect("16 numbers"));
            let q = Whole::<0, HIGHEST>.nearest((x - least) * inverse);
            sum_x = sum_x + x;
            sum_q = sum_q + q;
            sum_qq = q.fma(q, sum_qq);
            sum_xq = x.fma(q, sum_xq);
        }
        let (a, b) = (f64::from(block.scales[part]), -f64::from(block.leasts[part]));
        aa += a * a * f64::from(sum_qq.sum());
        ab += a * b * f64::from(sum_q.sum());
        bb += b * b * len as f64;
        xa += a * f64::from(sum_xq.sum());
        xb += b * f64::from(sum_x.sum());
    }
    let determinant = aa * bb - ab * ab;
    let (d, d_least) = if determinant > 1e-9 * aa * bb {
        ((xa * bb - xb * ab) / determinant, (xb * aa - xa * ab) / determinant)
    } else if aa > 0.0 {
        (xa / aa, f64::from(f16_to_f32(block.d_least)))
    } else {
        return (block.d, block.d_least);
    };
    (nearest_scale(d.max(0.0) as f32), nearest_scale(d_least.max(0.0) as f32))
}
