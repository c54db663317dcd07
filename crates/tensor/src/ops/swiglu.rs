//! Gated non-linearities: SwiGLU (Shazeer 2020) and its relatives.

use crate::{Graph, Tensor, TensorError, Var};
use moebius_kernels::gates::{self, Gate};
use moebius_kernels::memory::Buffer;

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
        gates::gated_backward(gate, &dy, input.data(), width, &mut dx);
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
