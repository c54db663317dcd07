//! Attention whose scores have a bias for the distance between query and key, as T5's (Raffel et al. 2020): over all
//! positions or those up to the query's, of its own sequence or of another one.
//!
//! A row's arithmetic depends on its own query and the keys that it sees alone, one after the other: so the bits are the
//! same however the rows are cut into calls.
//!
//! Legend: `nh` heads, `hd` features of each, `span` distances that have a bias.

use crate::isa::Isa;
use crate::memory::Buffer;
use crate::parallel::DisjointMut;
use crate::simd::math::{exp_nonpositive, largest, sum_of_exponentials, sum_of_products};
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::for_each_task;
use std::ops::Range;

/// Rows that one task of the forward takes.
const ROWS: usize = 16;

/// What does not change between calls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BiasedShape {
    /// Heads of queries, keys and values.
    pub n_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// What the scores are multiplied with.
    pub scale: f32,
    /// Whether a query sees the keys up to its own position only.
    pub causal: bool,
}

impl BiasedShape {
    /// Numbers in a row of queries, keys or values.
    pub fn width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    fn head(&self, row: usize, head: usize) -> Range<usize> {
        let at = row * self.width() + head * self.head_dim;
        at..at + self.head_dim
    }
}

/// What is added to the scores: for head `h` and a key `d` positions after its query, `values[h * span + zero + d]`.
#[derive(Clone, Copy, Debug)]
pub struct DistanceBias<'a> {
    /// `[nh, span]`
    pub values: &'a [f32],
    /// Distances there are.
    pub span: usize,
    /// Where the distance 0 is.
    pub zero: usize,
}

impl<'a> DistanceBias<'a> {
    /// The places of `keys` keys' biases for the query at `position`.
    fn places(&self, head: usize, position: usize, keys: usize) -> Range<usize> {
        assert!(self.zero >= position && self.zero - position + keys <= self.span, "distances without a bias");
        let at = head * self.span + self.zero - position;
        at..at + keys
    }

    fn of(&self, head: usize, position: usize, keys: usize) -> &'a [f32] {
        &self.values[self.places(head, position, keys)]
    }
}

/// Some rows of queries and what they attend to.
#[derive(Clone, Copy, Debug)]
pub struct Attending<'a> {
    /// `[rows, nh * hd]`
    pub q: &'a [f32],
    /// The position of the first row.
    pub first_position: usize,
    /// `[keys, nh * hd]`, from position 0 on.
    pub k: &'a [f32],
    /// As the keys.
    pub v: &'a [f32],
}

impl Attending<'_> {
    fn rows(&self, shape: &BiasedShape) -> usize {
        self.q.len() / shape.width()
    }

    /// How many keys a row sees.
    fn visible(&self, shape: &BiasedShape, row: usize) -> usize {
        let keys = self.k.len() / shape.width();
        if shape.causal { keys.min(self.first_position + row + 1) } else { keys }
    }

    fn check(&self, shape: &BiasedShape) {
        assert!(shape.width() > 0 && self.q.len().is_multiple_of(shape.width()), "rows of {} numbers", shape.width());
        assert!(self.k.len() == self.v.len() && self.k.len().is_multiple_of(shape.width()), "keys and values");
        let (rows, keys) = (self.rows(shape), self.k.len() / shape.width());
        assert!(rows == 0 || keys > 0, "nothing to attend to");
        assert!(!shape.causal || rows == 0 || keys >= self.first_position + rows, "fewer keys than positions");
    }
}

/// Attention of all sequences; their rows follow each other in `out`.
///
/// # Shapes
/// `out` `[rows of all sequences, nh * hd]`.
pub fn biased_attention(
    shape: &BiasedShape,
    bias: Option<&DistanceBias<'_>>,
    sequences: &[Attending<'_>],
    out: &mut [f32],
) {
    biased_attention_on(Isa::current(), shape, bias, sequences, out);
}

fn biased_attention_on(
    isa: Isa,
    shape: &BiasedShape,
    bias: Option<&DistanceBias<'_>>,
    sequences: &[Attending<'_>],
    out: &mut [f32],
) {
    let (mut tasks, mut first_row, mut work) = (Vec::new(), 0, 0);
    for sequence in sequences {
        sequence.check(shape);
        let rows = sequence.rows(shape);
        for (head, start) in (0..shape.n_heads).flat_map(|head| (0..rows).step_by(ROWS).map(move |row| (head, row))) {
            tasks.push((sequence, head, start..rows.min(start + ROWS), first_row));
        }
        (first_row, work) = (first_row + rows, work + rows * sequence.k.len());
    }
    assert_eq!(out.len(), first_row * shape.width(), "rows of all sequences");
    let out = DisjointMut::new(out);
    for_each_task(tasks.len(), work / 4, |task| {
        let (sequence, head, rows, first_row) = tasks[task].clone();
        dispatch(isa, Forward { shape, bias, sequence, head, rows, first_row, out: &out });
    });
}

struct Forward<'a> {
    shape: &'a BiasedShape,
    bias: Option<&'a DistanceBias<'a>>,
    sequence: &'a Attending<'a>,
    head: usize,
    rows: Range<usize>,
    first_row: usize,
    out: &'a DisjointMut<'a, f32>,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (shape, head) = (self.shape, self.head);
        let mut weights = Buffer::<f32>::scratch(self.sequence.k.len() / shape.width());
        for row in self.rows {
            let weights = &mut weights[..self.sequence.visible(shape, row)];
            probabilities(simd, shape, self.bias, self.sequence, row, head, weights);
            // SAFETY: this task alone writes these rows of this head.
            let out = unsafe { self.out.range(shape.head(self.first_row + row, head)) };
            out.fill(0.0);
            for (key, &weight) in weights.iter().enumerate() {
                scaled_add(simd, weight, &self.sequence.v[shape.head(key, head)], out);
            }
        }
    }
}

