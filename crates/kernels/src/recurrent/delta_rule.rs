//! The gated delta rule (Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule"):
//!
//! `S = exp(g) S`, `S += k ⊗ β (v - Sᵀ k)`, `o = Sᵀ q`: the state forgets, what it holds for the key gives way to the
//! value, and the query reads.
//!
//! Legend: `nk` key (and query) heads, `nv` value heads, `dk` and `dv` features of each. Value head `h` goes with key head
//! `h / (nv / nk)`.

use super::{States, check_starts, column_blocks, shared};
use crate::isa::Isa;
use crate::memory::Buffer;
use crate::parallel::DisjointMut;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::for_each_task;
use std::ops::Range;

/// Value features that one task of the forward takes: whole vectors.
const COLUMNS: usize = 64;
const VECTORS: usize = COLUMNS / LANES;
/// Tokens whose states the backward holds at once.
const CHUNK: usize = 32;

/// Heads and their features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaShape {
    /// Heads of keys and queries.
    pub key_heads: usize,
    /// Heads of values; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Features of a key.
    pub key_dim: usize,
    /// Features of a value.
    pub value_dim: usize,
}

impl DeltaShape {
    /// Numbers in a row of keys (and of queries).
    pub fn key_width(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Numbers in a row of values (and of outputs).
    pub fn value_width(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Numbers of a sequence's state, `[nv, dk, dv]`.
    pub fn state_len(&self) -> usize {
        self.value_heads * self.key_dim * self.value_dim
    }

    fn group(&self) -> usize {
        self.value_heads / self.key_heads
    }
}

/// What the rule reads.
#[derive(Clone, Copy, Debug)]
pub struct Delta<'a> {
    /// Heads and features.
    pub shape: DeltaShape,
    /// Queries `[t, nk * dk]`.
    pub q: &'a [f32],
    /// Keys `[t, nk * dk]`.
    pub k: &'a [f32],
    /// Values `[t, nv * dv]`.
    pub v: &'a [f32],
    /// Logarithms of what is kept of the state, `[t, nv]`, not positive.
    pub log_decay: &'a [f32],
    /// How much the state gives way, `[t, nv]`.
    pub beta: &'a [f32],
    /// `[sequences + 1]`
    pub sequence_starts: &'a [usize],
}

impl<'a> Delta<'a> {
    fn check(&self) {
        let shape = &self.shape;
        assert!(
            shape.key_heads > 0 && shape.value_heads.is_multiple_of(shape.key_heads),
            "heads that share: {shape:?}"
        );
        assert!(shape.key_dim > 0 && shape.value_dim > 0, "empty heads: {shape:?}");
        let tokens = self.v.len() / shape.value_width();
        assert!(self.v.len() == tokens * shape.value_width() && self.q.len() == tokens * shape.key_width());
        assert_eq!(self.q.len(), self.k.len(), "queries and keys");
        assert!([self.log_decay.len(), self.beta.len()] == [tokens * shape.value_heads; 2], "a gate for each head");
        check_starts(self.sequence_starts, tokens);
    }

    /// Query and key of a value head.
    fn query_and_key(&self, row: usize, head: usize) -> [&'a [f32]; 2] {
        let at = self.key_place(row, head / self.shape.group());
        [&self.q[at.clone()], &self.k[at]]
    }

    fn key_place(&self, row: usize, key_head: usize) -> Range<usize> {
        let at = row * self.shape.key_width() + key_head * self.shape.key_dim;
        at..at + self.shape.key_dim
    }

    fn value_place(&self, row: usize, head: usize) -> Range<usize> {
        let at = row * self.shape.value_width() + head * self.shape.value_dim;
        at..at + self.shape.value_dim
    }

