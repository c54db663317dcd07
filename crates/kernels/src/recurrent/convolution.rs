//! Causal convolution of each channel by itself, a few tokens wide: what comes before the selective scan of Mamba
//! (Gu and Dao 2023) and the delta rule of Qwen3-Next, and all the mixing in the short convolutions of LFM2.
//!
//! Legend: `c` channels, `w` taps (the width of the window).

use super::{check_starts, sequence_of};
use crate::isa::Isa;
use crate::memory::Buffer;
use crate::parallel::DisjointMut;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::{for_each_block, for_each_block_of, rows as rows_of, rows_mut};
use std::ops::Range;

/// Rows whose weight gradients are summed before they meet others': fixed, so that threads do not matter.
const GRADIENT_ROWS: usize = 64;

/// The taps of each channel, the last of which meets the token itself.
#[derive(Clone, Copy, Debug)]
pub struct Taps<'a> {
    /// `[c, w]`
    pub weight: &'a [f32],
    /// `[c]`
    pub bias: Option<&'a [f32]>,
    /// w
    pub width: usize,
}

impl Taps<'_> {
    fn channels(&self) -> usize {
        self.weight.len() / self.width
    }

    /// Numbers of the inputs that a sequence carries on, `[w - 1, c]`.
    pub fn history_len(&self) -> usize {
        (self.width - 1) * self.channels()
    }

    /// `[w, c]`: what one tap does to all channels stands together.
    fn by_tap(&self) -> Buffer<f32> {
        let channels = self.channels();
        let mut taps = Buffer::scratch(self.weight.len());
        for (channel, weights) in self.weight.chunks_exact(self.width).enumerate() {
            for (tap, &weight) in weights.iter().enumerate() {
                taps[tap * channels + channel] = weight;
            }
        }
        taps
    }

    /// Checks the shapes of a batch; returns t.
    fn check(&self, x: &[f32], sequence_starts: &[usize]) -> usize {
        assert!(self.width > 0 && self.weight.len().is_multiple_of(self.width), "taps of width {}", self.width);
        assert!(self.bias.is_none_or(|bias| bias.len() == self.channels()), "a bias for each channel");
        let tokens = x.len() / self.channels().max(1);
        assert_eq!(x.len(), tokens * self.channels());
        check_starts(sequence_starts, tokens);
        tokens
    }
}

/// `y[t] = bias + Σ_j weight[j] x[t - w + 1 + j]` within each sequence, its taps added in rising order.
///
/// What stands before a sequence is its history, `[w - 1, c]`: the inputs read last, the latest at the end, zeros at
/// first. With histories (one a sequence; none: zeros), they are moved on.
///
/// # Shapes
/// `x`, `y` `[t, c]`.
pub fn causal_convolution(
    taps: &Taps<'_>,
    x: &[f32],
    sequence_starts: &[usize],
    histories: &mut [&mut [f32]],
    y: &mut [f32],
) {
    causal_convolution_on(Isa::current(), taps, x, sequence_starts, histories, y);
}

fn causal_convolution_on(
    isa: Isa,
    taps: &Taps<'_>,
    x: &[f32],
    sequence_starts: &[usize],
    histories: &mut [&mut [f32]],
    y: &mut [f32],
) {
    let tokens = taps.check(x, sequence_starts);
    let (channels, sequences) = (taps.channels(), sequence_starts.len().saturating_sub(1));
    assert_eq!(x.len(), y.len());
    assert!(histories.is_empty() || histories.len() == sequences, "a history for each sequence");
    assert!(histories.iter().all(|history| history.len() == taps.history_len()), "inputs of a history");
    let (by_tap, zeros) = (taps.by_tap(), Buffer::<f32>::zeroed(channels));
    {
        let read: Vec<&[f32]> = histories.iter().map(|history| &**history).collect();
        let inputs = Inputs { x, histories: &read, zeros: &zeros, sequence_starts, channels, width: taps.width };
        let y = DisjointMut::new(y);
        for_each_block(tokens, channels * taps.width, |rows| {
            // SAFETY: blocks of rows are disjoint.
            let y = unsafe { rows_mut(&y, &rows, channels) };
            dispatch(isa, Convolve { inputs: &inputs, by_tap: &by_tap, bias: taps.bias, rows, y });
        });
    }
    for (history, bounds) in histories.iter_mut().zip(sequence_starts.windows(2)) {
        move_on(history, &x[bounds[0] * channels..bounds[1] * channels]);
    }
}

