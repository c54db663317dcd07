//! Gated non-linearities: SwiGLU (Shazeer 2020) and its relatives.

use crate::{Graph, Tensor, TensorError, Var};
use moebius_kernels::gates::{self, Gate, GatedGradients, GatedSaved};
use moebius_kernels::memory::Buffer;
use moebius_kernels::narrow::{Numbers, NumbersMut};

/// silu(gate) * up of rows that hold gate, then up.
///
/// # Shapes
/// gate_up `[tokens, 2 * width]`, result `[tokens, width]`.
pub fn swiglu<'p>(g: &Graph<'p>, gate_up: &Var) -> Result<Var, TensorError> {
    gated(g, gate_up, Gate::Silu)
}

/// As [`swiglu`] with another gate.
///
/// # Shapes
/// gate_up `[tokens, 2 * width]`, result `[tokens, width]`.
pub fn gated<'p>(g: &Graph<'p>, gate_up: &Var, gate: Gate) -> Result<Var, TensorError> {
    let [rows, both] = gate_up.dims()?;
    let width = both / 2;
    let mut out = Buffer::scratch(rows * width);
    gates::gated(gate, gate_up.data(), width, &mut out);
    let input = gate_up.clone();
    Ok(g.record_from(&[gate_up], Tensor::new(&[rows, width], out), move |dy, back| {
        let mut dx = Buffer::scratch(rows * both);
        let gate_up = Numbers::F32(input.data());
        let saved = GatedSaved { gate, f: width, gate_up, factors: None, dropout: None };
        let dgate_up = NumbersMut::F32(&mut dx);
        gates::gated_backward(&saved, &dy, GatedGradients { dgate_up, out: None, dfactors: None });
        back.give(&input, dx);
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients, random};

    #[test]
    fn gradients_match_finite_differences() {
        check_gradients(&[random(&[3, 10], 1)], |g, x| swiglu(g, &x[0]).unwrap());
    }
}
