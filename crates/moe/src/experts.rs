//! [`ExpertBank`]: the SwiGLU networks of a layer, computed on rows sorted by expert.

use crate::{MoeError, Plan};
use moebius_kernels::activation;
use moebius_kernels::gemm::{Beta, Mat, Precision, grouped_matmul, grouped_matmul_weight_gradient};
use moebius_kernels::memory::Buffer;
use moebius_kernels::select;
use moebius_tensor::{Backprop, Graph, Param, Tensor, TensorError, Var};
use std::rc::Rc;

/// `experts` networks down · (silu(gate · x) * (up · x)), their weights stacked.
#[derive(Debug)]
pub struct ExpertBank {
    gate_up: Param,
    down: Param,
    width: usize,
}

/// The forward's rows that the backward needs, in the plan's order. The rows of x and the inner activations are not among
/// them: x is there anyway, and making both again takes less time than writing and reading them does.
struct Saved {
    /// `[assignments, 2 * width]`
    gate_up: Buffer<f32>,
    /// `[assignments, hidden]`
    y: Buffer<f32>,
}

/// What the experts computed on, and how their answers were weighted.
struct Inputs {
    x: Var,
    plan: Rc<Plan>,
    weights: Var,
}

impl ExpertBank {
    /// A bank from its weights.
    ///
    /// # Shapes
    /// gate_up `[experts, 2 * width, hidden]` (the gate's rows first), down `[experts, hidden, width]`.
    pub fn new(gate_up: Param, down: Param) -> Result<Self, MoeError> {
        let [experts, both, hidden] = gate_up.dims()?;
        let [down_experts, down_hidden, width] = down.dims()?;
        if (down_experts, down_hidden, 2 * width) == (experts, hidden, both) {
            Ok(Self { gate_up, down, width })
        } else {
            let wanted = vec![experts, hidden, both / 2];
            Err(TensorError::Shape { what: "experts' down", wanted, found: down.shape().to_vec() }.into())
        }
    }

    /// Its weights.
    pub fn params(&self) -> Vec<&Param> {
        vec![&self.gate_up, &self.down]
    }

