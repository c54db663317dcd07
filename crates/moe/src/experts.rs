//! [`ExpertBank`]: the gated networks of a layer, computed on rows sorted by expert.

use crate::{MoeError, Plan};
use moebius_kernels::gates::{self, Gate};
use moebius_kernels::gemm::{Beta, Mat, Precision, grouped_matmul, grouped_matmul_weight_gradient};
use moebius_kernels::memory::Buffer;
use moebius_kernels::select;
use moebius_tensor::{Backprop, Graph, Param, Rng, Tensor, TensorError, Var};
use std::rc::Rc;

/// `experts` networks down · act(gate · x, up · x), their weights stacked.
#[derive(Debug)]
pub struct ExpertBank {
    gate_up: Param,
    down: Param,
    biases: Option<[Param; 2]>,
    width: usize,
    gate: Gate,
    weighs_input: bool,
}

/// The forward's rows that the backward needs, in the plan's order. The rows of x and the inner activations are not among
/// them: x is there anyway, and making both again takes less time than writing and reading them does.
struct Saved {
    /// `[assignments, 2 * width]`
    gate_up: Buffer<f32>,
    /// `[assignments, hidden]`
    y: Buffer<f32>,
    dropout: Option<Dropout>,
}

/// What inner activations are multiplied with, `[assignments, width]`: 0, or 1 over the share that is kept.
type Dropout = Buffer<f32>;

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
            Ok(Self { gate_up, down, biases: None, width, gate: Gate::Silu, weighs_input: false })
        } else {
            let wanted = vec![experts, hidden, both / 2];
            Err(TensorError::Shape { what: "experts' down", wanted, found: down.shape().to_vec() }.into())
        }
    }

    /// With another non-linearity than SwiGLU.
    pub fn with_gate(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }

    /// With weights that multiply what an expert reads, not what it answers (Llama 4).
    pub fn weighing_input(self, weighs_input: bool) -> Self {
        Self { weighs_input, ..self }
    }

    /// With biases behind both products.
    ///
    /// # Shapes
    /// `[experts, 2, width]` (the gate's first) and `[experts, hidden]`.
    ///
    /// # Errors
    /// Other shapes.
    pub fn with_biases(self, gate_up_bias: Param, down_bias: Param) -> Result<Self, MoeError> {
        let [experts, hidden, width] = self.down.dims()?;
        for (bias, wanted) in [(&gate_up_bias, vec![experts, 2, width]), (&down_bias, vec![experts, hidden])] {
            if bias.shape() != wanted {
                let found = bias.shape().to_vec();
                return Err(TensorError::Shape { what: "experts' bias", wanted, found }.into());
            }
        }
        Ok(Self { biases: Some([gate_up_bias, down_bias]), ..self })
    }

    /// Its weights.
    pub fn params(&self) -> Vec<&Param> {
        [&self.gate_up, &self.down].into_iter().chain(self.biases.iter().flatten()).collect()
    }

    /// Its weights, to be changed.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        let Self { gate_up, down, biases, .. } = self;
        [gate_up, down].into_iter().chain(biases.iter_mut().flatten()).collect()
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
        let dropout = self.draw_dropout(g, plan.n_assignments());
        let saved = self.compute(precision, [x.data(), weights.data()], hidden, plan, dropout);
        let (token_offsets, token_rows) = plan.rows_of_token();
        let mut out = Buffer::scratch(tokens * hidden);
        let ones;
        let factors = if self.weighs_input {
            ones = vec![1.0; plan.n_assignments()];
            &ones
        } else {
            weights.data()
        };
        select::scatter_weighted(&saved.y, hidden, token_offsets, token_rows, factors, &mut out);
        let output = Tensor::new(&[tokens, hidden], out);
        if !g.is_recording() {
            return Ok(Var::constant(output));
        }
        let inputs = Inputs { x: x.clone(), plan: plan.clone(), weights: weights.clone() };
        Ok(g.record(output, move |dy, back| self.backward(precision, &dy, &inputs, saved, back)))
    }

    /// All experts on their rows.
    fn compute(
        &self,
        precision: Precision,
        [x, weights]: [&[f32]; 2],
        hidden: usize,
        plan: &Plan,
        dropout: Option<Dropout>,
    ) -> Saved {
        let (rows, width) = (plan.n_assignments(), self.width);
        let mut gate_up = Buffer::scratch(rows * 2 * width);
        if self.weighs_input {
            let x_rows = self.rows_read(x, hidden, plan, weights);
            self.gate_up.grouped_product(precision, &x_rows, None, plan.offsets(), &mut gate_up);
        } else {
            self.gate_up.grouped_product(precision, x, Some(plan.token()), plan.offsets(), &mut gate_up);
        }
        let biases = self.biases.as_ref();
        biases.inspect(|[bias, _]| add_by_expert(&mut gate_up, bias.value().data(), plan.offsets(), 2 * width));
        let inner = self.inner(&gate_up, dropout.as_ref());
        let mut y = Buffer::scratch(rows * hidden);
        self.down.grouped_product(precision, &inner, None, plan.offsets(), &mut y);
        biases.inspect(|[_, bias]| add_by_expert(&mut y, bias.value().data(), plan.offsets(), hidden));
        Saved { gate_up, y, dropout }
    }

    /// What the experts read, in the plan's order, `[assignments, hidden]`.
    fn rows_read(&self, x: &[f32], hidden: usize, plan: &Plan, weights: &[f32]) -> Buffer<f32> {
        let mut rows = Buffer::scratch(plan.n_assignments() * hidden);
        if self.weighs_input {
            select::gather_rows_weighted(x, hidden, plan.token(), weights, &mut rows);
        } else {
            select::gather_rows(x, hidden, plan.token(), &mut rows);
        }
        rows
    }

    /// act(gate, up) less what is dropped, `[assignments, width]`.
    fn inner(&self, gate_up: &[f32], dropout: Option<&Dropout>) -> Buffer<f32> {
        let mut inner = Buffer::scratch(gate_up.len() / 2);
        gates::gated(self.gate, gate_up, self.width, &mut inner);
        thin(&mut inner, dropout);
        inner
    }

    /// Expert dropout (Fedus et al. 2021, section 2.4): drawn anew for each step by the graph's seed and for each bank by
    /// the place of its weights, and the same when the layer is computed again.
    fn draw_dropout(&self, g: &Graph<'_>, rows: usize) -> Option<Dropout> {
        let share = g.expert_dropout();
        if share == 0.0 {
            return None;
        }
        let mut rng = Rng::new(!g.seed().wrapping_add(self.gate_up.id() as u64));
        let kept = 1.0 / (1.0 - share);
        Some((0..rows * self.width).map(|_| if rng.uniform() < share { 0.0 } else { kept }).collect())
    }

    /// Each buffer goes as soon as nothing needs it: the next one often takes its memory.
    fn backward(&self, precision: Precision, dy: &[f32], inputs: &Inputs, saved: Saved, back: &mut Backprop<'_>) {
        let Inputs { x, plan, weights } = inputs;
        let Saved { gate_up, y, dropout } = saved;
        let (rows, width, hidden) = (plan.n_assignments(), self.width, self.down.shape()[1]);
        if back.wants(weights) && !self.weighs_input {
            let mut dweights = Buffer::scratch(rows);
            select::gathered_dots(dy, hidden, plan.token(), &y, &mut dweights);
            back.give(weights, dweights);
        }
        drop(y);

        let mut dy_rows = Buffer::scratch(rows * hidden);
        if self.weighs_input {
            select::gather_rows(dy, hidden, plan.token(), &mut dy_rows);
        } else {
            select::gather_rows_weighted(dy, hidden, plan.token(), weights.data(), &mut dy_rows);
        }
        if let Some([_, bias]) = &self.biases {
            sum_by_expert(&dy_rows, plan.offsets(), hidden, back.weight_sum(bias));
        }
        let inner = self.inner(&gate_up, dropout.as_ref());
        let (ddown, beta) = back.weight(&self.down);
        let dy_matrix = Mat::new(&dy_rows, rows, hidden);
        let inner_matrix = Mat::new(&inner, rows, width);
        grouped_matmul_weight_gradient(precision, dy_matrix, inner_matrix, plan.offsets(), ddown, beta);
        let mut dinner = inner;
        grouped_matmul(dy_matrix, plan.offsets(), self.down.packed_backward(precision), &mut dinner, Beta::Overwrite);
        drop(dy_rows);
        thin(&mut dinner, dropout.as_ref());

        let mut dgate_up = Buffer::scratch(rows * 2 * width);
        gates::gated_backward(self.gate, &dinner, &gate_up, width, &mut dgate_up);
        drop((dinner, gate_up));
        if let Some([bias, _]) = &self.biases {
            sum_by_expert(&dgate_up, plan.offsets(), 2 * width, back.weight_sum(bias));
        }

        let dgate_up = Mat::new(&dgate_up, rows, 2 * width);
        let mut x_rows = self.rows_read(x.data(), hidden, plan, weights.data());
        let (dweight, beta) = back.weight(&self.gate_up);
        let x_matrix = Mat::new(&x_rows, rows, hidden);
        grouped_matmul_weight_gradient(precision, dgate_up, x_matrix, plan.offsets(), dweight, beta);
        let wants_input = back.wants(x) || self.weighs_input && back.wants(weights);
        if !wants_input {
            return;
        }
        let dx_rows = &mut x_rows;
        let packed = self.gate_up.packed_backward(precision);
        grouped_matmul(dgate_up, plan.offsets(), packed, dx_rows, Beta::Overwrite);
        if self.weighs_input {
            // A weight's slope: what its row of the input would change, by x.
            let mut dweights = Buffer::scratch(rows);
            select::gathered_dots(x.data(), hidden, plan.token(), dx_rows, &mut dweights);
            back.give(weights, dweights);
            for (row, weight) in dx_rows.chunks_exact_mut(hidden.max(1)).zip(weights.data()) {
                select::scale(row, *weight);
            }
        }
        if let Some((dx, beta)) = back.of(x) {
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

/// Drops inner activations, or their gradients.
fn thin(inner: &mut [f32], dropout: Option<&Dropout>) {
    if let Some(factors) = dropout {
        inner.iter_mut().zip(factors.iter()).for_each(|(inner, factor)| *inner *= factor);
    }
}

/// Adds each expert's bias to its rows.
fn add_by_expert(rows: &mut [f32], biases: &[f32], offsets: &[usize], width: usize) {
    for (bias, bounds) in biases.chunks_exact(width.max(1)).zip(offsets.windows(2)) {
        for row in rows[bounds[0] * width..bounds[1] * width].chunks_exact_mut(width.max(1)) {
            select::add_assign(row, bias);
        }
    }
}

/// Adds each expert's rows to its sum, row after row: one order, whatever the threads.
fn sum_by_expert(rows: &[f32], offsets: &[usize], width: usize, sums: &mut [f32]) {
    for (sum, bounds) in sums.chunks_exact_mut(width.max(1)).zip(offsets.windows(2)) {
        for row in rows[bounds[0] * width..bounds[1] * width].chunks_exact(width.max(1)) {
            select::add_assign(sum, row);
        }
    }
}