    /// What is kept of the state, and beta.
    fn gates(&self, row: usize, head: usize) -> [f32; 2] {
        let at = row * self.shape.value_heads + head;
        [self.log_decay[at].exp(), self.beta[at]]
    }
}

/// Runs the rule over each sequence. With states (one a sequence, `[nv, dk, dv]`; none: zeros) it begins with those and
/// leaves the last in them.
///
/// # Shapes
/// `out` `[t, nv * dv]`.
pub fn gated_delta_rule(delta: &Delta<'_>, states: &mut [&mut [f32]], out: &mut [f32]) {
    gated_delta_rule_on(Isa::current(), delta, states, out);
}

fn gated_delta_rule_on(isa: Isa, delta: &Delta<'_>, states: &mut [&mut [f32]], out: &mut [f32]) {
    delta.check();
    let (shape, sequences) = (&delta.shape, delta.sequence_starts.len().saturating_sub(1));
    assert_eq!(out.len(), delta.v.len());
    assert!(states.is_empty() || states.len() == sequences, "a state for each sequence");
    assert!(states.iter().all(|state| state.len() == shape.state_len()), "numbers of a state");
    let (states, out) = (shared(states), DisjointMut::new(out));
    let blocks = shape.value_dim.div_ceil(COLUMNS);
    let columns = column_blocks(shape.value_dim, COLUMNS);
    for_each_task(sequences * shape.value_heads * blocks, delta.v.len() * shape.key_dim / 2, |task| {
        let (sequence, task) = (task / (shape.value_heads * blocks), task % (shape.value_heads * blocks));
        let (head, columns) = (task / blocks, columns(task % blocks));
        dispatch(isa, Forward { delta, states: &states, sequence, head, columns, out: &out });
    });
}

/// One head of one sequence, some features of the values: the columns of the state do not know of each other.
struct Forward<'a> {
    delta: &'a Delta<'a>,
    states: &'a States<'a>,
    sequence: usize,
    head: usize,
    columns: Range<usize>,
    out: &'a DisjointMut<'a, f32>,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { delta, head, columns, .. } = &self;
        let shape = &delta.shape;
        let kept = |i: usize| {
            let at = (head * shape.key_dim + i) * shape.value_dim;
            at + columns.start..at + columns.end
        };
        let mut state = Buffer::<f32>::zeroed(shape.key_dim * COLUMNS);
        if let Some(before) = self.states.get(self.sequence) {
            for (i, row) in state.chunks_exact_mut(COLUMNS).enumerate() {
                // SAFETY: this task alone has these columns of this head.
                row[..columns.len()].copy_from_slice(unsafe { before.range(kept(i)) });
            }
        }
        for row in delta.sequence_starts[self.sequence]..delta.sequence_starts[self.sequence + 1] {
            let at = delta.value_place(row, *head).start;
            let place = at + columns.start..at + columns.end;
            let mut value = [0.0; COLUMNS];
            value[..columns.len()].copy_from_slice(&delta.v[place.clone()]);
            step(simd, &mut state, delta.query_and_key(row, *head), &mut value, delta.gates(row, *head));
            // SAFETY: this task alone has these columns of this head.
            unsafe { self.out.range(place) }.copy_from_slice(&value[..columns.len()]);
        }
        if let Some(after) = self.states.get(self.sequence) {
            for (i, row) in state.chunks_exact(COLUMNS).enumerate() {
                // SAFETY: this task alone has these columns of this head.
                unsafe { after.range(kept(i)) }.copy_from_slice(&row[..columns.len()]);
            }
        }
    }
}