/// The softmax of one row's scores.
#[inline(always)]
fn probabilities<S: Simd>(
    simd: S,
    shape: &BiasedShape,
    bias: Option<&DistanceBias<'_>>,
    sequence: &Attending<'_>,
    row: usize,
    head: usize,
    scores: &mut [f32],
) {
    let q = &sequence.q[shape.head(row, head)];
    for (key, score) in scores.iter_mut().enumerate() {
        *score = sum_of_products(simd, q, &sequence.k[shape.head(key, head)]) * shape.scale;
    }
    if let Some(bias) = bias {
        let bias = bias.of(head, sequence.first_position + row, scores.len());
        scores.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
    }
    let top = largest(simd, scores);
    let share = Lanes::splat(simd, 1.0 / sum_of_exponentials(simd, scores, top));
    for scores in scores.chunks_mut(LANES) {
        let above = Lanes::load_any(simd, scores, top) - Lanes::splat(simd, top);
        (exp_nonpositive(above) * share).store_any(scores);
    }
}

/// `sum += factor * x`.
#[inline(always)]
fn scaled_add<S: Simd>(simd: S, factor: f32, x: &[f32], sum: &mut [f32]) {
    let factor = Lanes::splat(simd, factor);
    for (x, sum) in x.chunks(LANES).zip(sum.chunks_mut(LANES)) {
        factor.fma(Lanes::load_any(simd, x, 0.0), Lanes::load_any(simd, sum, 0.0)).store_any(sum);
    }
}

/// What the backward reads: queries of some sequences, keys and values of others (or the same), all from position 0.
#[derive(Clone, Copy, Debug)]
pub struct BiasedInputs<'a> {
    /// `[query rows, nh * hd]`
    pub q: &'a [f32],
    /// `[key rows, nh * hd]`
    pub k: &'a [f32],
    /// `[key rows, nh * hd]`
    pub v: &'a [f32],
    /// `[sequences + 1]` in rows of queries.
    pub query_starts: &'a [usize],
    /// `[sequences + 1]` in rows of keys.
    pub key_starts: &'a [usize],
}

impl<'a> BiasedInputs<'a> {
    /// Each sequence with what it attends to.
    ///
    /// # Panics
    /// If there are not as many of queries as of keys.
    pub fn sequences(&self, shape: &BiasedShape) -> Vec<Attending<'a>> {
        assert_eq!(self.query_starts.len(), self.key_starts.len(), "sequences of queries and of keys");
        let rows = |x: &'a [f32], bounds: &[usize]| &x[bounds[0] * shape.width()..bounds[1] * shape.width()];
        let bounds = self.query_starts.windows(2).zip(self.key_starts.windows(2));
        bounds
            .map(|(queries, keys)| Attending {
                q: rows(self.q, queries),
                first_position: 0,
                k: rows(self.k, keys),
                v: rows(self.v, keys),
            })
            .collect()
    }
}

/// Where the gradients of attention are added.
#[derive(Debug)]
pub struct BiasedGradients<'a> {
    /// As the queries.
    pub q: &'a mut [f32],
    /// As the keys.
    pub k: &'a mut [f32],
    /// As the values.
    pub v: &'a mut [f32],
    /// As the bias, or nothing without one.
    pub bias: &'a mut [f32],
}

/// Adds the gradients of [`biased_attention`].
///
/// # Shapes
/// `dout` as the queries.
pub fn biased_attention_backward(
    shape: &BiasedShape,
    bias: Option<&DistanceBias<'_>>,
    inputs: &BiasedInputs<'_>,
    dout: &[f32],
    gradients: BiasedGradients<'_>,
) {
    biased_attention_backward_on(Isa::current(), shape, bias, inputs, dout, gradients);
}

