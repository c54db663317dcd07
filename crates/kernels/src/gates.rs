//! Gated non-linearities of feed-forward parts: `act(gate) * up` in the forms of published models.
//!
//! Legend: `rows` tokens or assignments, `f` the width of the feed-forward layer.

use crate::isa::Isa;
use crate::narrow::{DisjointNumbers, Numbers, NumbersMut};
use crate::parallel::DisjointMut;
use crate::simd::math::{sigmoid, tanh};
use crate::simd::{Kernel, LANES, Lanes, Number, Simd, dispatch, prefetch};
use crate::tasks::for_each_block;
use std::ops::Range;

/// What becomes of a gate and an up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Gate {
    /// `gate * sigmoid(gate) * up` (Shazeer 2020, SwiGLU).
    #[default]
    Silu,
    /// `gelu(gate) * up`, gelu by its tanh form (Hendrycks and Gimpel 2016).
    GeluTanh,
    /// gpt-oss: `g = min(gate, limit)`, `u = clamp(up, ±limit)`, `(u + 1) * g * sigmoid(alpha * g)`.
    Clamped {
        /// Steepness of the logistic function.
        alpha: f32,
        /// Where gate and up are cut.
        limit: f32,
    },
}

/// `out = act(gate, up)`, where a row of `gate_up` holds the `f` gates, then the `f` ups.
///
/// # Shapes
/// `gate_up` `[rows, 2 f]`, `out` `[rows, f]`.
pub fn gated(gate: Gate, gate_up: &[f32], f: usize, out: &mut [f32]) {
    gated_keeping(gate, gate_up, f, None, NumbersMut::F32(out), None);
}

/// As [`gated`], times `dropout` if there is one, with the answers as wanted; keeps gates and ups, rounded to bf16, for
/// a backward if there is room.
///
/// # Shapes
/// `gate_up`, `kept` `[rows, 2 f]`, `dropout`, `out` `[rows, f]`.
pub fn gated_keeping(
    gate: Gate,
    gate_up: &[f32],
    f: usize,
    dropout: Option<&[f32]>,
    out: NumbersMut<'_>,
    kept: Option<&mut [u16]>,
) {
    gated_on(Isa::current(), gate, (gate_up, f), dropout, out, kept);
}

fn gated_on(
    isa: Isa,
    gate: Gate,
    (gate_up, f): (&[f32], usize),
    dropout: Option<&[f32]>,
    out: NumbersMut<'_>,
    kept: Option<&mut [u16]>,
) {
    assert_eq!(gate_up.len(), 2 * out.len());
    let rows = out.len() / f.max(1);
    assert_eq!(out.len(), rows * f);
    assert!(dropout.is_none_or(|dropout| dropout.len() == out.len()), "dropout of every number");
    assert!(kept.as_ref().is_none_or(|kept| kept.len() == gate_up.len()), "room for every gate and up");
    let (out, kept) = (DisjointNumbers::new(out), kept.map(DisjointMut::new));
    for_each_block(rows, 2 * f, |rows| {
        let (inside, twice) = (rows.start * f..rows.end * f, rows.start * 2 * f..rows.end * 2 * f);
        let (gate_up, dropout) = (&gate_up[twice.clone()], dropout.map(|dropout| &dropout[inside.clone()]));
        // SAFETY: blocks of rows are disjoint.
        let (out, kept) = unsafe { (out.range(inside), kept.as_ref().map(|kept| kept.range(twice))) };
        match gate {
            Gate::Silu => dispatch(isa, Forward { form: Silu, gate_up, f, dropout, out, kept }),
            Gate::GeluTanh => dispatch(isa, Forward { form: GeluTanh, gate_up, f, dropout, out, kept }),
            Gate::Clamped { alpha, limit } => {
                dispatch(isa, Forward { form: Clamped { alpha, limit }, gate_up, f, dropout, out, kept });
            }
        }
    });
}

