//! The left operand of the quantised products: rows of f32 cut into blocks of 32, each with a scale and signed bytes.
//!
//! A block's scale is its largest magnitude over 127, its codes the values over the scale, rounded to the nearest (ties
//! to even). What a block becomes depends on its 32 numbers alone.

use super::layout::{BLOCK, Layout};
use crate::isa::Isa;
use crate::memory::Buffer;
use crate::parallel;

/// A block of a row, as the kernels read it.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(16))]
pub(super) struct Record {
    pub(super) codes: [i8; BLOCK],
    pub(super) scale: f32,
    /// What the sums of unsigned codes start from, for the two halves (or the whole, in the first): -bias times the sum
    /// of the codes. In formats whose halves have minima, the sum of a half's codes.
    pub(super) start: [i32; 2],
    /// The sum of the block: scale times the sum of the codes.
    pub(super) sum: f32,
}

impl Record {
    /// The sum of the block, or of a half if minima are those of halves.
    #[inline(always)]
    pub(super) fn part<L: Layout>(&self, half: usize) -> f32 {
        if L::AFFINE_HALVES { self.scale * self.start[half] as f32 } else { self.sum }
    }
}

/// Rows of records.
pub(super) struct Activations {
    records: Buffer<Record>,
    blocks: usize,
}

/// Fewer elements than this are quantised by one thread.
const SERIAL_ELEMENTS: usize = 1 << 14;
/// Rows of a task.
const TASK_ROWS: usize = 8;
/// Added and taken away again, it leaves a number below 2^22 rounded to the nearest integer, whose low bits stand in
/// the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

impl Activations {
    /// Quantises rows of `k` numbers; records are made for `blocks` blocks, those beyond `k` zero.
    pub(super) fn quantise(x: &[f32], k: usize, blocks: usize, bias: i32, halves: bool) -> Self {
        assert!(k.is_multiple_of(BLOCK) && k <= blocks * BLOCK);
        let rows = x.len().checked_div(k).unwrap_or(0);
        let mut records = Buffer::<Record>::scratch(rows * blocks);
        let isa = Isa::current();
        let serial = SERIAL_ELEMENTS / BLOCK;
        parallel::rows_mut(&mut records, blocks, TASK_ROWS, serial, |first, records| {
            for (row, records) in records.chunks_exact_mut(blocks).enumerate() {
                let row = first + row;
                quantise_row(isa, &x[row * k..(row + 1) * k], bias, halves, records);
            }
        });
        Self { records, blocks }
    }

    /// The records of a row, one after the other.
    pub(super) fn row(&self, row: usize) -> *const Record {
        self.records[row * self.blocks..(row + 1) * self.blocks].as_ptr()
    }

    /// How many rows there are.
    pub(super) fn rows(&self) -> usize {
        self.records.len() / self.blocks.max(1)
    }
}

fn quantise_row(isa: Isa, x: &[f32], bias: i32, halves: bool, records: &mut [Record]) {
    let (whole, padding) = records.split_at_mut(x.len() / BLOCK);
    padding.fill(bytemuck::Zeroable::zeroed());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` is of this machine.
        Isa::Avx512 | Isa::Amx => unsafe { quantise_row_avx512(x, bias, halves, whole) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` is of this machine.
        Isa::Avx2 => unsafe { quantise_row_avx2(x, bias, halves, whole) },
        _ => quantise_row_any(x, bias, halves, whole),
    }
}

/// The scale and its inverse of a block whose largest magnitude is `largest`. What is smaller than any activation
/// counts as zero, so that the inverse stays finite; an infinity makes the block none.
#[inline(always)]
fn scale_and_inverse(largest: f32) -> (f32, f32) {
    const SMALLEST: f32 = 1e-30;
    if largest < SMALLEST {
        (0.0, 0.0)
    } else if largest.is_finite() {
        (largest / 127.0, 127.0 / largest)
    } else {
        (f32::NAN, 0.0)
    }
}

#[inline(always)]
fn record(codes: [i8; BLOCK], sums: [i32; 2], scale: f32, bias: i32, halves: bool) -> Record {
    let sum = sums[0] + sums[1];
    let start = if halves { sums.map(|sum| -bias * sum) } else { [-bias * sum, 0] };
    Record { codes, scale, start, sum: scale * sum as f32 }
}

