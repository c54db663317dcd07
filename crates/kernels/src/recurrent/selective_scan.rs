//! The selective scan of Mamba (Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"):
//!
//! `h[n] = exp(Δ A[n]) h[n] + Δ B[n] u`, `y = Σ_n C[n] h[n] + D u`, for each channel by itself.
//!
//! Legend: `c` channels, `n` numbers of state of each.

use super::{States, check_starts, column_blocks, shared};
use crate::isa::Isa;
use crate::memory::Buffer;
use crate::parallel::DisjointMut;
use crate::simd::math::exp_nonpositive;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::for_each_task;
use std::ops::Range;

/// Channels that one task takes: whole vectors.
const CHANNELS: usize = 64;
const VECTORS: usize = CHANNELS / LANES;

/// What the scan reads.
#[derive(Clone, Copy, Debug)]
pub struct Scan<'a> {
    /// Inputs `[t, c]`.
    pub u: &'a [f32],
    /// Step sizes `[t, c]`, not negative.
    pub delta: &'a [f32],
    /// Rates of decay `[c, n]`, not positive.
    pub a: &'a [f32],
    /// What of the input enters the state, `[t, n]`.
    pub b: &'a [f32],
    /// How the state is read, `[t, n]`.
    pub c: &'a [f32],
    /// How the input passes by, `[c]`.
    pub d: &'a [f32],
    /// `[sequences + 1]`
    pub sequence_starts: &'a [usize],
}

impl Scan<'_> {
    fn channels(&self) -> usize {
        self.d.len()
    }

    fn states(&self) -> usize {
        self.a.len() / self.channels().max(1)
    }

    fn tokens(&self) -> usize {
        self.u.len() / self.channels().max(1)
    }

    fn check(&self) {
        let (tokens, channels, states) = (self.tokens(), self.channels(), self.states());
        assert!(self.u.len() == tokens * channels && self.delta.len() == self.u.len(), "rows of {channels} channels");
        assert_eq!(self.a.len(), channels * states, "rates of each channel");
        assert!(self.b.len() == tokens * states && self.c.len() == self.b.len(), "rows of {states} states");
        check_starts(self.sequence_starts, tokens);
    }

    /// `[n, c]`: the rates of neighbouring channels stand together.
    fn rates(&self) -> Buffer<f32> {
        let (channels, states) = (self.channels(), self.states());
        let mut rates = Buffer::scratch(self.a.len());
        for (channel, a) in self.a.chunks_exact(states.max(1)).enumerate() {
            a.iter().enumerate().for_each(|(n, &a)| rates[n * channels + channel] = a);
        }
        rates
    }
}

/// Runs the scan over each sequence. With states (one a sequence, `[n, c]`; none: zeros) it begins with those and leaves
/// the last in them.
///
/// # Shapes
/// `y` `[t, c]`.
pub fn selective_scan(scan: &Scan<'_>, states: &mut [&mut [f32]], y: &mut [f32]) {
    selective_scan_on(Isa::current(), scan, states, y);
}

fn selective_scan_on(isa: Isa, scan: &Scan<'_>, states: &mut [&mut [f32]], y: &mut [f32]) {
    scan.check();
    let (channels, sequences) = (scan.channels(), scan.sequence_starts.len().saturating_sub(1));
    assert_eq!(y.len(), scan.u.len());
    assert!(states.is_empty() || states.len() == sequences, "a state for each sequence");
    assert!(states.iter().all(|state| state.len() == scan.a.len()), "numbers of a state");
    let (rates, states, y) = (scan.rates(), shared(states), DisjointMut::new(y));
    let blocks = channels.div_ceil(CHANNELS);
    let columns = column_blocks(channels, CHANNELS);
    for_each_task(sequences * blocks, 8 * scan.u.len() * scan.states(), |task| {
        let (sequence, columns) = (task / blocks, columns(task % blocks));
        dispatch(isa, Forward { scan, rates: &rates, states: &states, sequence, columns, y: &y });
    });
}

/// One sequence, some channels.
struct Forward<'a> {
    scan: &'a Scan<'a>,
    rates: &'a [f32],
    states: &'a States<'a>,
    sequence: usize,
    columns: Range<usize>,
    y: &'a DisjointMut<'a, f32>,
}