fn biased_attention_backward_on(
    isa: Isa,
    shape: &BiasedShape,
    bias: Option<&DistanceBias<'_>>,
    inputs: &BiasedInputs<'_>,
    dout: &[f32],
    gradients: BiasedGradients<'_>,
) {
    let sequences = inputs.sequences(shape);
    sequences.iter().for_each(|sequence| sequence.check(shape));
    assert!(dout.len() == inputs.q.len() && gradients.q.len() == dout.len());
    assert!(gradients.k.len() == inputs.k.len() && gradients.v.len() == inputs.v.len());
    let span = bias.map_or(0, |bias| bias.span);
    assert_eq!(gradients.bias.len(), shape.n_heads * span, "a gradient for each bias");
    // Sequences share the biases: each has sums of its own, which meet in their order.
    let mut partial = Buffer::<f32>::zeroed(sequences.len() * shape.n_heads * span);
    {
        let [q, k, v] = [gradients.q, gradients.k, gradients.v].map(DisjointMut::new);
        let partial = DisjointMut::new(&mut partial);
        let work: usize = sequences.iter().map(|sequence| sequence.rows(shape) * sequence.k.len()).sum();
        for_each_task(sequences.len() * shape.n_heads, work, |task| {
            let (sequence, head) = (task / shape.n_heads, task % shape.n_heads);
            // SAFETY: each task has its own sums.
            let biases = unsafe { partial.range(task * span..(task + 1) * span) };
            let starts = [inputs.query_starts[sequence], inputs.key_starts[sequence]];
            let attending = &sequences[sequence];
            dispatch(isa, Backward { shape, bias, attending, head, dout, starts, q: &q, k: &k, v: &v, biases });
        });
    }
    for sums in partial.chunks_exact((shape.n_heads * span).max(1)) {
        gradients.bias.iter_mut().zip(sums).for_each(|(sum, part)| *sum += part);
    }
}

/// One head of one sequence.
struct Backward<'a> {
    shape: &'a BiasedShape,
    bias: Option<&'a DistanceBias<'a>>,
    attending: &'a Attending<'a>,
    head: usize,
    dout: &'a [f32],
    /// The first rows of queries and of keys.
    starts: [usize; 2],
    q: &'a DisjointMut<'a, f32>,
    k: &'a DisjointMut<'a, f32>,
    v: &'a DisjointMut<'a, f32>,
    /// `[span]`
    biases: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { shape, attending, head, starts: [first_query, first_key], .. } = self;
        let keys = attending.k.len() / shape.width();
        let (mut weights, mut slopes) = (Buffer::<f32>::scratch(keys), Buffer::<f32>::scratch(keys));
        for row in 0..attending.rows(shape) {
            let visible = attending.visible(shape, row);
            let (weights, slopes) = (&mut weights[..visible], &mut slopes[..visible]);
            probabilities(simd, shape, self.bias, attending, row, head, weights);
            let dout = &self.dout[shape.head(first_query + row, head)];
            for (key, slope) in slopes.iter_mut().enumerate() {
                *slope = sum_of_products(simd, dout, &attending.v[shape.head(key, head)]);
            }
            let mean = sum_of_products(simd, weights, slopes);
            slopes.iter_mut().zip(&*weights).for_each(|(slope, weight)| *slope = weight * (*slope - mean));
            if let Some(bias) = self.bias {
                let places = bias.places(0, row, visible);
                self.biases[places].iter_mut().zip(&*slopes).for_each(|(sum, slope)| *sum += slope);
            }
            let q = &attending.q[shape.head(row, head)];
            // SAFETY: this task alone has this head of this sequence.
            let dq = unsafe { self.q.range(shape.head(first_query + row, head)) };
            for (key, (&weight, &slope)) in weights.iter().zip(&*slopes).enumerate() {
                let place = shape.head(first_key + key, head);
                // SAFETY: as above.
                let (dk, dv) = unsafe { (self.k.range(place.clone()), self.v.range(place)) };
                scaled_add(simd, slope * shape.scale, &attending.k[shape.head(key, head)], dq);
                scaled_add(simd, slope * shape.scale, q, dk);
                scaled_add(simd, weight, dout, dv);
            }
        }
    }
}

