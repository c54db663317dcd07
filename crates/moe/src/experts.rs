//! [`ExpertBank`]: the gated networks of a layer, computed on rows sorted by expert.

mod chunks;

use crate::{MoeError, Plan};
use chunks::Chunk;
use moebius_kernels::gates::{self, Gate};
use moebius_kernels::gemm::{Beta, Mat, Packed, Precision, grouped_matmul_weight_gradient, matmul_packed};
use moebius_kernels::memory::Buffer;
use moebius_kernels::parallel;
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

/// The forward's rows that the backward needs, in the plan's order. The rows of x, the inner activations and the answers are
/// not among them: making the first two again takes less time than writing and reading them does, and the third are not
/// needed.
struct Saved {
    /// `[assignments, 2 * width]`
    gate_up: Buffer<f32>,
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
        let rows = Rows { x: x.data(), hidden, plan, weights: weights.data(), dropout: dropout.as_deref() };
        let (gate_up, y) = self.compute(precision, &rows);
        let (token_offsets, token_rows) = plan.rows_of_token();
        let mut out = Buffer::scratch(tokens * hidden);
        let ones;
        let factors = if self.weighs_input {
            ones = vec![1.0; plan.n_assignments()];
            &ones
        } else {
            weights.data()
        };
        select::scatter_weighted(&y, hidden, token_offsets, token_rows, factors, &mut out);
        let output = Tensor::new(&[tokens, hidden], out);
        if !g.is_recording() {
            return Ok(Var::constant(output));
        }
        let inputs = Inputs { x: x.clone(), plan: plan.clone(), weights: weights.clone() };
        let saved = Saved { gate_up, dropout };
        Ok(g.record(output, move |dy, back| self.backward(precision, &dy, &inputs, saved, back)))
    }

    /// All experts on their rows: gate and up `[assignments, 2 * width]`, and answers `[assignments, hidden]`.
    fn compute(&self, precision: Precision, rows: &Rows) -> (Buffer<f32>, Buffer<f32>) {
        let (assignments, width, hidden) = (rows.plan.n_assignments(), self.width, rows.hidden);
        let mut gate_up = Buffer::scratch(assignments * 2 * width);
        let mut y = Buffer::scratch(assignments * hidden);
        let is_frozen = self.gate_up.is_frozen() || self.down.is_frozen();
        if is_frozen || assignments < chunks::ROWS * parallel::threads() {
            self.compute_whole(precision, rows, [&mut gate_up, &mut y]);
        } else {
            self.compute_in_chunks(precision, rows, [&mut gate_up, &mut y]);
        }
        (gate_up, y)
    }

    /// Product after product, each over all rows: the threads share an expert's columns where it has few rows.
    fn compute_whole(&self, precision: Precision, rows: &Rows, [gate_up, y]: [&mut [f32]; 2]) {
        let (width, offsets) = (self.width, rows.plan.offsets());
        if self.weighs_input {
            let x_rows = self.rows_read(rows, 0..rows.plan.n_assignments());
            self.gate_up.grouped_product(precision, &x_rows, None, offsets, gate_up);
        } else {
            self.gate_up.grouped_product(precision, rows.x, Some(rows.plan.token()), offsets, gate_up);
        }
        let biases = self.biases.as_ref();
        biases.inspect(|[bias, _]| add_by_expert(gate_up, bias.value().data(), offsets, 2 * width));
        let mut inner = Buffer::scratch(gate_up.len() / 2);
        self.inner(gate_up, rows.dropout, &mut inner);
        self.down.grouped_product(precision, &inner, None, offsets, y);
        biases.inspect(|[_, bias]| add_by_expert(y, bias.value().data(), offsets, rows.hidden));
    }

    /// The same bits chunk by chunk.
    fn compute_in_chunks(&self, precision: Precision, rows: &Rows, [gate_up, y]: [&mut [f32]; 2]) {
        let (width, hidden) = (self.width, rows.hidden);
        let [up_matrices, down_matrices] = [&self.gate_up, &self.down].map(|weight| weight.packed_forward(precision));
        let chunks = chunks::cut(rows.plan.offsets());
        let outputs = chunks::split(&chunks, gate_up, 2 * width).into_iter().zip(chunks::split(&chunks, y, hidden));
        chunks::for_each(chunks.iter().zip(outputs).collect(), |(chunk, (gate_up, y))| {
            let x_rows = self.rows_read(rows, chunk.rows.clone());
            product(&x_rows, &up_matrices[chunk.expert], gate_up);
            let bias = |which: usize| self.biases.as_ref().map(|biases| biases[which].value().data());
            bias(0).inspect(|bias| add_to_rows(gate_up, of_expert(bias, chunk, 2 * width)));
            let mut inner = Buffer::scratch(chunk.rows.len() * width);
            self.inner(gate_up, rows.dropout.map(|dropout| of_rows(dropout, chunk, width)), &mut inner);
            product(&inner, &down_matrices[chunk.expert], y);
            bias(1).inspect(|bias| add_to_rows(y, of_expert(bias, chunk, hidden)));
        });
    }

    /// What the experts read in some of the plan's rows, `[rows, hidden]`.
    fn rows_read(&self, rows: &Rows, range: std::ops::Range<usize>) -> Buffer<f32> {
        let mut x_rows = Buffer::scratch(range.len() * rows.hidden);
        let tokens = &rows.plan.token()[range.clone()];
        if self.weighs_input {
            select::gather_rows_weighted(rows.x, rows.hidden, tokens, &rows.weights[range], &mut x_rows);
        } else {
            select::gather_rows(rows.x, rows.hidden, tokens, &mut x_rows);
        }
        x_rows
    }

    /// act(gate, up) less what is dropped, `[rows, width]`.
    fn inner(&self, gate_up: &[f32], dropout: Option<&[f32]>, inner: &mut [f32]) {
        gates::gated(self.gate, gate_up, self.width, inner);
        thin(inner, dropout);
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
        let (assignments, width, hidden) = (plan.n_assignments(), self.width, self.down.shape()[1]);
        let Saved { gate_up, dropout } = saved;
        let rows = Rows { x: x.data(), hidden, plan, weights: weights.data(), dropout: dropout.as_deref() };
        let wants_input = back.wants(x) || self.weighs_input && back.wants(weights);
        let Slopes { dy_rows, inner, dgate_up, dx_rows, dweights } =
            self.backward_in_chunks(precision, dy, &rows, gate_up, wants_input);
        back.give(weights, dweights);
        if let Some([up_bias, down_bias]) = &self.biases {
            let factors = (!self.weighs_input).then_some(weights.data());
            sum_by_expert(&dy_rows, factors, plan.offsets(), hidden, back.weight_sum(down_bias));
            sum_by_expert(&dgate_up, None, plan.offsets(), 2 * width, back.weight_sum(up_bias));
        }
        let (ddown, beta) = back.weight(&self.down);
        let [dy_matrix, inner_matrix] = [(&dy_rows, hidden), (&inner, width)].map(|(m, w)| Mat::new(m, assignments, w));
        grouped_matmul_weight_gradient(precision, dy_matrix, inner_matrix, plan.offsets(), ddown, beta);
        drop((dy_rows, inner));
        if let Some((dx, beta)) = back.of(x) {
            let (token_offsets, token_rows) = plan.rows_of_token();
            match beta {
                Beta::Accumulate => select::scatter_add(&dx_rows, hidden, token_offsets, token_rows, dx),
                // Times one: the same sums without reading zeros first.
                Beta::Overwrite => {
                    let ones = vec![1.0; assignments];
                    select::scatter_weighted(&dx_rows, hidden, token_offsets, token_rows, &ones, dx);
                }
            }
        }
        drop(dx_rows);
        let x_rows = self.rows_read(&rows, 0..assignments);
        let (dweight, beta) = back.weight(&self.gate_up);
        let [dgate_up, x_rows] = [(&dgate_up, 2 * width), (&x_rows, hidden)].map(|(m, w)| Mat::new(m, assignments, w));
        grouped_matmul_weight_gradient(precision, dgate_up, x_rows, plan.offsets(), dweight, beta);
    }

    /// From the slope by the layer's answer to what the gradients of weights and input are made of.
    ///
    /// A token's answer is Σ w down(inner): the slope of w is dy · down(inner), which is dinner · inner for dinner = dy down,
    /// so that the experts' answers need not be kept; and w, a number a row, goes with inner instead of dy.
    fn backward_in_chunks(
        &self,
        precision: Precision,
        dy: &[f32],
        rows: &Rows,
        gate_up: Buffer<f32>,
        wants_input: bool,
    ) -> Slopes {
        let (plan, width, hidden) = (rows.plan, self.width, rows.hidden);
        let scratch = |width: usize| Buffer::scratch(plan.n_assignments() * width);
        let mut slopes = Slopes {
            dy_rows: scratch(hidden),
            inner: scratch(width),
            dgate_up: scratch(2 * width),
            dx_rows: scratch(if wants_input { hidden } else { 0 }),
            dweights: scratch(1),
        };
        let [up_matrices, down_matrices] = [&self.gate_up, &self.down].map(|weight| weight.packed_backward(precision));
        let chunks = chunks::cut(plan.offsets());
        let Slopes { dy_rows, inner, dgate_up, dx_rows, dweights } = &mut slopes;
        let split = |matrix, width| chunks::split(&chunks, matrix, width).into_iter();
        let tasks = (chunks.iter().zip(split(dy_rows, hidden)).zip(split(inner, width)))
            .zip(split(dgate_up, 2 * width).zip(split(dx_rows, if wants_input { hidden } else { 0 })))
            .zip(split(dweights, 1));
        chunks::for_each(tasks.collect(), |((((chunk, dy_rows), inner), (dgate_up, dx_rows)), dweights)| {
            let tokens = &plan.token()[chunk.rows.clone()];
            let weights = &rows.weights[chunk.rows.clone()];
            let gate_up = of_rows(&gate_up, chunk, 2 * width);
            let dropout = rows.dropout.map(|dropout| of_rows(dropout, chunk, width));
            select::gather_rows(dy, hidden, tokens, dy_rows);
            self.inner(gate_up, dropout, inner);
            let mut dinner = Buffer::scratch(inner.len());
            product(dy_rows, &down_matrices[chunk.expert], &mut dinner);
            if !self.weighs_input {
                let all: Vec<u32> = (0..tokens.len() as u32).collect();
                select::gathered_dots(&dinner, width, &all, inner, dweights);
                if let Some([_, bias]) = &self.biases {
                    let bias = of_expert(bias.value().data(), chunk, hidden);
                    let of_bias = |dy: &[f32]| dy.iter().zip(bias).map(|(dy, bias)| dy * bias).sum::<f32>();
                    dweights.iter_mut().zip(dy_rows.chunks_exact(hidden)).for_each(|(sum, dy)| *sum += of_bias(dy));
                }
                scale_rows(&mut dinner, weights, width);
                scale_rows(inner, weights, width);
            }
            thin(&mut dinner, dropout);
            gates::gated_backward(self.gate, &dinner, gate_up, width, dgate_up);
            if wants_input {
                product(dgate_up, &up_matrices[chunk.expert], dx_rows);
            }
            if self.weighs_input {
                // A weight's slope: what its row of the input would change, by x.
                match wants_input {
                    true => select::gathered_dots(rows.x, hidden, tokens, dx_rows, dweights),
                    false => dweights.fill(0.0),
                }
                scale_rows(dx_rows, weights, hidden);
            }
        });
        slopes
    }
}