/// One token: moves the state `[dk, COLUMNS]` on and replaces the value by what the query reads.
#[inline(always)]
fn step<S: Simd>(simd: S, state: &mut [f32], [q, k]: [&[f32]; 2], value: &mut [f32; COLUMNS], [decay, beta]: [f32; 2]) {
    let splat = |x| Lanes::splat(simd, x);
    let (decay, beta) = (splat(decay), splat(beta));
    let (state, _) = state.as_chunks_mut::<LANES>();
    let (value, _) = value.as_chunks_mut::<LANES>();
    let mut held = [splat(0.0); VECTORS];
    for (row, &k) in state.chunks_exact_mut(VECTORS).zip(k) {
        let k = splat(k);
        for (lanes, held) in row.iter_mut().zip(&mut held) {
            let faded = Lanes::load(simd, lanes) * decay;
            *held = k.fma(faded, *held);
            faded.store(lanes);
        }
    }
    let mut change = [splat(0.0); VECTORS];
    for ((change, value), held) in change.iter_mut().zip(&*value).zip(held) {
        *change = (Lanes::load(simd, value) - held) * beta;
    }
    let mut read = [splat(0.0); VECTORS];
    for ((row, &k), &q) in state.chunks_exact_mut(VECTORS).zip(k).zip(q) {
        let (k, q) = (splat(k), splat(q));
        for ((lanes, change), read) in row.iter_mut().zip(change).zip(&mut read) {
            let now = k.fma(change, Lanes::load(simd, lanes));
            *read = q.fma(now, *read);
            now.store(lanes);
        }
    }
    read.into_iter().zip(value).for_each(|(read, value)| read.store(value));
}

/// Where the gradients of the rule are added.
#[derive(Debug)]
pub struct DeltaGradients<'a> {
    /// `[t, nk * dk]`
    pub q: &'a mut [f32],
    /// `[t, nk * dk]`
    pub k: &'a mut [f32],
    /// `[t, nv * dv]`
    pub v: &'a mut [f32],
    /// `[t, nv]`
    pub log_decay: &'a mut [f32],
    /// `[t, nv]`
    pub beta: &'a mut [f32],
}

/// Adds the gradients of [`gated_delta_rule`] of whole sequences, which begins with zeros.
///
/// # Shapes
/// `dout` `[t, nv * dv]`.
pub fn gated_delta_rule_backward(delta: &Delta<'_>, dout: &[f32], gradients: DeltaGradients<'_>) {
    gated_delta_rule_backward_on(Isa::current(), delta, dout, gradients);
}

fn gated_delta_rule_backward_on(isa: Isa, delta: &Delta<'_>, dout: &[f32], gradients: DeltaGradients<'_>) {
    delta.check();
    let DeltaGradients { q, k, v, log_decay, beta } = gradients;
    assert!(dout.len() == delta.v.len() && v.len() == dout.len());
    assert!(q.len() == delta.q.len() && k.len() == q.len());
    assert!(log_decay.len() == delta.beta.len() && beta.len() == log_decay.len());
    let [q, k, v, log_decay, beta] = [q, k, v, log_decay, beta].map(DisjointMut::new);
    let sums = Sums { q: &q, k: &k, v: &v, log_decay: &log_decay, beta: &beta };
    let (heads, sequences) = (delta.shape.key_heads, delta.sequence_starts.len().saturating_sub(1));
    // One task has one key head, because its value heads add to the same gradients.
    for_each_task(sequences * heads, 4 * delta.v.len() * delta.shape.key_dim, |task| {
        let bounds = &delta.sequence_starts[task / heads..][..2];
        dispatch(isa, Backward { delta, dout, rows: bounds[0]..bounds[1], key_head: task % heads, sums });
    });
}

#[derive(Clone, Copy)]
struct Sums<'a> {
    q: &'a DisjointMut<'a, f32>,
    k: &'a DisjointMut<'a, f32>,
    v: &'a DisjointMut<'a, f32>,
    log_decay: &'a DisjointMut<'a, f32>,
    beta: &'a DisjointMut<'a, f32>,
}

/// One key head of one sequence.
struct Backward<'a> {
    delta: &'a Delta<'a>,
    dout: &'a [f32],
    rows: Range<usize>,
    key_head: usize,
    sums: Sums<'a>,
}

/// `Σ a b` of whole vectors.
#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = Lanes::splat(simd, 0.0);
    for (a, b) in a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0) {
        sum = Lanes::load(simd, a).fma(Lanes::load(simd, b), sum);
    }
    sum.sum()
}

/// `sum += factor * x` of whole vectors.
#[inline(always)]
fn scaled_add<S: Simd>(simd: S, factor: f32, x: &[f32], sum: &mut [f32]) {
    let factor = Lanes::splat(simd, factor);
    for (x, sum) in x.as_chunks::<LANES>().0.iter().zip(sum.as_chunks_mut::<LANES>().0) {
        factor.fma(Lanes::load(simd, x), Lanes::load(simd, sum)).store(sum);
    }
}

