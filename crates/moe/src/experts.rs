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

/// The forward's rows that the backward needs, all in the plan's order.
struct Saved {
    x: Buffer<f32>,
    gate_up: Buffer<f32>,
    inner: Buffer<f32>,
    y: Buffer<f32>,
}

impl ExpertBank {
    /// A bank from its weights.
    ///
    /// # Shapes
    /// gate_up `[experts, 2 * width, hidden]` (the gate's rows first), down `[experts, hidden, width]`.
    pub fn new(gate_up: Param, down: Param) -> Result<Self, MoeError> {
        let [experts, both, hidden] = gate_up.value().dims()?;
        let [down_experts, down_hidden, width] = down.value().dims()?;
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
        let [experts, _, wanted] = self.gate_up.value().dims()?;
        if hidden != wanted || tokens != plan.n_tokens() || experts != plan.n_experts() {
            let (wanted, found) = (vec![plan.n_tokens(), wanted], vec![tokens, hidden]);
            return Err(TensorError::Shape { what: "experts' input", wanted, found }.into());
        }
        let precision = g.precision();
        let saved = self.compute(precision, x.data(), hidden, plan);
        let (token_offsets, token_rows) = plan.rows_of_token();
        let mut out = Buffer::scratch(tokens * hidden);
        select::scatter_weighted(&saved.y, hidden, token_offsets, token_rows, weights.data(), &mut out);
        let output = Tensor::new(&[tokens, hidden], out);
        if !g.is_recording() {
            return Ok(Var::constant(output));
        }
        let (x, plan, weights) = (x.clone(), plan.clone(), weights.clone());
        Ok(g.record(output, move |dy, back| self.backward(precision, dy, (&x, &weights), &plan, &saved, back)))
    }

    /// All experts on their rows.
    fn compute(&self, precision: Precision, x: &[f32], hidden: usize, plan: &Plan) -> Saved {
        let (rows, width) = (plan.n_assignments(), self.width);
        let mut gathered = Buffer::scratch(rows * hidden);
        select::gather_rows(x, hidden, plan.token(), &mut gathered);
        let mut gate_up = Buffer::scratch(rows * 2 * width);
        let packed = self.gate_up.packed_forward(precision);
        grouped_matmul(Mat::new(&gathered, rows, hidden), plan.offsets(), packed, &mut gate_up, Beta::Overwrite);
        let mut inner = Buffer::scratch(rows * width);
        activation::swiglu(&gate_up, width, &mut inner);
        let mut y = Buffer::scratch(rows * hidden);
        let packed = self.down.packed_forward(precision);
        grouped_matmul(Mat::new(&inner, rows, width), plan.offsets(), packed, &mut y, Beta::Overwrite);
        Saved { x: gathered, gate_up, inner, y }
    }

    fn backward(
        &self,
        precision: Precision,
        dy: &[f32],
        (x, weights): (&Var, &Var),
        plan: &Plan,
        saved: &Saved,
        back: &mut Backprop<'_>,
    ) {
        let (rows, width) = (plan.n_assignments(), self.width);
        let hidden = dy.len() / plan.n_tokens().max(1);
        if let Some((dweights, beta)) = back.of(weights) {
            assert_eq!(beta, Beta::Overwrite, "a routing's weights are used once");
            select::gathered_dots(dy, hidden, plan.token(), &saved.y, dweights);
        }
        let mut dy_rows = Buffer::scratch(rows * hidden);
        select::gather_rows_weighted(dy, hidden, plan.token(), weights.data(), &mut dy_rows);
        let dy_rows = Mat::new(&dy_rows, rows, hidden);
        let (ddown, beta) = back.weight(&self.down);
        let inner = Mat::new(&saved.inner, rows, width);
        grouped_matmul_weight_gradient(precision, dy_rows, inner, plan.offsets(), ddown, beta);
        let mut dinner = Buffer::scratch(rows * width);
        grouped_matmul(dy_rows, plan.offsets(), self.down.packed_backward(precision), &mut dinner, Beta::Overwrite);
        let mut dgate_up = Buffer::scratch(rows * 2 * width);
        activation::swiglu_backward(&dinner, &saved.gate_up, width, &mut dgate_up);
        let dgate_up = Mat::new(&dgate_up, rows, 2 * width);
        let (dweight, beta) = back.weight(&self.gate_up);
        let x_rows = Mat::new(&saved.x, rows, hidden);
        grouped_matmul_weight_gradient(precision, dgate_up, x_rows, plan.offsets(), dweight, beta);
        if let Some(dx) = back.sum_of(x) {
            let mut dx_rows = Buffer::scratch(rows * hidden);
            let packed = self.gate_up.packed_backward(precision);
            grouped_matmul(dgate_up, plan.offsets(), packed, &mut dx_rows, Beta::Overwrite);
            let (token_offsets, token_rows) = plan.rows_of_token();
            select::scatter_add(&dx_rows, hidden, token_offsets, token_rows, dx);
        }
    }
}