/// The plain loop that [`biased_attention`] is compared with, in f64.
pub fn biased_attention_reference(
    shape: &BiasedShape,
    bias: Option<&DistanceBias<'_>>,
    sequences: &[Attending<'_>],
    out: &mut [f32],
) {
    let mut first_row = 0;
    for sequence in sequences {
        for (row, head) in (0..sequence.rows(shape)).flat_map(|row| (0..shape.n_heads).map(move |head| (row, head))) {
            let q = &sequence.q[shape.head(row, head)];
            let visible = sequence.visible(shape, row);
            let exponentials: Vec<f64> = (0..visible)
                .map(|key| {
                    let k = &sequence.k[shape.head(key, head)];
                    let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                    let bias = bias.map_or(0.0, |bias| bias.of(head, sequence.first_position + row, visible)[key]);
                    (dot * f64::from(shape.scale) + f64::from(bias)).exp()
                })
                .collect();
            let sum: f64 = exponentials.iter().sum();
            for (i, out) in out[shape.head(first_row + row, head)].iter_mut().enumerate() {
                let terms = exponentials.iter().enumerate();
                let mixed: f64 = terms.map(|(key, e)| e * f64::from(sequence.v[shape.head(key, head)][i])).sum();
                *out = (mixed / sum) as f32;
            }
        }
        first_row += sequence.rows(shape);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bits, check, numbers};

    fn shape(causal: bool) -> BiasedShape {
        BiasedShape { n_heads: 3, head_dim: 18, scale: 0.7, causal }
    }

    #[test]
    fn forward_is_the_reference() {
        let width = shape(false).width();
        let (q, k, v) = (numbers(1, 40 * width), numbers(2, 45 * width), numbers(3, 45 * width));
        let values = numbers(4, 3 * 100);
        for (causal, key_starts) in [(false, [0, 5, 5, 45]), (true, [0, 3, 3, 40])] {
            let queries = [0, 3, 3, 40];
            let inputs = BiasedInputs { q: &q, k: &k, v: &v, query_starts: &queries, key_starts: &key_starts };
            let bias = DistanceBias { values: &values, span: 100, zero: 50 };
            let (shape, sequences) = (shape(causal), inputs.sequences(&shape(causal)));
            for bias in [None, Some(&bias)] {
                let mut wanted = vec![0.0; q.len()];
                biased_attention_reference(&shape, bias, &sequences, &mut wanted);
                check(&[wanted], 1e-6, |isa| {
                    let mut out = vec![f32::NAN; q.len()];
                    biased_attention_on(isa, &shape, bias, &sequences, &mut out);
                    vec![out]
                });
            }
        }
    }

    #[test]
    fn rows_one_by_one_are_the_bits_of_all_at_once() {
        let shape = shape(true);
        let width = shape.width();
        let (q, k, v) = (numbers(1, 37 * width), numbers(2, 37 * width), numbers(3, 37 * width));
        let values = numbers(4, 3 * 80);
        let bias = DistanceBias { values: &values, span: 80, zero: 40 };
        let run = |rows: Range<usize>| {
            let mut out = vec![0.0; rows.len() * width];
            let seen = ..rows.end * width;
            let q = &q[rows.start * width..rows.end * width];
            let sequence = Attending { q, first_position: rows.start, k: &k[seen], v: &v[seen] };
            biased_attention(&shape, Some(&bias), &[sequence], &mut out);
            out
        };
        let whole = run(0..37);
        assert_eq!(bits(&(0..37).flat_map(|row| run(row..row + 1)).collect::<Vec<_>>()), bits(&whole));
        assert_eq!(bits(&[run(0..20), run(20..37)].concat()), bits(&whole));
    }

    #[test]
    fn backward_is_the_same_bits_everywhere_and_adds() {
        // Its values are compared with finite differences where the operation stands.
        let shape = shape(true);
        let width = shape.width();
        let (q, k, v) = (numbers(1, 20 * width), numbers(2, 20 * width), numbers(3, 20 * width));
        let (values, dout) = (numbers(4, 3 * 50), numbers(5, 20 * width));
        let bias = DistanceBias { values: &values, span: 50, zero: 25 };
        let inputs = BiasedInputs { q: &q, k: &k, v: &v, query_starts: &[0, 7, 20], key_starts: &[0, 7, 20] };
        let run = |isa, start: f32| {
            let mut found: Vec<Vec<f32>> = [&q, &k, &v, &values].iter().map(|x| vec![start; x.len()]).collect();
            let [q, k, v, biases] = found.get_disjoint_mut([0, 1, 2, 3]).unwrap();
            let gradients = BiasedGradients { q, k, v, bias: biases };
            biased_attention_backward_on(isa, &shape, Some(&bias), &inputs, &dout, gradients);
            found
        };
        let fresh = run(Isa::Portable, 0.0);
        check(&fresh, 0.0, |isa| run(isa, 0.0));
        let added: Vec<Vec<f32>> = fresh.iter().map(|x| x.iter().map(|x| x + 0.5).collect()).collect();
        check(&added, 1e-6, |isa| run(isa, 0.5));
    }
}