/// Appends inputs to a history and drops as many at its beginning.
fn move_on(history: &mut [f32], inputs: &[f32]) {
    let kept = history.len().saturating_sub(inputs.len());
    history.copy_within(history.len() - kept.., 0);
    let len = history.len();
    history[kept..].copy_from_slice(&inputs[inputs.len() - (len - kept)..]);
}

/// Where the inputs of a row's taps are.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    x: &'a [f32],
    histories: &'a [&'a [f32]],
    zeros: &'a [f32],
    sequence_starts: &'a [usize],
    channels: usize,
    width: usize,
}

impl<'a> Inputs<'a> {
    /// The input that tap `tap` of row `row` of sequence `sequence` meets.
    #[inline(always)]
    fn of(&self, sequence: usize, row: usize, tap: usize) -> &'a [f32] {
        let behind = self.width - 1 - tap;
        let place = row - self.sequence_starts[sequence];
        if behind <= place {
            &self.x[(row - behind) * self.channels..][..self.channels]
        } else if self.histories.is_empty() {
            self.zeros
        } else {
            &self.histories[sequence][(place + tap) * self.channels..][..self.channels]
        }
    }
}

struct Convolve<'a> {
    inputs: &'a Inputs<'a>,
    by_tap: &'a [f32],
    bias: Option<&'a [f32]>,
    rows: Range<usize>,
    y: &'a mut [f32],
}

impl Kernel for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let channels = self.inputs.channels;
        for (row, y) in self.rows.zip(self.y.chunks_exact_mut(channels)) {
            let sequence = sequence_of(self.inputs.sequence_starts, row);
            match self.bias {
                Some(bias) => y.copy_from_slice(bias),
                None => y.fill(0.0),
            }
            for (tap, weights) in self.by_tap.chunks_exact(channels).enumerate() {
                multiply_add(simd, weights, self.inputs.of(sequence, row, tap), y);
            }
        }
    }
}

/// `sum += a * b`.
#[inline(always)]
fn multiply_add<S: Simd>(simd: S, a: &[f32], b: &[f32], sum: &mut [f32]) {
    let load = |from: &[f32]| Lanes::load_any(simd, from, 0.0);
    for ((a, b), sum) in a.chunks(LANES).zip(b.chunks(LANES)).zip(sum.chunks_mut(LANES)) {
        load(a).fma(load(b), load(sum)).store_any(sum);
    }
}