/// Up to [`CHANNELS`] numbers of a row as whole vectors, zeros behind them.
#[inline(always)]
fn load<S: Simd>(simd: S, row: &[f32]) -> [Lanes<S>; VECTORS] {
    let mut vectors = [Lanes::splat(simd, 0.0); VECTORS];
    for (vector, part) in vectors.iter_mut().zip(row.chunks(LANES)) {
        *vector = Lanes::load_any(simd, part, 0.0);
    }
    vectors
}

#[inline(always)]
fn store<S: Simd>(vectors: [Lanes<S>; VECTORS], row: &mut [f32]) {
    for (vector, part) in vectors.into_iter().zip(row.chunks_mut(LANES)) {
        vector.store_any(part);
    }
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { scan, columns, .. } = &self;
        let (channels, n_states) = (scan.channels(), scan.states());
        let part = |row: usize| row * channels + columns.start..row * channels + columns.end;
        let mut h = Buffer::<f32>::zeroed(n_states * CHANNELS);
        if let Some(state) = self.states.get(self.sequence) {
            for (n, h) in h.chunks_exact_mut(CHANNELS).enumerate() {
                // SAFETY: this task alone has these channels of this sequence.
                h[..columns.len()].copy_from_slice(unsafe { state.range(part(n)) });
            }
        }
        for row in scan.sequence_starts[self.sequence]..scan.sequence_starts[self.sequence + 1] {
            let (u, delta) = (load(simd, &scan.u[part(row)]), load(simd, &scan.delta[part(row)]));
            let mut y = load(simd, &scan.d[columns.clone()]);
            let mut entering = u;
            for v in 0..VECTORS {
                y[v] = y[v] * u[v];
                entering[v] = u[v] * delta[v];
            }
            for (n, h) in h.chunks_exact_mut(CHANNELS).enumerate() {
                let rates = load(simd, &self.rates[part(n)]);
                let [b, c] = [scan.b, scan.c].map(|x| Lanes::splat(simd, x[row * n_states + n]));
                let mut state = load(simd, h);
                for v in 0..VECTORS {
                    let kept = exp_nonpositive(delta[v] * rates[v]) * state[v];
                    state[v] = entering[v].fma(b, kept);
                    y[v] = state[v].fma(c, y[v]);
                }
                store(state, h);
            }
            // SAFETY: this task alone has these channels of this sequence.
            store(y, unsafe { self.y.range(part(row)) });
        }
        if let Some(state) = self.states.get(self.sequence) {
            for (n, h) in h.chunks_exact(CHANNELS).enumerate() {
                // SAFETY: this task alone has these channels of this sequence.
                unsafe { state.range(part(n)) }.copy_from_slice(&h[..columns.len()]);
            }
        }
    }
}

/// Where the gradients of a scan are added.
#[derive(Debug)]
pub struct ScanGradients<'a> {
    /// `[t, c]`
    pub u: &'a mut [f32],
    /// `[t, c]`
    pub delta: &'a mut [f32],
    /// `[c, n]`
    pub a: &'a mut [f32],
    /// `[t, n]`
    pub b: &'a mut [f32],
    /// `[t, n]`
    pub c: &'a mut [f32],
    /// `[c]`
    pub d: &'a mut [f32],
}

/// Adds the gradients of [`selective_scan`] of whole sequences, which begins with zeros.
///
/// # Shapes
/// `dy` `[t, c]`.
pub fn selective_scan_backward(scan: &Scan<'_>, dy: &[f32], gradients: ScanGradients<'_>) {
    selective_scan_backward_on(Isa::current(), scan, dy, gradients);
}