/// What the backward of `factor * dropout * act(gate, up)` reads.
#[derive(Clone, Copy)]
pub struct GatedSaved<'a> {
    /// What the forward did.
    pub gate: Gate,
    /// The width.
    pub f: usize,
    /// The forward's `[rows, 2 f]`.
    pub gate_up: Numbers<'a>,
    /// What each row was multiplied with, `[rows]`; nothing is one.
    pub factors: Option<&'a [f32]>,
    /// What each number was multiplied with, `[rows, f]`; nothing is one.
    pub dropout: Option<&'a [f32]>,
}

/// Where the backward's results go; all are overwritten.
pub struct GatedGradients<'a> {
    /// `[rows, 2 f]`.
    pub dgate_up: NumbersMut<'a>,
    /// What the forward answered, again, `[rows, f]`, if wanted.
    pub out: Option<NumbersMut<'a>>,
    /// The gradients of the factors, `[rows]`, if wanted.
    pub dfactors: Option<&'a mut [f32]>,
}

/// The gradient of `out = factor * dropout * act(gate, up)`, and `out` again: one pass over what is there.
///
/// # Shapes
/// `dout` `[rows, f]`.
pub fn gated_backward(saved: &GatedSaved<'_>, dout: &[f32], gradients: GatedGradients<'_>) {
    gated_backward_on(Isa::current(), saved, dout, gradients);
}

fn gated_backward_on(isa: Isa, saved: &GatedSaved<'_>, dout: &[f32], gradients: GatedGradients<'_>) {
    let f = saved.f;
    let rows = dout.len() / f.max(1);
    let GatedGradients { dgate_up, out, dfactors } = gradients;
    assert_eq!(dout.len(), rows * f, "slopes of whole rows");
    assert_eq!([saved.gate_up.len(), dgate_up.len()], [2 * rows * f; 2], "gates and ups, and their gradients");
    assert!(saved.factors.is_none_or(|factors| factors.len() == rows), "a factor a row");
    assert!(dfactors.as_ref().is_none_or(|dfactors| dfactors.len() == rows), "the gradient of a factor a row");
    assert!(saved.dropout.is_none_or(|dropout| dropout.len() == rows * f), "dropout of every number");
    assert!(out.as_ref().is_none_or(|out| out.len() == rows * f), "the answers of all rows");
    let (dgate_up, out) = (DisjointNumbers::new(dgate_up), out.map(DisjointNumbers::new));
    let dfactors = dfactors.map(DisjointMut::new);
    for_each_block(rows, 4 * f, |rows| {
        let (inside, twice) = (rows.start * f..rows.end * f, rows.start * 2 * f..rows.end * 2 * f);
        let saved = GatedSaved {
            gate_up: saved.gate_up.part(twice.clone()),
            factors: saved.factors.map(|factors| &factors[rows.clone()]),
            dropout: saved.dropout.map(|dropout| &dropout[inside.clone()]),
            ..*saved
        };
        // SAFETY: blocks of rows are disjoint.
        let gradients = unsafe {
            GatedGradients {
                dgate_up: dgate_up.range(twice),
                out: out.as_ref().map(|out| out.range(inside.clone())),
                dfactors: dfactors.as_ref().map(|dfactors| dfactors.range(rows)),
            }
        };
        let dout = &dout[inside];
        match saved.gate {
            Gate::Silu => dispatch(isa, Backward { form: Silu, saved, dout, gradients }),
            Gate::GeluTanh => dispatch(isa, Backward { form: GeluTanh, saved, dout, gradients }),
            Gate::Clamped { alpha, limit } => {
                dispatch(isa, Backward { form: Clamped { alpha, limit }, saved, dout, gradients });
            }
        }
    });
}

/// A gate's formula.
trait Form: Copy {
    fn value<S: Simd>(self, gate: Lanes<S>, up: Lanes<S>) -> Lanes<S>;
    /// The value, and its slopes by gate and by up.
    fn slopes<S: Simd>(self, gate: Lanes<S>, up: Lanes<S>) -> [Lanes<S>; 3];
}