/// The gradient of [`causal_convolution`] of whole sequences: overwrites `dx`, adds to `dweight` and `dbias`.
///
/// # Shapes
/// `dy`, `x`, `dx` `[t, c]`, `dweight` `[c, w]`, `dbias` `[c]`, or nothing without a bias.
pub fn causal_convolution_backward(
    taps: &Taps<'_>,
    dy: &[f32],
    x: &[f32],
    sequence_starts: &[usize],
    dx: &mut [f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    causal_convolution_backward_on(Isa::current(), taps, [dy, x], sequence_starts, [dx, dweight, dbias]);
}

fn causal_convolution_backward_on(
    isa: Isa,
    taps: &Taps<'_>,
    [dy, x]: [&[f32]; 2],
    sequence_starts: &[usize],
    [dx, dweight, dbias]: [&mut [f32]; 3],
) {
    let tokens = taps.check(x, sequence_starts);
    let (channels, width) = (taps.channels(), taps.width);
    assert!(dy.len() == x.len() && dx.len() == x.len());
    assert_eq!(dweight.len(), taps.weight.len());
    assert_eq!(dbias.len(), taps.bias.map_or(0, <[f32]>::len));
    let (by_tap, zeros) = (taps.by_tap(), Buffer::<f32>::zeroed(channels));
    let inputs = Inputs { x, histories: &[], zeros: &zeros, sequence_starts, channels, width };
    // A block's sums: those of each tap, then that of the bias.
    let numbers = (width + 1) * channels;
    let mut partial = Buffer::<f32>::zeroed(tokens.div_ceil(GRADIENT_ROWS) * numbers);
    {
        let (dx, partial) = (DisjointMut::new(dx), DisjointMut::new(&mut partial));
        for_each_block_of(GRADIENT_ROWS, tokens, 2 * channels * width, |rows| {
            let block = rows.start / GRADIENT_ROWS;
            // SAFETY: blocks of rows are disjoint, and each has its own partial sums.
            let (dx, sums) =
                unsafe { (rows_mut(&dx, &rows, channels), rows_mut(&partial, &(block..block + 1), numbers)) };
            dispatch(isa, Differentiate { inputs: &inputs, by_tap: &by_tap, dy, rows, dx, sums });
        });
    }
    for sums in partial.chunks_exact(numbers) {
        for (channel, dweight) in dweight.chunks_exact_mut(width).enumerate() {
            dweight.iter_mut().enumerate().for_each(|(tap, sum)| *sum += sums[tap * channels + channel]);
        }
        dbias.iter_mut().zip(rows_of(sums, &(width..width + 1), channels)).for_each(|(sum, part)| *sum += part);
    }
}

struct Differentiate<'a> {
    inputs: &'a Inputs<'a>,
    by_tap: &'a [f32],
    dy: &'a [f32],
    rows: Range<usize>,
    dx: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Kernel for Differentiate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Inputs { channels, width, sequence_starts, zeros, .. } = *self.inputs;
        let load = |from: &[f32]| Lanes::load_any(simd, from, 0.0);
        let (tap_sums, bias_sum) = self.sums.split_at_mut(width * channels);
        for (row, dx) in self.rows.zip(self.dx.chunks_exact_mut(channels)) {
            let sequence = sequence_of(sequence_starts, row);
            let dy = &self.dy[row * channels..][..channels];
            for (tap, sums) in tap_sums.chunks_exact_mut(channels).enumerate() {
                let input = self.inputs.of(sequence, row, tap);
                if !std::ptr::eq(input, zeros) {
                    multiply_add(simd, dy, input, sums);
                }
            }
            for (dy, sum) in dy.chunks(LANES).zip(bias_sum.chunks_mut(LANES)) {
                (load(dy) + load(sum)).store_any(sum);
            }
            dx.fill(0.0);
            for (tap, weights) in self.by_tap.chunks_exact(channels).enumerate() {
                let reader = row + (width - 1 - tap);
                if reader < sequence_starts[sequence + 1] {
                    multiply_add(simd, weights, &self.dy[reader * channels..][..channels], dx);
                }
            }
        }
    }
}