fn selective_scan_backward_on(isa: Isa, scan: &Scan<'_>, dy: &[f32], gradients: ScanGradients<'_>) {
    scan.check();
    let (channels, n_states, tokens) = (scan.channels(), scan.states(), scan.tokens());
    assert!([dy.len(), gradients.u.len(), gradients.delta.len()].iter().all(|&len| len == scan.u.len()));
    assert!(gradients.a.len() == scan.a.len() && gradients.d.len() == channels);
    assert!(gradients.b.len() == scan.b.len() && gradients.c.len() == scan.c.len());
    let (rates, blocks) = (scan.rates(), channels.div_ceil(CHANNELS));
    let columns = column_blocks(channels, CHANNELS);
    // Sums over channels: each task has its own, which meet in the order of the channels.
    let mut partial = Buffer::<f32>::zeroed(blocks * 2 * tokens * n_states);
    {
        let [u, delta, a, d] = [gradients.u, gradients.delta, gradients.a, gradients.d].map(DisjointMut::new);
        let partial = DisjointMut::new(&mut partial);
        for_each_task(blocks, 16 * scan.u.len() * n_states, |block| {
            let sums = block * 2 * tokens * n_states..(block + 1) * 2 * tokens * n_states;
            // SAFETY: a task has its sums to itself.
            let sums = unsafe { partial.range(sums) };
            let columns = columns(block);
            dispatch(isa, Backward { scan, rates: &rates, dy, columns, sums, u: &u, delta: &delta, a: &a, d: &d });
        });
    }
    for sums in partial.chunks_exact((2 * tokens * n_states).max(1)) {
        let (b, c) = sums.split_at(tokens * n_states);
        gradients.b.iter_mut().zip(b).for_each(|(sum, part)| *sum += part);
        gradients.c.iter_mut().zip(c).for_each(|(sum, part)| *sum += part);
    }
}

/// Some channels of all sequences.
struct Backward<'a> {
    scan: &'a Scan<'a>,
    rates: &'a [f32],
    dy: &'a [f32],
    columns: Range<usize>,
    /// Gradients of `b`, then of `c`.
    sums: &'a mut [f32],
    u: &'a DisjointMut<'a, f32>,
    delta: &'a DisjointMut<'a, f32>,
    a: &'a DisjointMut<'a, f32>,
    d: &'a DisjointMut<'a, f32>,
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let n_states = self.scan.states();
        let mut da = Buffer::<f32>::zeroed(n_states * CHANNELS);
        let mut dd = [Lanes::splat(simd, 0.0); VECTORS];
        for bounds in self.scan.sequence_starts.windows(2) {
            let states = self.states(simd, bounds[0]..bounds[1]);
            self.sequence(simd, bounds[0]..bounds[1], &states, &mut da, &mut dd);
        }
        let width = self.columns.len();
        for (place, channel) in self.columns.clone().enumerate() {
            // SAFETY: this task alone has these channels.
            let a = unsafe { self.a.range(channel * n_states..(channel + 1) * n_states) };
            a.iter_mut().enumerate().for_each(|(n, sum)| *sum += da[n * CHANNELS + place]);
        }
        let mut row = [0.0; CHANNELS];
        store(dd, &mut row);
        // SAFETY: this task alone has these channels.
        let d = unsafe { self.d.range(self.columns.clone()) };
        d.iter_mut().zip(&row[..width]).for_each(|(sum, part)| *sum += part);
    }
}