#[derive(Clone, Copy)]
struct Silu;

impl Form for Silu {
    #[inline(always)]
    fn value<S: Simd>(self, gate: Lanes<S>, up: Lanes<S>) -> Lanes<S> {
        gate * sigmoid(gate) * up
    }

    #[inline(always)]
    fn slopes<S: Simd>(self, gate: Lanes<S>, up: Lanes<S>) -> [Lanes<S>; 3] {
        let one = Lanes::splat(gate.simd, 1.0);
        let open = sigmoid(gate);
        let silu = gate * open;
        [silu * up, open * up * gate.fma(one - open, one), silu]
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;

impl Form for GeluTanh {
    #[inline(always)]
    fn value<S: Simd>(self, gate: Lanes<S>, up: Lanes<S>) -> Lanes<S> {
        let [gelu, _] = gelu(gate);
        gelu * up
    }

    #[inline(always)]
    fn slopes<S: Simd>(self, gate: Lanes<S>, up: Lanes<S>) -> [Lanes<S>; 3] {
        let [gelu, slope] = gelu(gate);
        [gelu * up, slope * up, gelu]
    }
}

#[derive(Clone, Copy)]
struct Clamped {
    alpha: f32,
    limit: f32,
}

impl Clamped {
    /// Gate and up, cut, and how far the gate is open.
    #[inline(always)]
    fn parts<S: Simd>(self, gate: Lanes<S>, up: Lanes<S>) -> [Lanes<S>; 3] {
        let splat = |x| Lanes::splat(gate.simd, x);
        let gate = gate.min(splat(self.limit));
        [gate, up.min(splat(self.limit)).max(splat(-self.limit)), sigmoid(splat(self.alpha) * gate)]
    }
}

impl Form for Clamped {
    #[inline(always)]
    fn value<S: Simd>(self, gate: Lanes<S>, up: Lanes<S>) -> Lanes<S> {
        let [gate, up, open] = self.parts(gate, up);
        (up + Lanes::splat(gate.simd, 1.0)) * gate * open
    }

    #[inline(always)]
    fn slopes<S: Simd>(self, gate: Lanes<S>, up: Lanes<S>) -> [Lanes<S>; 3] {
        let splat = |x| Lanes::splat(gate.simd, x);
        let (zero, one, limit, alpha) = (splat(0.0), splat(1.0), splat(self.limit), splat(self.alpha));
        let [g, u, open] = self.parts(gate, up);
        let raised = u + one;
        let dgate = raised * open * (alpha * g).fma(one - open, one);
        // Where something is cut, its slope is zero; at the border itself it passes, as in torch.
        let dgate = limit.select_less(gate, zero, dgate);
        let dup = limit.select_less(up.abs(), zero, g * open);
        [raised * g * open, dgate, dup]
    }
}

/// gelu by its tanh form, and its slope.
#[inline(always)]
fn gelu<S: Simd>(x: Lanes<S>) -> [Lanes<S>; 2] {
    const ROOT: f32 = 0.797_884_6;
    const CUBIC: f32 = 0.044_715;
    let splat = |value| Lanes::splat(x.simd, value);
    let (one, half) = (splat(1.0), splat(0.5));
    let square = x * x;
    let tanh = tanh(splat(ROOT) * x * square.fma(splat(CUBIC), one));
    let opened = half * (tanh + one);
    let steepness = splat(ROOT) * square.fma(splat(3.0 * CUBIC), one);
    [x * opened, (half * x * (one - tanh * tanh)).fma(steepness, opened)]
}

/// The places of up to sixteen numbers of a row, from number `first` on: in rows of `f`, and their gates and ups in rows
/// of `2 f`.
struct Places {
    inside: Range<usize>,
    gates: Range<usize>,
    ups: Range<usize>,
}

impl Places {
    #[inline(always)]
    fn new(row: usize, first: usize, f: usize) -> Self {
        let last = f.min(first + LANES);
        let at = |start: usize| start + first..start + last;
        Self { inside: at(row * f), gates: at(row * 2 * f), ups: at((row * 2 + 1) * f) }
    }
}

struct Forward<'a, F> {
    form: F,
    gate_up: &'a [f32],
    f: usize,
    dropout: Option<&'a [f32]>,
    out: NumbersMut<'a>,
    kept: Option<&'a mut [u16]>,
}

impl<F: Form> Kernel for Forward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.out {
            NumbersMut::F32(out) => forward(simd, self.form, (self.gate_up, self.f), self.dropout, out),
            NumbersMut::Bf16(out) => forward(simd, self.form, (self.gate_up, self.f), self.dropout, out),
        }
        // These blocks are small: what was read above is still in the cache.
        if let Some(kept) = self.kept {
            for (from, to) in self.gate_up.chunks(LANES).zip(kept.chunks_mut(LANES)) {
                u16::store_any(Lanes::load_any(simd, from, 0.0), to);
            }
        }
    }
}