/// The plain loop that [`causal_convolution`] is compared with, in f64.
pub fn causal_convolution_reference(
    taps: &Taps<'_>,
    x: &[f32],
    sequence_starts: &[usize],
    histories: &[&[f32]],
    y: &mut [f32],
) {
    let (channels, width) = (taps.channels(), taps.width);
    for (sequence, bounds) in sequence_starts.windows(2).enumerate() {
        for (place, channel) in (0..bounds[1] - bounds[0]).flat_map(|place| (0..channels).map(move |c| (place, c))) {
            let mut sum = taps.bias.map_or(0.0, |bias| f64::from(bias[channel]));
            for tap in 0..width {
                // Counted from the first input of the history.
                let at = place + tap;
                let input = match at.checked_sub(width - 1) {
                    Some(place) => x[(bounds[0] + place) * channels + channel],
                    None => histories.get(sequence).map_or(0.0, |history| history[at * channels + channel]),
                };
                sum += f64::from(taps.weight[channel * width + tap]) * f64::from(input);
            }
            y[(bounds[0] + place) * channels + channel] = sum as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bits, check, numbers};

    const STARTS: [usize; 5] = [0, 3, 3, 80, 81];

    #[test]
    fn forward_is_the_reference() {
        for (channels, width) in [(1, 1), (5, 4), (16, 3), (70, 4)] {
            let (x, weight) = (numbers(1, 81 * channels), numbers(2, channels * width));
            let (bias, histories) = (numbers(3, channels), numbers(4, 4 * (width - 1) * channels));
            for bias in [None, Some(&bias[..])] {
                let taps = Taps { weight: &weight, bias, width };
                let before: Vec<&[f32]> =
                    if width == 1 { vec![&[]; 4] } else { histories.chunks_exact(taps.history_len()).collect() };
                let mut y = vec![0.0; x.len()];
                causal_convolution_reference(&taps, &x, &STARTS, &before, &mut y);
                check(&[y], 1e-6, |isa| {
                    let mut y = vec![0.0; x.len()];
                    let mut states: Vec<Vec<f32>> = before.iter().map(|state| state.to_vec()).collect();
                    let mut states: Vec<&mut [f32]> = states.iter_mut().map(|state| &mut state[..]).collect();
                    causal_convolution_on(isa, &taps, &x, &STARTS, &mut states, &mut y);
                    vec![y]
                });
            }
        }
    }

    #[test]
    fn pieces_give_the_bits_of_the_whole() {
        let (channels, width, tokens) = (19, 4, 11);
        let (x, weight) = (numbers(1, tokens * channels), numbers(2, channels * width));
        let taps = Taps { weight: &weight, bias: None, width };
        let mut whole = vec![0.0; x.len()];
        causal_convolution(&taps, &x, &[0, tokens], &mut [], &mut whole);
        for pieces in [&[11][..], &[1; 11], &[2, 5, 0, 4]] {
            let (mut history, mut y, mut first) = (vec![0.0; taps.history_len()], vec![0.0; x.len()], 0);
            for piece in pieces {
                let part = first * channels..(first + piece) * channels;
                causal_convolution(&taps, &x[part.clone()], &[0, *piece], &mut [&mut history], &mut y[part]);
                first += piece;
            }
            assert_eq!(bits(&y), bits(&whole), "{pieces:?}");
            assert_eq!(history, x[(tokens - 3) * channels..]);
        }
    }

    #[test]
    fn backward_is_the_transpose() {
        let (channels, width) = (21, 4);
        let (x, weight, bias, dy) =
            (numbers(1, 81 * channels), numbers(2, channels * width), numbers(3, channels), numbers(4, 81 * channels));
        let taps = Taps { weight: &weight, bias: Some(&bias), width };
        // By the definition: every product of the forward gives one term to each gradient.
        let (mut dx, mut dweight, mut dbias) = (vec![0.0; x.len()], vec![0.5; weight.len()], vec![0.25; channels]);
        for bounds in STARTS.windows(2) {
            for (row, channel) in (bounds[0]..bounds[1]).flat_map(|row| (0..channels).map(move |c| (row, c))) {
                let slope = dy[row * channels + channel];
                dbias[channel] += slope;
                for tap in 0..width {
                    if let Some(from) = (row + tap + 1).checked_sub(width).filter(|&from| from >= bounds[0]) {
                        dx[from * channels + channel] += slope * weight[channel * width + tap];
                        dweight[channel * width + tap] += slope * x[from * channels + channel];
                    }
                }
            }
        }
        check(&[dx, dweight, dbias], 2e-5, |isa| {
            let (mut dx, mut dweight) = (vec![f32::NAN; x.len()], vec![0.5; weight.len()]);
            let mut dbias = vec![0.25; channels];
            causal_convolution_backward_on(isa, &taps, [&dy, &x], &STARTS, [&mut dx, &mut dweight, &mut dbias]);
            vec![dx, dweight, dbias]
        });
    }
}