/// `x *= factor` of whole vectors.
#[inline(always)]
fn scale<S: Simd>(simd: S, factor: f32, x: &mut [f32]) {
    for x in x.as_chunks_mut::<LANES>().0 {
        (Lanes::splat(simd, factor) * Lanes::load(simd, x)).store(x);
    }
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let shape = &self.delta.shape;
        for head in self.key_head * shape.group()..(self.key_head + 1) * shape.group() {
            self.value_head(simd, head);
        }
    }
}

impl Backward<'_> {
    /// Goes forward keeping the state before each chunk, then back chunk by chunk.
    #[inline(always)]
    fn value_head<S: Simd>(&self, simd: S, head: usize) {
        let shape = &self.delta.shape;
        let width = shape.value_dim.next_multiple_of(LANES);
        let size = shape.key_dim * width;
        let chunks = self.rows.len().div_ceil(CHUNK);
        let mut kept = Buffer::<f32>::zeroed((chunks + 1) * size);
        let mut change = vec![0.0; width];
        for chunk in 0..chunks {
            let (before, after) = kept[chunk * size..].split_at_mut(size);
            let after = &mut after[..size];
            after.copy_from_slice(before);
            for row in self.chunk(chunk) {
                self.advance(simd, row, head, after, &mut change);
            }
        }
        let mut dstate = Buffer::<f32>::zeroed(size);
        let mut states = Buffer::<f32>::zeroed((CHUNK + 1) * size);
        for chunk in (0..chunks).rev() {
            states[..size].copy_from_slice(&kept[chunk * size..][..size]);
            for (i, row) in self.chunk(chunk).enumerate() {
                let (before, after) = states[i * size..].split_at_mut(size);
                after[..size].copy_from_slice(before);
                self.advance(simd, row, head, &mut after[..size], &mut change);
            }
            for (i, row) in self.chunk(chunk).enumerate().rev() {
                let (before, after) = states[i * size..].split_at(size);
                self.step_back(simd, row, head, [before, &after[..size]], &mut dstate);
            }
        }
    }

    fn chunk(&self, chunk: usize) -> Range<usize> {
        let first = self.rows.start + chunk * CHUNK;
        first..self.rows.end.min(first + CHUNK)
    }

    /// The row's value, padded.
    #[inline(always)]
    fn value(&self, x: &[f32], row: usize, head: usize) -> Vec<f32> {
        let mut value = x[self.delta.value_place(row, head)].to_vec();
        value.resize(value.len().next_multiple_of(LANES), 0.0);
        value
    }

    /// Moves the state `[dk, width]` on by one token; leaves v - Sᵀ k in `error`.
    #[inline(always)]
    fn advance<S: Simd>(&self, simd: S, row: usize, head: usize, state: &mut [f32], error: &mut [f32]) {
        let width = error.len();
        let ([_, k], [decay, beta]) = (self.delta.query_and_key(row, head), self.delta.gates(row, head));
        error.copy_from_slice(&self.value(self.delta.v, row, head));
        for (state, &k) in state.chunks_exact_mut(width).zip(k) {
            scale(simd, decay, state);
            scaled_add(simd, -k, state, error);
        }
        for (state, &k) in state.chunks_exact_mut(width).zip(k) {
            scaled_add(simd, k * beta, error, state);
        }
    }

    /// Takes the gradient of the state after a token to that of the state before it, and adds the token's gradients.
    #[inline(always)]
    fn step_back<S: Simd>(&self, simd: S, row: usize, head: usize, [before, after]: [&[f32]; 2], dstate: &mut [f32]) {
        let delta = self.delta;
        let ([q, k], [decay, beta]) = (delta.query_and_key(row, head), delta.gates(row, head));
        let dout = self.value(self.dout, row, head);
        let width = dout.len();
        let mut error = self.value(delta.v, row, head);
        for (before, &k) in before.chunks_exact(width).zip(k) {
            scaled_add(simd, -k * decay, before, &mut error);
        }
        let place = delta.key_place(row, self.key_head);
        // SAFETY: this task alone has this key head of this sequence, and its value heads.
        let (dq, dk) = unsafe { (self.sums.q.range(place.clone()), self.sums.k.range(place)) };
        // dchange = (dS)ᵀ k, where change = β error enters the state by the key.
        let mut dchange = vec![0.0; width];
        for (i, dstate) in dstate.chunks_exact_mut(width).enumerate() {
            dq[i] += dot(simd, &after[i * width..][..width], &dout);
            scaled_add(simd, q[i], &dout, dstate);
            scaled_add(simd, k[i], dstate, &mut dchange);
            dk[i] += beta * dot(simd, dstate, &error);
        }
        let dbeta = dot(simd, &dchange, &error);
        let mut derror = dchange;
        scale(simd, beta, &mut derror);
        let mut ddecay = 0.0;
        for (i, (dstate, before)) in dstate.chunks_exact_mut(width).zip(before.chunks_exact(width)).enumerate() {
            dk[i] -= decay * dot(simd, before, &derror);
            scaled_add(simd, -k[i], &derror, dstate);
            ddecay += dot(simd, before, dstate);
            scale(simd, decay, dstate);
        }
        let gate = row * delta.shape.value_heads + head;
        let place = delta.value_place(row, head);
        // SAFETY: as above.
        unsafe {
            self.sums.v.range(place).iter_mut().zip(&derror).for_each(|(sum, d)| *sum += d);
            self.sums.log_decay.range(gate..gate + 1)[0] += decay * ddecay;
            self.sums.beta.range(gate..gate + 1)[0] += dbeta;
        }
    }
}