/// As [`quantise_row_any`].
///
/// # Safety
/// The machine has AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn quantise_row_avx512(x: &[f32], bias: i32, halves: bool, records: &mut [Record]) {
    use std::arch::x86_64::*;
    for (values, target) in x.as_chunks::<BLOCK>().0.iter().zip(records) {
        let mut codes = [0i8; BLOCK];
        // SAFETY: `values` and `codes` are two halves of sixteen each.
        unsafe {
            let halves_of = [_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(16))];
            let strange = halves_of.map(|half| _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(half, half));
            let [low, high] = halves_of.map(|half| _mm512_abs_ps(half));
            let largest = if strange == [0, 0] { _mm512_reduce_max_ps(_mm512_max_ps(low, high)) } else { f32::NAN };
            let (scale, inverse) = scale_and_inverse(largest);
            let mut sums = [0; 2];
            for (half, values) in halves_of.into_iter().enumerate() {
                let scaled = _mm512_cvtps_epi32(_mm512_mul_ps(values, _mm512_set1_ps(inverse)));
                sums[half] = _mm512_reduce_add_epi32(scaled);
                _mm_storeu_si128(codes.as_mut_ptr().add(half * 16).cast(), _mm512_cvtepi32_epi8(scaled));
            }
            if scale.is_nan() {
                (codes, sums) = ([0; BLOCK], [0; 2]);
            }
            *target = record(codes, sums, scale, bias, halves);
        }
    }
}

/// [`quantise_row_any`], compiled for AVX2.
///
/// # Safety
/// The machine has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn quantise_row_avx2(x: &[f32], bias: i32, halves: bool, records: &mut [Record]) {
    quantise_row_any(x, bias, halves, records);
}

/// No operation here depends on the width of registers: maxima and integer sums are exact in any order.
#[inline(always)]
fn quantise_row_any(x: &[f32], bias: i32, halves: bool, records: &mut [Record]) {
    for (values, target) in x.as_chunks::<BLOCK>().0.iter().zip(records) {
        *target = quantise_block(values, bias, halves);
    }
}

#[inline(always)]
fn quantise_block(values: &[f32; BLOCK], bias: i32, halves: bool) -> Record {
    let mut lanes = [0.0f32; 16];
    let mut strange = 0;
    for (lane, (a, b)) in lanes.iter_mut().zip(values[..16].iter().zip(&values[16..])) {
        strange |= u32::from(a.is_nan()) | u32::from(b.is_nan());
        let (a, b) = (a.abs(), b.abs());
        *lane = if a > b { a } else { b };
    }
    let largest = lanes.into_iter().fold(0.0, |largest, lane| if lane > largest { lane } else { largest });
    let (scale, inverse) = scale_and_inverse(if strange == 0 { largest } else { f32::NAN });
    let mut codes = [0i8; BLOCK];
    if !scale.is_nan() {
        for (code, value) in codes.iter_mut().zip(values) {
            *code = (value * inverse + ROUND).to_bits() as i8;
        }
    }
    let half = |codes: &[i8]| codes.iter().map(|&code| i32::from(code)).sum::<i32>();
    record(codes, [half(&codes[..16]), half(&codes[16..])], scale, bias, halves)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::numbers;

    #[test]
    fn codes_are_the_nearest_and_the_largest_is_127() {
        let mut values = numbers(1, BLOCK);
        values[7] = -3.0;
        let record = quantise_block(values[..].try_into().unwrap(), 8, true);
        assert_eq!((record.codes[7], record.scale), (-127, 3.0 / 127.0));
        for (&code, &value) in record.codes.iter().zip(&values) {
            assert!((f32::from(code) * record.scale - value).abs() <= record.scale * 0.501);
        }
        let sum = |range: std::ops::Range<usize>| record.codes[range].iter().map(|&c| i32::from(c)).sum::<i32>();
        assert_eq!(record.start, [-8 * sum(0..16), -8 * sum(16..32)]);
        assert_eq!(record.sum, record.scale * sum(0..32) as f32);
    }

    #[test]
    fn zeros_tiny_numbers_and_strange_ones() {
        for isa in Isa::available() {
            let quantise = |values: [f32; BLOCK]| {
                let mut records = [bytemuck::Zeroable::zeroed(); 2];
                quantise_row(isa, &values, 8, false, &mut records);
                assert_eq!((records[1].scale, records[1].codes), (0.0, [0; BLOCK]), "padding");
                records[0]
            };
            for small in [0.0, f32::from_bits(3), 1e-38] {
                assert_eq!((quantise([small; BLOCK]).scale, quantise([small; BLOCK]).codes), (0.0, [0; BLOCK]));
            }
            for strange in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for place in [0, 16, 31] {
                    let mut values = [1.0; BLOCK];
                    values[place] = strange;
                    let record = quantise(values);
                    assert!(record.scale.is_nan() && record.codes == [0; BLOCK], "{isa} {strange} at {place}");
                }
            }
        }
    }
}