    /// Its weights, to be changed.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        vec![&mut self.gate_up, &mut self.down]
    }

    /// Sends each token's row to its experts and sums what they answer, weighted, in slot order.
    ///
    /// # Shapes
    /// x `[tokens, hidden]`, weights `[assignments]` in the plan's row order, result `[tokens, hidden]`.
    pub fn forward<'p>(&'p self, g: &Graph<'p>, x: &Var, plan: &Rc<Plan>, weights: &Var) -> Result<Var, MoeError> {
        let [tokens, hidden] = x.dims()?;
        let [experts, _, wanted] = self.gate_up.dims()?;
        if hidden != wanted || tokens != plan.n_tokens() || experts != plan.n_experts() {
            let (wanted, found) = (vec![plan.n_tokens(), wanted], vec![tokens, hidden]);
            return Err(TensorError::Shape { what: "experts' input", wanted, found }.into());
        }
        if weights.shape() != [plan.n_assignments()] {
            let (wanted, found) = (vec![plan.n_assignments()], weights.shape().to_vec());
            return Err(TensorError::Shape { what: "experts' weights", wanted, found }.into());
        }
        let precision = g.precision();
        if g.is_recording() {
            self.params().into_iter().try_for_each(Param::check_trainable)?;
        }
        let saved = self.compute(precision, x.data(), hidden, plan);
        let (token_offsets, token_rows) = plan.rows_of_token();
        let mut out = Buffer::scratch(tokens * hidden);
        select::scatter_weighted(&saved.y, hidden, token_offsets, token_rows, weights.data(), &mut out);
        let output = Tensor::new(&[tokens, hidden], out);
        if !g.is_recording() {
            return Ok(Var::constant(output));
        }
        let inputs = Inputs { x: x.clone(), plan: plan.clone(), weights: weights.clone() };
        Ok(g.record(output, move |dy, back| self.backward(precision, &dy, &inputs, saved, back)))
    }

    /// All experts on their rows.
    fn compute(&self, precision: Precision, x: &[f32], hidden: usize, plan: &Plan) -> Saved {
        let (rows, width) = (plan.n_assignments(), self.width);
        let mut gate_up = Buffer::scratch(rows * 2 * width);
        self.gate_up.grouped_product(precision, x, Some(plan.token()), plan.offsets(), &mut gate_up);
        let inner = self.inner(&gate_up);
        let mut y = Buffer::scratch(rows * hidden);
        self.down.grouped_product(precision, &inner, None, plan.offsets(), &mut y);
        Saved { gate_up, y }
    }

    /// silu(gate) * up, `[assignments, width]`.
    fn inner(&self, gate_up: &[f32]) -> Buffer<f32> {
        let mut inner = Buffer::scratch(gate_up.len() / 2);
        activation::swiglu(gate_up, self.width, &mut inner);
        inner
    }

    /// Each buffer goes as soon as nothing needs it: the next one often takes its memory.
    fn backward(&self, precision: Precision, dy: &[f32], inputs: &Inputs, saved: Saved, back: &mut Backprop<'_>) {
        let Inputs { x, plan, weights } = inputs;
        let Saved { gate_up, y } = saved;
        let (rows, width, hidden) = (plan.n_assignments(), self.width, self.down.shape()[1]);
        if back.wants(weights) {
            let mut dweights = Buffer::scratch(rows);
            select::gathered_dots(dy, hidden, plan.token(), &y, &mut dweights);
            back.give(weights, dweights);
        }
        drop(y);

        let mut dy_rows = Buffer::scratch(rows * hidden);
        select::gather_rows_weighted(dy, hidden, plan.token(), weights.data(), &mut dy_rows);
        let inner = self.inner(&gate_up);
        let (ddown, beta) = back.weight(&self.down);
        let dy_matrix = Mat::new(&dy_rows, rows, hidden);
        let inner_matrix = Mat::new(&inner, rows, width);
        grouped_matmul_weight_gradient(precision, dy_matrix, inner_matrix, plan.offsets(), ddown, beta);
        let mut dinner = inner;
        grouped_matmul(dy_matrix, plan.offsets(), self.down.packed_backward(precision), &mut dinner, Beta::Overwrite);
        drop(dy_rows);

        let mut dgate_up = Buffer::scratch(rows * 2 * width);
        activation::swiglu_backward(&dinner, &gate_up, width, &mut dgate_up);
        drop((dinner, gate_up));

        let dgate_up = Mat::new(&dgate_up, rows, 2 * width);
        let mut x_rows = gathered(x.data(), hidden, plan);
        let (dweight, beta) = back.weight(&self.gate_up);
        let x_matrix = Mat::new(&x_rows, rows, hidden);
        grouped_matmul_weight_gradient(precision, dgate_up, x_matrix, plan.offsets(), dweight, beta);
        if let Some((dx, beta)) = back.of(x) {
            let dx_rows = &mut x_rows;
            let packed = self.gate_up.packed_backward(precision);
            grouped_matmul(dgate_up, plan.offsets(), packed, dx_rows, Beta::Overwrite);
            let (token_offsets, token_rows) = plan.rows_of_token();
            match beta {
                Beta::Accumulate => select::scatter_add(dx_rows, hidden, token_offsets, token_rows, dx),
                // Times one: the same sums without reading zeros first.
                Beta::Overwrite => {
                    select::scatter_weighted(dx_rows, hidden, token_offsets, token_rows, &vec![1.0; rows], dx);
                }
            }
        }
    }
}

/// The rows of x in the plan's order, `[assignments, hidden]`.
fn gathered(x: &[f32], hidden: usize, plan: &Plan) -> Buffer<f32> {
    let mut rows = Buffer::scratch(plan.n_assignments() * hidden);
    select::gather_rows(x, hidden, plan.token(), &mut rows);
    rows
}
