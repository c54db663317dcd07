//! The backward pass of an [`ExpertBank`], chunk by chunk, and the gradients of its weights from what that leaves.

use super::chunks::{self, Chunk};
use super::stored::{Source, Stored, matrix};
use super::{ExpertBank, Inputs, Rows, Saved, of_expert, of_rows, product};
use moebius_kernels::gates::{self, GatedGradients, GatedSaved};
use moebius_kernels::gemm::{Beta, Precision, grouped_matmul_weight_gradient};
use moebius_kernels::memory::Buffer;
use moebius_kernels::narrow::NumbersMut;
use moebius_kernels::select;
use moebius_tensor::Backprop;

/// What a backward pass over chunks leaves, all in the plan's order.
struct Slopes {
    /// The slopes by a token's answer, unweighted, `[assignments, hidden]`.
    dy_rows: Stored,
    /// Inner activations times the rows' weights, `[assignments, width]`.
    inner: Stored,
    /// `[assignments, 2 * width]`
    dgate_up: Stored,
    /// `[assignments, hidden]`; empty where nobody wants it.
    dx_rows: Buffer<f32>,
    /// `[assignments]`
    dweights: Buffer<f32>,
}

/// The places of a chunk's rows in [`Slopes`].
struct Task<'t> {
    chunk: &'t Chunk,
    dy_rows: NumbersMut<'t>,
    inner: NumbersMut<'t>,
    dgate_up: NumbersMut<'t>,
    dx_rows: &'t mut [f32],
    dweights: &'t mut [f32],
}

impl Slopes {
    fn tasks<'t>(&'t mut self, chunks: &'t [Chunk], hidden: usize, width: usize) -> Vec<Task<'t>> {
        let Self { dy_rows, inner, dgate_up, dx_rows, dweights } = self;
        let dx_width = if dx_rows.is_empty() { 0 } else { hidden };
        // All of them are for products.
        let split = |stored: &'t mut Stored, width: usize| stored.split(chunks, width).into_iter().flatten();
        let stored = split(dy_rows, hidden).zip(split(inner, width)).zip(split(dgate_up, 2 * width));
        let plain = chunks::split(chunks, dx_rows, dx_width).into_iter().zip(chunks::split(chunks, dweights, 1));
        let task = |((chunk, ((dy_rows, inner), dgate_up)), (dx_rows, dweights))| Task {
            chunk,
            dy_rows,
            inner,
            dgate_up,
            dx_rows,
            dweights,
        };
        chunks.iter().zip(stored).zip(plain).map(task).collect()
    }
}

impl ExpertBank {
    /// Each buffer goes as soon as nothing needs it: the next one often takes its memory.
    pub(super) fn backward(
        &self,
        precision: Precision,
        dy: &[f32],
        inputs: &Inputs,
        saved: Saved,
        back: &mut Backprop<'_>,
    ) {
        let Inputs { x, plan, weights } = inputs;
        let (assignments, width, hidden) = (plan.n_assignments(), self.width, self.down.shape()[1]);
        let rows = Rows { x: x.data(), hidden, plan, weights: weights.data(), dropout: saved.dropout.as_deref() };
        let wants_input = back.wants(x) || self.weighs_input && back.wants(weights);
        let Slopes { dy_rows, inner, dgate_up, dx_rows, dweights } =
            self.backward_in_chunks(precision, saved.keeps_packs, dy, &rows, saved.gate_up, wants_input);
        back.give(weights, dweights);
        if let Some([up_bias, down_bias]) = &self.biases {
            let factors = (!self.weighs_input).then_some(weights.data());
            dy_rows.read(0..assignments * hidden, |dy_rows| {
                sum_by_expert(dy_rows, factors, plan.offsets(), hidden, back.weight_sum(down_bias));
            });
            dgate_up.read(0..assignments * 2 * width, |dgate_up| {
                sum_by_expert(dgate_up, None, plan.offsets(), 2 * width, back.weight_sum(up_bias));
            });
        }
        let (ddown, beta) = back.weight(&self.down);
        let [dy_matrix, inner_matrix] = [dy_rows.matrix(hidden), inner.matrix(width)];
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
        let x_rows = self.rows_read(&rows, &Source::new(precision, rows.x), 0..assignments);
        let (dweight, beta) = back.weight(&self.gate_up);
        let [dgate_up, x_rows] = [dgate_up.matrix(2 * width), x_rows.matrix(hidden)];
        grouped_matmul_weight_gradient(precision, dgate_up, x_rows, plan.offsets(), dweight, beta);
    }