impl Backward<'_> {
    #[inline(always)]
    fn part(&self, row: usize) -> Range<usize> {
        let first = row * self.scan.channels();
        first + self.columns.start..first + self.columns.end
    }

    /// The state before each row and after the last, `[rows + 1, n, CHANNELS]`.
    #[inline(always)]
    fn states<S: Simd>(&self, simd: S, rows: Range<usize>) -> Buffer<f32> {
        let (scan, n_states) = (self.scan, self.scan.states());
        let size = n_states * CHANNELS;
        let mut states = Buffer::<f32>::zeroed((rows.len() + 1) * size);
        for (i, row) in rows.enumerate() {
            let (before, after) = states[i * size..].split_at_mut(size);
            let (u, delta) = (load(simd, &scan.u[self.part(row)]), load(simd, &scan.delta[self.part(row)]));
            let states = before.chunks_exact(CHANNELS).zip(after.chunks_exact_mut(CHANNELS));
            for (n, (before, after)) in states.enumerate() {
                let (rates, mut state) = (load(simd, &self.rates[self.part(n)]), load(simd, before));
                let b = Lanes::splat(simd, scan.b[row * n_states + n]);
                for v in 0..VECTORS {
                    state[v] = (u[v] * delta[v]).fma(b, exp_nonpositive(delta[v] * rates[v]) * state[v]);
                }
                store(state, after);
            }
        }
        states
    }

    /// Goes back over one sequence.
    #[inline(always)]
    fn sequence<S: Simd>(
        &mut self,
        simd: S,
        rows: Range<usize>,
        states: &[f32],
        da: &mut [f32],
        dd: &mut [Lanes<S>; VECTORS],
    ) {
        let (scan, n_states) = (self.scan, self.scan.states());
        let (size, tokens) = (n_states * CHANNELS, scan.tokens());
        let zero = Lanes::splat(simd, 0.0);
        // The gradient of the state, coming from the tokens after.
        let mut dh = Buffer::<f32>::zeroed(size);
        for (i, row) in rows.enumerate().rev() {
            let part = self.part(row);
            let [u, delta, dy] = [scan.u, scan.delta, self.dy].map(|x| load(simd, &x[part.clone()]));
            let passing = load(simd, &scan.d[self.columns.clone()]);
            let (mut du, mut ddelta) = ([zero; VECTORS], [zero; VECTORS]);
            for v in 0..VECTORS {
                du[v] = dy[v] * passing[v];
                dd[v] = dy[v].fma(u[v], dd[v]);
            }
            for n in 0..n_states {
                let here = n * CHANNELS..(n + 1) * CHANNELS;
                let [before, after] = [i, i + 1].map(|i| load(simd, &states[i * size..][here.clone()]));
                let rates = load(simd, &self.rates[self.part(n)]);
                let (mut dstate, mut drate) = (load(simd, &dh[here.clone()]), load(simd, &da[here.clone()]));
                let [b, c] = [scan.b, scan.c].map(|x| Lanes::splat(simd, x[row * n_states + n]));
                let (mut db, mut dc) = (zero, zero);
                for v in 0..VECTORS {
                    dstate[v] = dy[v].fma(c, dstate[v]);
                    dc = dy[v].fma(after[v], dc);
                    let decay = exp_nonpositive(delta[v] * rates[v]);
                    let through = dstate[v] * decay;
                    let exponent = through * before[v];
                    drate[v] = exponent.fma(delta[v], drate[v]);
                    ddelta[v] = exponent.fma(rates[v], ddelta[v]);
                    ddelta[v] = (dstate[v] * u[v]).fma(b, ddelta[v]);
                    du[v] = (dstate[v] * delta[v]).fma(b, du[v]);
                    db = (dstate[v] * delta[v]).fma(u[v], db);
                    dstate[v] = through;
                }
                store(dstate, &mut dh[here.clone()]);
                store(drate, &mut da[here]);
                self.sums[row * n_states + n] = db.sum();
                self.sums[(tokens + row) * n_states + n] = dc.sum();
            }
            for (sum, found) in [(self.u, du), (self.delta, ddelta)] {
                // SAFETY: this task alone has these channels.
                let sum = unsafe { sum.range(part.clone()) };
                let mut total = load(simd, sum);
                for v in 0..VECTORS {
                    total[v] = total[v] + found[v];
                }
                store(total, sum);
            }
        }
    }
}