/// Rows that experts read: those of `x` that the plan names, what each is weighted with, and what is dropped inside.
struct Rows<'a> {
    /// `[tokens, hidden]`
    x: &'a [f32],
    hidden: usize,
    plan: &'a Plan,
    /// `[assignments]`
    weights: &'a [f32],
    /// `[assignments, width]`
    dropout: Option<&'a [f32]>,
}

/// What a backward pass over chunks leaves, all in the plan's order.
struct Slopes {
    /// The slopes by a token's answer, unweighted, `[assignments, hidden]`.
    dy_rows: Buffer<f32>,
    /// Inner activations times the rows' weights, `[assignments, width]`.
    inner: Buffer<f32>,
    /// `[assignments, 2 * width]`
    dgate_up: Buffer<f32>,
    /// `[assignments, hidden]`; empty where nobody wants it.
    dx_rows: Buffer<f32>,
    /// `[assignments]`
    dweights: Buffer<f32>,
}

/// `y = x b`.
fn product(x: &[f32], b: &Packed, y: &mut [f32]) {
    matmul_packed(Mat::new(x, x.len() / b.k().max(1), b.k()), b, y, Beta::Overwrite);
}

/// A chunk's rows of a matrix of `width` columns.
fn of_rows<'m>(matrix: &'m [f32], chunk: &Chunk, width: usize) -> &'m [f32] {
    &matrix[chunk.rows.start * width..chunk.rows.end * width]
}