/// The plain loop that [`gated_delta_rule`] is compared with, in f64.
pub fn gated_delta_rule_reference(delta: &Delta<'_>, states: &mut [&mut [f32]], out: &mut [f32]) {
    let DeltaShape { value_heads, key_dim, value_dim, .. } = delta.shape;
    for (sequence, bounds) in delta.sequence_starts.windows(2).enumerate() {
        for head in 0..value_heads {
            let part = head * key_dim * value_dim..(head + 1) * key_dim * value_dim;
            let mut state: Vec<f64> = match states.get(sequence) {
                Some(state) => state[part.clone()].iter().map(|&x| f64::from(x)).collect(),
                None => vec![0.0; part.len()],
            };
            for row in bounds[0]..bounds[1] {
                let [q, k] = delta.query_and_key(row, head);
                let at = row * value_heads + head;
                state.iter_mut().for_each(|x| *x *= f64::from(delta.log_decay[at]).exp());
                let place = delta.value_place(row, head);
                for (column, (value, out)) in delta.v[place.clone()].iter().zip(&mut out[place]).enumerate() {
                    let held: f64 = (0..key_dim).map(|i| f64::from(k[i]) * state[i * value_dim + column]).sum();
                    let change = f64::from(delta.beta[at]) * (f64::from(*value) - held);
                    (0..key_dim).for_each(|i| state[i * value_dim + column] += f64::from(k[i]) * change);
                    *out = (0..key_dim).map(|i| f64::from(q[i]) * state[i * value_dim + column]).sum::<f64>() as f32;
                }
            }
            if let Some(kept) = states.get_mut(sequence) {
                kept[part].iter_mut().zip(state).for_each(|(kept, x)| *kept = x as f32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bits, check, numbers};

    /// Writes the last states over the first ones, and what comes out.
    type Step<'a> = dyn Fn(&mut [&mut [f32]], &mut [f32]) + 'a;

    const STARTS: [usize; 4] = [0, 2, 2, 41];

    struct Data(DeltaShape, [Vec<f32>; 5]);

    impl Data {
        fn new(shape: DeltaShape) -> Self {
            let small = |seed, count| numbers(seed, count).iter().map(|x| 0.5 * x).collect();
            let (keys, heads) = (41 * shape.key_width(), 41 * shape.value_heads);
            let decays = numbers(4, heads).iter().map(|x| x - 1.0).collect();
            let betas = numbers(5, heads).iter().map(|x| 0.5 * (x + 1.0)).collect();
            Self(shape, [small(1, keys), small(2, keys), numbers(3, 41 * shape.value_width()), decays, betas])
        }

        fn delta(&self) -> Delta<'_> {
            let [q, k, v, log_decay, beta] = &self.1;
            Delta { shape: self.0, q, k, v, log_decay, beta, sequence_starts: &STARTS }
        }
    }

    fn shapes() -> [DeltaShape; 3] {
        [[1, 1, 1, 1], [2, 4, 8, 8], [1, 2, 17, 70]].map(|[key_heads, value_heads, key_dim, value_dim]| DeltaShape {
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        })
    }

    #[test]
    fn forward_is_the_reference() {
        for shape in shapes() {
            let data = Data::new(shape);
            let run = |of: &Step<'_>| {
                let mut out = vec![0.0; data.delta().v.len()];
                let mut states: Vec<Vec<f32>> = (0..3).map(|seed| numbers(7 + seed, shape.state_len())).collect();
                of(&mut states.iter_mut().map(|state| &mut state[..]).collect::<Vec<_>>(), &mut out);
                [vec![out], states].concat()
            };
            let wanted = run(&|states, out| gated_delta_rule_reference(&data.delta(), states, out));
            check(&wanted, 1e-5, |isa| run(&|states, out| gated_delta_rule_on(isa, &data.delta(), states, out)));
        }
    }

    #[test]
    fn pieces_give_the_bits_of_the_whole() {
        let data = Data::new(shapes()[2]);
        let (shape, whole_of) = (data.0, Delta { sequence_starts: &[0, 41], ..data.delta() });
        let mut whole = vec![0.0; whole_of.v.len()];
        gated_delta_rule(&whole_of, &mut [], &mut whole);
        for pieces in [&[41][..], &[1; 41], &[6, 0, 33, 2]] {
            let (mut state, mut out, mut first) = (vec![0.0; shape.state_len()], vec![0.0; whole.len()], 0);
            for &piece in pieces {
                let of = |x, width| crate::tasks::rows(x, &(first..first + piece), width);
                let delta = Delta {
                    shape,
                    q: of(whole_of.q, shape.key_width()),
                    k: of(whole_of.k, shape.key_width()),
                    v: of(whole_of.v, shape.value_width()),
                    log_decay: of(whole_of.log_decay, shape.value_heads),
                    beta: of(whole_of.beta, shape.value_heads),
                    sequence_starts: &[0, piece],
                };
                let part = first * shape.value_width()..(first + piece) * shape.value_width();
                gated_delta_rule(&delta, &mut [&mut state], &mut out[part]);
                first += piece;
            }
            assert_eq!(bits(&out), bits(&whole), "{pieces:?}");
        }
    }

    #[test]
    fn backward_is_the_same_bits_everywhere_and_adds() {
        // Its values are compared with finite differences where the operation stands.
        for shape in shapes() {
            let data = Data::new(shape);
            let dout = numbers(8, data.delta().v.len());
            let run = |isa, start: f32| {
                let mut found: Vec<Vec<f32>> = data.1.iter().map(|x| vec![start; x.len()]).collect();
                let [q, k, v, log_decay, beta] = found.get_disjoint_mut([0, 1, 2, 3, 4]).unwrap();
                let gradients = DeltaGradients { q, k, v, log_decay, beta };
                gated_delta_rule_backward_on(isa, &data.delta(), &dout, gradients);
                found
            };
            let fresh = run(Isa::Portable, 0.0);
            check(&fresh, 0.0, |isa| run(isa, 0.0));
            let added: Vec<Vec<f32>> = fresh.iter().map(|x| x.iter().map(|x| x + 0.5).collect()).collect();
            check(&added, 1e-5, |isa| run(isa, 0.5));
        }
    }
}
