//! The left operand of the quantised products: rows of f32 cut into blocks of 32, each with a scale and signed bytes.
//!
//! A block's scale is its largest magnitude over 127, its codes the values over the scale, rounded to the nearest (ties
//! to even). What a block becomes depends on its 32 numbers alone.

use super::layout::BLOCK;
use crate::isa::Isa;
use crate::memory::Buffer;
use crate::parallel;

/// A block of a row, as the kernels read it.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(16))]
pub(super) struct Record {
    pub(super) codes: [i8; BLOCK],
    pub(super) scale: f32,
    /// What the sums of unsigned codes start from, for the two halves (or the whole, in the first):
    /// -bias times the sum of the codes.
    pub(super) start: [i32; 2],
    /// The sum of the block: scale times the sum of the codes.
    pub(super) sum: f32,
}

/// Rows of records.
pub(super) struct Activations {
    records: Buffer<Record>,
    blocks: usize,
}

/// Fewer elements than this are quantised by one thread.
const SERIAL_ELEMENTS: usize = 1 << 15;
/// Rows of a task.
const TASK_ROWS: usize = 8;
/// Added and taken away again, it leaves a number below 2^22 rounded to the nearest integer, whose low bits stand in
/// the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

impl Activations {
    /// Quantises rows of `k` numbers; records are made for `blocks` blocks, those beyond `k` zero.
    pub(super) fn quantise(x: &[f32], k: usize, blocks: usize, bias: i32, halves: bool) -> Self {
        assert!(k.is_multiple_of(BLOCK) && k <= blocks * BLOCK);
        let rows = if k == 0 { 0 } else { x.len() / k };
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
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` is of this machine.
        Isa::Avx512 | Isa::Amx => unsafe { quantise_row_avx512(x, bias, halves, records) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` is of this machine.
        Isa::Avx2 => unsafe { quantise_row_avx2(x, bias, halves, records) },
        _ => quantise_row_any(x, bias, halves, records),
    }
}

/// [`quantise_row_any`], compiled for AVX-512.
///
/// # Safety
/// The machine has AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn quantise_row_avx512(x: &[f32], bias: i32, halves: bool, records: &mut [Record]) {
    quantise_row_any(x, bias, halves, records);
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
    let (whole, padding) = records.split_at_mut(x.len() / BLOCK);
    for (values, record) in x.chunks_exact(BLOCK).zip(whole) {
        let values: &[f32; BLOCK] = values.try_into().expect("a whole block");
        *record = quantise_block(values, bias, halves);
    }
    padding.fill(bytemuck::Zeroable::zeroed());
}

#[inline(always)]
fn quantise_block(values: &[f32; BLOCK], bias: i32, halves: bool) -> Record {
    let mut lanes = [0.0f32; 16];
    for (lane, (a, b)) in lanes.iter_mut().zip(values[..16].iter().zip(&values[16..])) {
        let (a, b) = (a.abs(), b.abs());
        *lane = if a > b { a } else { b };
    }
    let mut width = 8;
    while width > 0 {
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] = if lanes[lane] > other { lanes[lane] } else { other };
        }
        width /= 2;
    }
    let largest = lanes[0];
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { 127.0 / largest } else { 0.0 };
    let mut codes = [0i8; BLOCK];
    for (code, value) in codes.iter_mut().zip(values) {
        *code = (value * inverse + ROUND).to_bits() as i8;
    }
    let half = |codes: &[i8]| codes.iter().map(|&code| i32::from(code)).sum::<i32>();
    let sums = [half(&codes[..16]), half(&codes[16..])];
    let sum = sums[0] + sums[1];
    let start = if halves { sums.map(|sum| -bias * sum) } else { [-bias * sum, 0] };
    // A number that is none makes the whole block none: it must not pass as a small integer.
    let scale = if values.iter().any(|value| value.is_nan()) { f32::NAN } else { scale };
    Record { codes, scale, start, sum: scale * sum as f32 }
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
        assert_eq!(quantise_block(&[0.0; BLOCK], 8, false).scale, 0.0);
        // A scale too small for its inverse: the block counts as it is, without an infinity.
        let tiny = quantise_block(&[f32::from_bits(3); BLOCK], 8, false);
        assert!(tiny.scale * f32::from(tiny.codes[0]) <= f32::from_bits(400));
        let mut values = [1.0; BLOCK];
        values[31] = f32::NAN;
        assert!(quantise_block(&values, 8, false).scale.is_nan());
        values[31] = f32::INFINITY;
        let record = quantise_block(&values, 8, false);
        assert!((record.scale * f32::from(record.codes[31])).is_infinite() || record.scale.is_infinite());
    }
}