#[inline(always)]
fn forward<S: Simd, F: Form, N: Number>(
    simd: S,
    form: F,
    (gate_up, f): (&[f32], usize),
    dropout: Option<&[f32]>,
    out: &mut [N],
) {
    for (row, (gate_up, out)) in gate_up.chunks_exact(2 * f).zip(out.chunks_exact_mut(f)).enumerate() {
        let (gate, up) = gate_up.split_at(f);
        let dropout = dropout.map(|dropout| &dropout[row * f..(row + 1) * f]);
        let numbers = gate.chunks(LANES).zip(up.chunks(LANES)).zip(out.chunks_mut(LANES));
        match dropout {
            // No closure: it would be compiled without the instruction set.
            None => {
                for ((gate, up), out) in numbers {
                    // Two halves of each row are read side by side: no processor foresees where they go on.
                    prefetch::<false, _>(gate.as_ptr().wrapping_add(2 * f), LANES);
                    prefetch::<false, _>(up.as_ptr().wrapping_add(2 * f), LANES);
                    N::store_any(value(simd, form, gate, up), out);
                }
            }
            Some(dropout) => {
                for (((gate, up), out), kept) in numbers.zip(dropout.chunks(LANES)) {
                    N::store_any(value(simd, form, gate, up) * Lanes::load_any(simd, kept, 0.0), out);
                }
            }
        }
    }
}

#[inline(always)]
fn value<S: Simd, F: Form>(simd: S, form: F, gate: &[f32], up: &[f32]) -> Lanes<S> {
    form.value(Lanes::load_any(simd, gate, 0.0), Lanes::load_any(simd, up, 0.0))
}

struct Backward<'a, F> {
    form: F,
    saved: GatedSaved<'a>,
    dout: &'a [f32],
    gradients: GatedGradients<'a>,
}

impl<F: Form> Kernel for Backward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { form, saved: GatedSaved { f, gate_up, factors, dropout, .. }, dout, mut gradients } = self;
        for row in 0..dout.len() / f.max(1) {
            let factor = Lanes::splat(simd, factors.map_or(1.0, |factors| factors[row]));
            let mut dfactor = Lanes::splat(simd, 0.0);
            for first in (0..f).step_by(LANES) {
                let Places { inside, gates, ups } = Places::new(row, first, f);
                gate_up.prefetch(gates.start + 2 * f, LANES);
                gate_up.prefetch(ups.start + 2 * f, LANES);
                let [mut value, dgate, dup] =
                    form.slopes(gate_up.lanes(simd, gates.clone()), gate_up.lanes(simd, ups.clone()));
                let slope = Lanes::load_any(simd, &dout[inside.clone()], 0.0);
                let mut share = factor;
                if let Some(dropout) = dropout {
                    let kept = Lanes::load_any(simd, &dropout[inside.clone()], 0.0);
                    (value, share) = (value * kept, share * kept);
                }
                dfactor = value.fma(slope, dfactor);
                if let Some(out) = &mut gradients.out {
                    out.set_lanes(inside, value * factor);
                }
                let slope = slope * share;
                gradients.dgate_up.set_lanes(gates, slope * dgate);
                gradients.dgate_up.set_lanes(ups, slope * dup);
            }
            if let Some(dfactors) = &mut gradients.dfactors {
                dfactors[row] = dfactor.sum();
            }
        }
    }
}