    /// From the slope by the layer's answer to what the gradients of weights and input are made of.
    ///
    /// A token's answer is Σ w down(inner): the slope of w is dy · down(inner), which is dinner · inner for dinner = dy down,
    /// so that the experts' answers need not be kept; and w, a number a row, goes with inner instead of dy.
    fn backward_in_chunks(
        &self,
        precision: Precision,
        keeps_packs: bool,
        dy: &[f32],
        rows: &Rows,
        gate_up: Stored,
        wants_input: bool,
    ) -> Slopes {
        let (plan, width, hidden) = (rows.plan, self.width, rows.hidden);
        // The biases' gradients are sums of the slopes themselves, not products of rounded ones.
        let stored_in = if self.biases.is_some() { Precision::F32 } else { precision };
        let len = |width: usize| plan.n_assignments() * width;
        let mut slopes = Slopes {
            dy_rows: Stored::scratch(true, stored_in, len(hidden)),
            inner: Stored::scratch(true, stored_in, len(width)),
            dgate_up: Stored::scratch(true, stored_in, len(2 * width)),
            dx_rows: Buffer::scratch(if wants_input { len(hidden) } else { 0 }),
            dweights: Buffer::scratch(len(1)),
        };
        let [up_matrices, down_matrices] =
            [&self.gate_up, &self.down].map(|weight| weight.lend_backward(precision, keeps_packs));
        let dy = Source::new(stored_in, dy);
        let chunks = chunks::cut(plan.offsets());
        chunks::for_each(slopes.tasks(&chunks, hidden, width), |task| {
            let Task { chunk, dy_rows, inner, dgate_up, dx_rows, dweights } = task;
            let (count, tokens) = (chunk.rows.len(), &plan.token()[chunk.rows.clone()]);
            let weights = &rows.weights[chunk.rows.clone()];
            let dropout = rows.dropout.map(|dropout| of_rows(dropout, chunk, width));
            dy.gather_into(hidden, tokens, dy_rows);
            let mut dinner = Buffer::scratch(count * width);
            product(matrix(dy_rows.as_ref(), hidden), &down_matrices[chunk.expert], &mut dinner);
            let saved = GatedSaved {
                gate: self.gate,
                f: width,
                gate_up: gate_up.numbers().part(chunk.rows.start * 2 * width..chunk.rows.end * 2 * width),
                factors: (!self.weighs_input).then_some(weights),
                dropout,
            };
            let gradients = GatedGradients {
                dgate_up: dgate_up.as_mut(),
                out: Some(inner.as_mut()),
                dfactors: (!self.weighs_input).then_some(&mut **dweights),
            };
            gates::gated_backward(&saved, &dinner, gradients);
            if wants_input {
                product(matrix(dgate_up.as_ref(), 2 * width), &up_matrices[chunk.expert], dx_rows);
            }
            if let (Some([_, bias]), NumbersMut::F32(dy_rows), false) = (&self.biases, &dy_rows, self.weighs_input) {
                let bias = of_expert(bias.value().data(), chunk, hidden);
                let of_bias = |dy: &[f32]| dy.iter().zip(bias).map(|(dy, bias)| dy * bias).sum::<f32>();
                dweights.iter_mut().zip(dy_rows.chunks_exact(hidden)).for_each(|(sum, dy)| *sum += of_bias(dy));
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

fn scale_rows(rows: &mut [f32], factors: &[f32], width: usize) {
    rows.chunks_exact_mut(width.max(1)).zip(factors).for_each(|(row, factor)| select::scale(row, *factor));
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
