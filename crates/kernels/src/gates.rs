//! Gated non-linearities of feed-forward parts: `act(gate) * up` in the forms of published models.
//!
//! Legend: `rows` tokens or assignments, `f` the width of the feed-forward layer.

use crate::activation::{swiglu, swiglu_backward};
use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::math::sigmoid;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::{for_each_block, rows as rows_of, rows_mut};

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
    let act: fn(f32, f32) -> f32 = match gate {
        Gate::Silu => return swiglu(gate_up, f, out),
        Gate::Clamped { alpha, limit } => return clamped_on(Isa::current(), [alpha, limit], gate_up, f, out),
        Gate::GeluTanh => |gate, up| gelu(gate).0 * up,
    };
    assert_eq!(gate_up.len(), 2 * out.len());
    let out = DisjointMut::new(out);
    for_each_block(gate_up.len() / (2 * f).max(1), 64 * f, |rows| {
        // SAFETY: blocks of rows are disjoint.
        let out = unsafe { rows_mut(&out, &rows, f) };
        for (gate_up, out) in rows_of(gate_up, &rows, 2 * f).chunks_exact(2 * f).zip(out.chunks_exact_mut(f)) {
            let (gate, up) = gate_up.split_at(f);
            out.iter_mut().zip(gate).zip(up).for_each(|((out, &gate), &up)| *out = act(gate, up));
        }
    });
}

/// The gradient of [`gated`]; overwrites `dgate_up`.
///
/// # Shapes
/// `dout` `[rows, f]`, `gate_up`, `dgate_up` `[rows, 2 f]`.
pub fn gated_backward(gate: Gate, dout: &[f32], gate_up: &[f32], f: usize, dgate_up: &mut [f32]) {
    if gate == Gate::Silu {
        return swiglu_backward(dout, gate_up, f, dgate_up);
    }
    assert_eq!((gate_up.len(), dgate_up.len()), (2 * dout.len(), 2 * dout.len()));
    let dgate_up = DisjointMut::new(dgate_up);
    for_each_block(gate_up.len() / (2 * f).max(1), 64 * f, |rows| {
        // SAFETY: blocks of rows are disjoint.
        let dgate_up = unsafe { rows_mut(&dgate_up, &rows, 2 * f) };
        let inputs = rows_of(dout, &rows, f).chunks_exact(f).zip(rows_of(gate_up, &rows, 2 * f).chunks_exact(2 * f));
        for ((dout, gate_up), d) in inputs.zip(dgate_up.chunks_exact_mut(2 * f)) {
            for i in 0..f {
                let [dgate, dup] = gate.slopes(gate_up[i], gate_up[f + i]);
                (d[i], d[f + i]) = (dout[i] * dgate, dout[i] * dup);
            }
        }
    });
}

impl Gate {
    /// The slopes by gate and by up.
    fn slopes(self, gate: f32, up: f32) -> [f32; 2] {
        let logistic = |x: f32| 1.0 / (1.0 + (-x).exp());
        match self {
            Self::Silu => {
                let open = logistic(gate);
                [up * open * (1.0 + gate * (1.0 - open)), gate * open]
            }
            Self::GeluTanh => {
                let (value, slope) = gelu(gate);
                [up * slope, value]
            }
            Self::Clamped { alpha, limit } => {
                let (g, u) = (gate.min(limit), up.clamp(-limit, limit));
                let open = logistic(alpha * g);
                // Where something is cut, its slope is zero; at the border itself it passes, as in torch.
                let dgate = if gate <= limit { (u + 1.0) * open * (1.0 + alpha * g * (1.0 - open)) } else { 0.0 };
                [dgate, if up.abs() <= limit { g * open } else { 0.0 }]
            }
        }
    }
}

/// gelu by its tanh form, and its slope.
fn gelu(x: f32) -> (f32, f32) {
    const ROOT: f32 = 0.797_884_6;
    const CUBIC: f32 = 0.044_715;
    let tanh = (ROOT * (x + CUBIC * x * x * x)).tanh();
    let slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * ROOT * (1.0 + 3.0 * CUBIC * x * x);
    (0.5 * x * (1.0 + tanh), slope)
}

