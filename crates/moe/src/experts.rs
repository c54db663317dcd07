//! [`ExpertBank`]: the gated networks of a layer, computed on rows sorted by expert.

mod backward;
mod chunks;
mod stored;

use crate::{MoeError, Plan};
use chunks::Chunk;
use moebius_kernels::gates::{self, Gate};
use moebius_kernels::gemm::{Beta, Mat, Packed, Precision, matmul_packed};
use moebius_kernels::memory::Buffer;
use moebius_kernels::narrow::NumbersMut;
use moebius_kernels::parallel;
use moebius_kernels::select;
use moebius_tensor::{Graph, Param, Rng, Tensor, TensorError, Var};
use std::ops::Range;
use std::rc::Rc;
use stored::{Source, Stored};

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
    gate_up: Stored,
    /// Whether the weights' packed forms are worth keeping.
    keeps_packs: bool,
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
        let mut gate_up = Stored::scratch(g.is_recording(), precision, plan.n_assignments() * 2 * self.width);
        let y = self.compute(precision, g.keeps_packs(), &rows, &mut gate_up);
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
        let saved = Saved { gate_up, keeps_packs: g.keeps_packs(), dropout };
        Ok(g.record(output, move |dy, back| self.backward(precision, &dy, &inputs, saved, back)))
    }

    /// All experts on their rows: what they answer, `[assignments, hidden]`, and gates and ups as `gate_up` keeps them.
    fn compute(&self, precision: Precision, keeps_packs: bool, rows: &Rows, gate_up: &mut Stored) -> Buffer<f32> {
        let assignments = rows.plan.n_assignments();
        let mut y = Buffer::scratch(assignments * rows.hidden);
        let is_frozen = self.gate_up.is_frozen() || self.down.is_frozen();
        if is_frozen || assignments < chunks::ROWS * parallel::threads() {
            self.compute_whole(precision, rows, gate_up, &mut y);
        } else {
            self.compute_in_chunks(precision, keeps_packs, rows, gate_up, &mut y);
        }
        y
    }

    /// Product after product, each over all rows: the threads share an expert's columns where it has few rows.
    fn compute_whole(&self, precision: Precision, rows: &Rows, gate_up: &mut Stored, y: &mut [f32]) {
        let (assignments, width, offsets) = (rows.plan.n_assignments(), self.width, rows.plan.offsets());
        let biases = self.biases.as_ref();
        let mut inner = Buffer::scratch(assignments * width);
        self.gated(gate_up.all(), rows.dropout, NumbersMut::F32(&mut inner), |gate_up| {
            if self.weighs_input {
                let x_rows = weighted_rows(rows, 0..assignments);
                self.gate_up.grouped_product(precision, &x_rows, None, offsets, gate_up);
            } else {
                self.gate_up.grouped_product(precision, rows.x, Some(rows.plan.token()), offsets, gate_up);
            }
            biases.inspect(|[bias, _]| add_by_expert(gate_up, bias.value().data(), offsets, 2 * width));
        });
        self.down.grouped_product(precision, &inner, None, offsets, y);
        biases.inspect(|[_, bias]| add_by_expert(y, bias.value().data(), offsets, rows.hidden));
    }

    /// The same bits chunk by chunk.
    fn compute_in_chunks(
        &self,
        precision: Precision,
        keeps_packs: bool,
        rows: &Rows,
        gate_up: &mut Stored,
        y: &mut [f32],
    ) {
        let (width, hidden) = (self.width, rows.hidden);
        let [up_matrices, down_matrices] =
            [&self.gate_up, &self.down].map(|weight| weight.lend_forward(precision, keeps_packs));
        let x = Source::new(precision, rows.x);
        let chunks = chunks::cut(rows.plan.offsets());
        let outputs = gate_up.split(&chunks, 2 * width).into_iter().zip(chunks::split(&chunks, y, hidden));
        chunks::for_each(chunks.iter().zip(outputs).collect(), |(chunk, (kept, y))| {
            let bias = |which: usize| self.biases.as_ref().map(|biases| biases[which].value().data());
            let dropout = rows.dropout.map(|dropout| of_rows(dropout, chunk, width));
            let mut inner = Stored::scratch(true, precision, chunk.rows.len() * width);
            let kept = kept.as_mut().map(NumbersMut::as_mut);
            let room = inner.all().expect("the next product reads it");
            self.gated(kept, dropout, room, |gate_up| {
                let x_rows = self.rows_read(rows, &x, chunk.rows.clone());
                product(x_rows.matrix(hidden), &up_matrices[chunk.expert], gate_up);
                bias(0).inspect(|bias| add_to_rows(gate_up, of_expert(bias, chunk, 2 * width)));
            });
            product(inner.matrix(width), &down_matrices[chunk.expert], y);
            bias(1).inspect(|bias| add_to_rows(y, of_expert(bias, chunk, hidden)));
        });
    }

    /// What the experts read in some of the plan's rows, `[rows, hidden]`; `x` is that of `rows`.
    fn rows_read(&self, rows: &Rows, x: &Source, range: Range<usize>) -> Stored {
        match self.weighs_input {
            true => Stored::F32(weighted_rows(rows, range)),
            false => x.gather(rows.hidden, &rows.plan.token()[range]),
        }
    }

    /// act(gate, up) less what is dropped into `inner` `[rows, width]`, for the gates and ups that `fill` makes; they
    /// are kept in `kept`.
    fn gated(
        &self,
        kept: Option<NumbersMut<'_>>,
        dropout: Option<&[f32]>,
        inner: NumbersMut<'_>,
        fill: impl FnOnce(&mut [f32]),
    ) {
        let mut wide;
        let (gate_up, rounded) = match kept {
            Some(NumbersMut::F32(rows)) => (rows, None),
            Some(NumbersMut::Bf16(rows)) => {
                wide = Buffer::scratch(2 * inner.len());
                (&mut wide[..], Some(rows))
            }
            None => {
                wide = Buffer::scratch(2 * inner.len());
                (&mut wide[..], None)
            }
        };
        fill(gate_up);
        gates::gated_keeping(self.gate, gate_up, self.width, dropout, inner, rounded);
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

/// Rows of `x` times their weights, `[rows, hidden]`.
fn weighted_rows(rows: &Rows, range: Range<usize>) -> Buffer<f32> {
    let mut x_rows = Buffer::scratch(range.len() * rows.hidden);
    let tokens = &rows.plan.token()[range.clone()];
    select::gather_rows_weighted(rows.x, rows.hidden, tokens, &rows.weights[range], &mut x_rows);
    x_rows
}

/// `y = x b`.
fn product(x: Mat, b: &Packed, y: &mut [f32]) {
    matmul_packed(x, b, y, Beta::Overwrite);
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

/// Adds each expert's bias to its rows.
fn add_by_expert(rows: &mut [f32], biases: &[f32], offsets: &[usize], width: usize) {
    for (bias, bounds) in biases.chunks_exact(width.max(1)).zip(offsets.windows(2)) {
        add_to_rows(&mut rows[bounds[0] * width..bounds[1] * width], bias);
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
                    let answers = |chunked: bool| {
                        let mut kept = Stored::scratch(true, precision, tokens * 2 * width);
                        let mut y = vec![0.0; tokens * hidden];
                        match chunked {
                            true => bank.compute_in_chunks(precision, false, &rows, &mut kept, &mut y),
                            false => bank.compute_whole(precision, &rows, &mut kept, &mut y),
                        }
                        (kept.read(0..tokens * 2 * width, <[f32]>::to_vec), y)
                    };
                    let (whole, chunked) = (answers(false), answers(true));
                    assert!(whole == chunked, "weighs input: {weighs_input}, {precision:?}");
                }
            }
        }
    }
}