/// The plain loops that [`gated`] and [`gated_backward`] are compared with: `[rows, f]` and `[rows, 2 f]`.
pub fn gated_reference(gate: Gate, gate_up: &[f32], f: usize, dout: &[f32]) -> [Vec<f32>; 2] {
    let (mut out, mut dgate_up) = (Vec::new(), Vec::new());
    for (gate_up, dout) in gate_up.chunks_exact(2 * f).zip(dout.chunks_exact(f)) {
        let values = (0..f).map(|i| gate.value_and_slopes(gate_up[i].into(), gate_up[f + i].into()));
        let values: Vec<[f64; 3]> = values.collect();
        out.extend(values.iter().map(|v| v[0] as f32));
        for slope in [1, 2] {
            dgate_up.extend(values.iter().zip(dout).map(|(v, &d)| (v[slope] * f64::from(d)) as f32));
        }
    }
    [out, dgate_up]
}

impl Gate {
    /// The definition.
    fn value_and_slopes(self, gate: f64, up: f64) -> [f64; 3] {
        let logistic = |x: f64| 1.0 / (1.0 + (-x).exp());
        match self {
            Self::Silu => {
                let open = logistic(gate);
                [gate * open * up, up * open * (1.0 + gate * (1.0 - open)), gate * open]
            }
            Self::GeluTanh => {
                let (root, cubic) = ((2.0 / std::f64::consts::PI).sqrt(), 0.044_715);
                let tanh = (root * (gate + cubic * gate.powi(3))).tanh();
                let opened = 0.5 * (1.0 + tanh);
                let slope = opened + 0.5 * gate * (1.0 - tanh * tanh) * root * (1.0 + 3.0 * cubic * gate * gate);
                [gate * opened * up, up * slope, gate * opened]
            }
            Self::Clamped { alpha, limit } => {
                let (alpha, limit) = (f64::from(alpha), f64::from(limit));
                let (g, u) = (gate.min(limit), up.clamp(-limit, limit));
                let open = logistic(alpha * g);
                let dgate = if gate <= limit { (u + 1.0) * open * (1.0 + alpha * g * (1.0 - open)) } else { 0.0 };
                [(u + 1.0) * g * open, dgate, if up.abs() <= limit { g * open } else { 0.0 }]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::narrow::{narrow, widen};
    use crate::testing::{check, numbers};

    const GATES: [Gate; 3] = [Gate::Silu, Gate::GeluTanh, Gate::Clamped { alpha: 1.702, limit: 2.0 }];

    fn wide(seed: u64, len: usize) -> Vec<f32> {
        numbers(seed, len).iter().map(|x| 4.0 * x).collect()
    }

    #[test]
    fn every_gate_is_its_definition_on_every_instruction_set() {
        for (rows, f) in [(0, 3), (1, 1), (3, 15), (4, 16), (9, 33), (70, 512)] {
            for gate in GATES {
                let (gate_up, dout) = (wide(1, 2 * rows * f), wide(2, rows * f));
                check(&gated_reference(gate, &gate_up, f, &dout), 2e-5, |isa| {
                    let (mut out, mut dgate_up) = (vec![f32::NAN; rows * f], vec![f32::NAN; 2 * rows * f]);
                    gated_on(isa, gate, (&gate_up, f), None, NumbersMut::F32(&mut out), None);
                    let saved = GatedSaved { gate, f, gate_up: Numbers::F32(&gate_up), factors: None, dropout: None };
                    let dgate_up_room = NumbersMut::F32(&mut dgate_up);
                    let gradients = GatedGradients { dgate_up: dgate_up_room, out: None, dfactors: None };
                    gated_backward_on(isa, &saved, &dout, gradients);
                    vec![out, dgate_up]
                });
            }
        }
    }

    #[test]
    fn gelu_on_paper() {
        let mut out = [0.0; 2];
        gated(Gate::GeluTanh, &[1.0, -1.0, 2.0, 3.0], 2, &mut out);
        assert!((out[0] - 2.0 * 0.841_192).abs() < 1e-5 && (out[1] + 3.0 * 0.158_808).abs() < 1e-5, "{out:?}");
    }

    /// With factors and dropout, from f32 and from bf16, into f32 and into bf16.
    #[test]
    fn factors_and_dropout_pass_through() {
        let (rows, f) = (5, 19);
        let (factors, dout) = (numbers(3, rows), wide(2, rows * f));
        let dropout: Vec<f32> = (0..rows * f).map(|i| [0.0, 1.25][usize::from(i % 3 > 0)]).collect();
        let mut rounded = vec![0; 2 * rows * f];
        narrow(&wide(1, 2 * rows * f), &mut rounded);
        let mut gate_up = vec![0.0; 2 * rows * f];
        widen(&rounded, &mut gate_up);
        for gate in GATES {
            let (mut found, mut kept) = (vec![0.0; rows * f], vec![0; 2 * rows * f]);
            gated_keeping(gate, &gate_up, f, Some(&dropout), NumbersMut::F32(&mut found), Some(&mut kept));
            assert_eq!(kept, rounded, "of numbers that are bf16 already");
            let [plain, slopes] = gated_reference(gate, &gate_up, f, &vec![1.0; rows * f]);
            let dropped: Vec<f32> = plain.iter().zip(&dropout).map(|(x, kept)| x * kept).collect();
            crate::testing::assert_close("out", &found, &dropped, 4e-6);
            let out = (0..rows * f).map(|i| dropped[i] * factors[i / f]).collect();
            let dfactors = (0..rows).map(|row| (row * f..(row + 1) * f).map(|i| dout[i] * dropped[i]).sum()).collect();
            let dgate_up = (0..2 * rows * f)
                .map(|i| (i / (2 * f), i / (2 * f) * f + i % f, i))
                .map(|(row, inside, i)| slopes[i] * dout[inside] * factors[row] * dropout[inside])
                .collect();
            let wanted: [Vec<f32>; 3] = [out, dfactors, dgate_up];
            for gate_up in [Numbers::F32(&gate_up), Numbers::Bf16(&rounded)] {
                let saved = GatedSaved { gate, f, gate_up, factors: Some(&factors), dropout: Some(&dropout) };
                check(&wanted, 2e-5, |isa| {
                    let mut found = wanted.clone().map(|of| vec![f32::NAN; of.len()]);
                    let [out, dfactors, dgate_up] = &mut found;
                    let (dgate_up, out) = (NumbersMut::F32(dgate_up), Some(NumbersMut::F32(out)));
                    let gradients = GatedGradients { dgate_up, out, dfactors: Some(dfactors) };
                    gated_backward_on(isa, &saved, &dout, gradients);
                    found.to_vec()
                });
                let [mut out, mut dgate_up] = [vec![0; rows * f], vec![0; 2 * rows * f]];
                let room = (NumbersMut::Bf16(&mut dgate_up), Some(NumbersMut::Bf16(&mut out)));
                gated_backward(&saved, &dout, GatedGradients { dgate_up: room.0, out: room.1, dfactors: None });
                for (found, wanted) in [(out, &wanted[0]), (dgate_up, &wanted[2])] {
                    let mut back = vec![0.0; found.len()];
                    widen(&found, &mut back);
                    let near = |(x, wanted): (&f32, &f32)| (x - wanted).abs() <= wanted.abs() / 200.0 + 2e-5;
                    assert!(back.iter().zip(wanted).all(near));
                }
            }
        }
    }
}