fn clamped_on(isa: Isa, constants: [f32; 2], gate_up: &[f32], f: usize, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len());
    let out = DisjointMut::new(out);
    for_each_block(gate_up.len() / (2 * f).max(1), 2 * f, |rows| {
        let gate_up = rows_of(gate_up, &rows, 2 * f);
        // SAFETY: blocks of rows are disjoint.
        dispatch(isa, Clamped { constants, gate_up, f, out: unsafe { rows_mut(&out, &rows, f) } });
    });
}

struct Clamped<'a> {
    /// alpha, limit
    constants: [f32; 2],
    gate_up: &'a [f32],
    f: usize,
    out: &'a mut [f32],
}

impl Kernel for Clamped<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let splat = |x| Lanes::splat(simd, x);
        let [alpha, limit] = self.constants;
        let (alpha, limit, least, one) = (splat(alpha), splat(limit), splat(-limit), splat(1.0));
        for (gate_up, out) in self.gate_up.chunks_exact(2 * self.f).zip(self.out.chunks_exact_mut(self.f)) {
            let (gate, up) = gate_up.split_at(self.f);
            for ((gate, up), out) in gate.chunks(LANES).zip(up.chunks(LANES)).zip(out.chunks_mut(LANES)) {
                let gate = Lanes::load_any(simd, gate, 0.0).min(limit);
                let up = Lanes::load_any(simd, up, 0.0).min(limit).max(least);
                ((up + one) * gate * sigmoid(alpha * gate)).store_any(out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, numbers};

    const CLAMPED: Gate = Gate::Clamped { alpha: 1.702, limit: 2.0 };

    #[test]
    fn clamped_is_the_definition_on_every_instruction_set() {
        for (rows, f) in [(0, 3), (1, 1), (3, 15), (9, 33)] {
            let gate_up: Vec<f32> = numbers(1, 2 * rows * f).iter().map(|x| 4.0 * x).collect();
            let wanted: Vec<f32> = (gate_up.chunks_exact(2 * f))
                .flat_map(|row| (0..f).map(|i| (row[i].min(2.0), row[f + i].clamp(-2.0, 2.0))).collect::<Vec<_>>())
                .map(|(g, u)| (u + 1.0) * g / (1.0 + (-1.702 * g).exp()))
                .collect();
            check(&[wanted], 2e-6, |isa| {
                let mut out = vec![f32::NAN; rows * f];
                clamped_on(isa, [1.702, 2.0], &gate_up, f, &mut out);
                vec![out]
            });
        }
    }

    #[test]
    fn gelu_on_paper() {
        let mut out = [0.0; 2];
        gated(Gate::GeluTanh, &[1.0, -1.0, 2.0, 3.0], 2, &mut out);
        assert!((out[0] - 2.0 * 0.841_192).abs() < 1e-5 && (out[1] + 3.0 * 0.158_808).abs() < 1e-5, "{out:?}");
    }

    #[test]
    fn gradients_are_the_slopes() {
        for gate in [Gate::Silu, Gate::GeluTanh, CLAMPED] {
            let gate_up: Vec<f32> = numbers(1, 24).iter().map(|x| 3.0 * x).collect();
            let dout = numbers(2, 12);
            let value = |gate_up: &[f32]| -> f64 {
                let mut out = vec![0.0; 12];
                gated(gate, gate_up, 4, &mut out);
                out.iter().zip(&dout).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
            };
            let mut found = vec![f32::NAN; 24];
            gated_backward(gate, &dout, &gate_up, 4, &mut found);
            let step = 1.0 / 512.0;
            for i in 0..24 {
                let moved = |by: f32| {
                    let mut moved = gate_up.clone();
                    moved[i] += by;
                    value(&moved)
                };
                let slope = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
                assert!((slope - f64::from(found[i])).abs() < 5e-3 * (1.0 + slope.abs()), "{gate:?} {i}");
            }
        }
    }
}