/// A chunk's expert's row of a matrix of `width` columns.
fn of_expert<'m>(matrix: &'m [f32], chunk: &Chunk, width: usize) -> &'m [f32] {
    &matrix[chunk.expert * width..][..width]
}

fn add_to_rows(rows: &mut [f32], bias: &[f32]) {
    rows.chunks_exact_mut(bias.len().max(1)).for_each(|row| select::add_assign(row, bias));
}

fn scale_rows(rows: &mut [f32], factors: &[f32], width: usize) {
    rows.chunks_exact_mut(width.max(1)).zip(factors).for_each(|(row, factor)| select::scale(row, *factor));
}

/// Drops inner activations, or their gradients.
fn thin(inner: &mut [f32], dropout: Option<&[f32]>) {
    if let Some(factors) = dropout {
        inner.iter_mut().zip(factors.iter()).for_each(|(inner, factor)| *inner *= factor);
    }
}

/// Adds each expert's bias to its rows.
fn add_by_expert(rows: &mut [f32], biases: &[f32], offsets: &[usize], width: usize) {
    for (bias, bounds) in biases.chunks_exact(width.max(1)).zip(offsets.windows(2)) {
        add_to_rows(&mut rows[bounds[0] * width..bounds[1] * width], bias);
    }
}

/// Adds each expert's rows, times their factors, to its sum, row after row: one order, whatever the threads.
fn sum_by_expert(rows: &[f32], factors: Option<&[f32]>, offsets: &[usize], width: usize, sums: &mut [f32]) {
    for (sum, bounds) in sums.chunks_exact_mut(width.max(1)).zip(offsets.windows(2)) {
        for row in bounds[0]..bounds[1] {
            let factor = factors.map_or(1.0, |factors| factors[row]);
            select::scaled_add(sum, factor, &rows[row * width..][..width]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: u64, len: usize) -> Vec<f32> {
        let mut numbers = vec![0.0; len];
        Rng::new(seed).fill_normal(&mut numbers, 0.5);
        numbers
    }

    /// Forward passes by chunks and by whole products, with everything a bank can have.
    #[test]
    fn chunks_give_the_bits_of_whole_products() {
        let (tokens, experts, hidden, width) = (150, 3, 24, 20);
        let param =
            |id, shape: &[usize]| Param::new(id, "w", Tensor::new(shape, random(id as u64, shape.iter().product())));
        // Expert 1 gets most, expert 2 nothing.
        let chosen: Vec<u32> = (0..tokens).map(|token| u32::from(token % 7 > 0)).collect();
        let plan = Plan::from_choices(experts, 1, &chosen).unwrap();
        let (x, weights) = (random(7, tokens * hidden), random(8, tokens));
        let dropout = random(9, tokens * width);
        for weighs_input in [false, true] {
            let bank = ExpertBank::new(param(0, &[experts, 2 * width, hidden]), param(1, &[experts, hidden, width]))
                .and_then(|bank| bank.with_biases(param(2, &[experts, 2, width]), param(3, &[experts, hidden])))
                .unwrap()
                .weighing_input(weighs_input);
            for precision in [Precision::F32, Precision::Bf16] {
                for dropout in [None, Some(&dropout[..])] {
                    let rows = Rows { x: &x, hidden, plan: &plan, weights: &weights, dropout };
                    let [mut whole, mut chunked] = [(); 2].map(|()| [2 * width, hidden].map(|w| vec![0.0; tokens * w]));
                    bank.compute_whole(precision, &rows, whole.each_mut().map(|part| &mut part[..]));
                    bank.compute_in_chunks(precision, &rows, chunked.each_mut().map(|part| &mut part[..]));
                    assert!(whole == chunked, "weighs input: {weighs_input}, {precision:?}");
                }
            }
        }
    }
}