/// The plain loop that [`selective_scan`] is compared with, in f64.
pub fn selective_scan_reference(scan: &Scan<'_>, states: &mut [&mut [f32]], y: &mut [f32]) {
    let (channels, n_states) = (scan.channels(), scan.states());
    for (sequence, bounds) in scan.sequence_starts.windows(2).enumerate() {
        for channel in 0..channels {
            let at = |n: usize| n * channels + channel;
            let mut h: Vec<f64> =
                (0..n_states).map(|n| states.get(sequence).map_or(0.0, |state| f64::from(state[at(n)]))).collect();
            for row in bounds[0]..bounds[1] {
                let [u, delta] = [scan.u, scan.delta].map(|x| f64::from(x[row * channels + channel]));
                let mut sum = f64::from(scan.d[channel]) * u;
                for (n, h) in h.iter_mut().enumerate() {
                    let [b, c] = [scan.b, scan.c].map(|x| f64::from(x[row * n_states + n]));
                    *h = (delta * f64::from(scan.a[channel * n_states + n])).exp() * *h + delta * b * u;
                    sum += c * *h;
                }
                y[row * channels + channel] = sum as f32;
            }
            if let Some(state) = states.get_mut(sequence) {
                h.iter().enumerate().for_each(|(n, &h)| state[at(n)] = h as f32);
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

    const STARTS: [usize; 4] = [0, 2, 2, 21];

    struct Data([Vec<f32>; 6]);

    impl Data {
        fn new(channels: usize, states: usize) -> Self {
            let positive = |seed, count| numbers(seed, count).iter().map(|x| x + 1.0).collect();
            let rates = numbers(3, channels * states).iter().map(|x| 2.0 * (x - 1.0)).collect();
            Self([
                numbers(1, 21 * channels),
                positive(2, 21 * channels),
                rates,
                numbers(4, 21 * states),
                numbers(5, 21 * states),
                numbers(6, channels),
            ])
        }

        fn scan(&self) -> Scan<'_> {
            let [u, delta, a, b, c, d] = &self.0;
            Scan { u, delta, a, b, c, d, sequence_starts: &STARTS }
        }
    }

    #[test]
    fn forward_is_the_reference() {
        for (channels, states) in [(1, 1), (17, 3), (64, 4), (130, 16)] {
            let data = Data::new(channels, states);
            let run = |of: &Step<'_>| {
                let mut y = vec![0.0; 21 * channels];
                let mut before: Vec<Vec<f32>> = (0..3).map(|seed| numbers(7 + seed, channels * states)).collect();
                of(&mut before.iter_mut().map(|state| &mut state[..]).collect::<Vec<_>>(), &mut y);
                [vec![y], before].concat()
            };
            let wanted = run(&|states, y| selective_scan_reference(&data.scan(), states, y));
            check(&wanted, 3e-6, |isa| run(&|states, y| selective_scan_on(isa, &data.scan(), states, y)));
        }
    }

    #[test]
    fn pieces_give_the_bits_of_the_whole() {
        let (channels, states) = (70, 5);
        let data = Data::new(channels, states);
        let scan = Scan { sequence_starts: &[0, 21], ..data.scan() };
        let mut whole = vec![0.0; 21 * channels];
        selective_scan(&scan, &mut [], &mut whole);
        for pieces in [&[21][..], &[1; 21], &[4, 0, 16, 1]] {
            let (mut state, mut y, mut first) = (vec![0.0; channels * states], vec![0.0; 21 * channels], 0);
            for &piece in pieces {
                let of = |x, width| crate::tasks::rows(x, &(first..first + piece), width);
                let piece_of = Scan {
                    u: of(scan.u, channels),
                    delta: of(scan.delta, channels),
                    b: of(scan.b, states),
                    c: of(scan.c, states),
                    sequence_starts: &[0, piece],
                    ..scan
                };
                let part = first * channels..(first + piece) * channels;
                selective_scan(&piece_of, &mut [&mut state], &mut y[part]);
                first += piece;
            }
            assert_eq!(bits(&y), bits(&whole), "{pieces:?}");
        }
    }

    #[test]
    fn backward_is_the_same_bits_everywhere_and_adds() {
        // Its values are compared with finite differences where the operation stands.
        let (channels, states) = (70, 3);
        let data = Data::new(channels, states);
        let dy = numbers(8, 21 * channels);
        let run = |isa, start: f32| {
            let mut found: Vec<Vec<f32>> = data.0.iter().map(|x| vec![start; x.len()]).collect();
            let [u, delta, a, b, c, d] = found.get_disjoint_mut([0, 1, 2, 3, 4, 5]).unwrap();
            selective_scan_backward_on(isa, &data.scan(), &dy, ScanGradients { u, delta, a, b, c, d });
            found
        };
        let fresh = run(Isa::Portable, 0.0);
        check(&fresh, 0.0, |isa| run(isa, 0.0));
        let added: Vec<Vec<f32>> = fresh.iter().map(|x| x.iter().map(|x| x + 0.5).collect()).collect();
        check(&added, 1e-6, |isa| run(isa, 0.5));
    }
}
