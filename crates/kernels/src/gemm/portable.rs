//! The products in plain loops: for any processor, and the reference that each instruction set is compared with.

use super::Precision;
use super::kernels::{BlockProduct, Kernels, Lines};
use super::packed::{BLOCK_WORDS, LANES};

pub(super) static F32: Kernels = Kernels {
    block_rows: 8,
    row_multiple: 1,
    k_blocks: 16,
    precision: Precision::F32,
    takes_unpacked: false,
    pack_rows: pack_rows::<false>,
    pack_panels: pack_panels::<false>,
    multiply: multiply::<false>,
};

pub(super) static BF16: Kernels = Kernels {
    precision: Precision::Bf16,
    pack_rows: pack_rows::<true>,
    pack_panels: pack_panels::<true>,
    multiply: multiply::<true>,
    ..F32
};

/// Sixteen lines (or words) of sixteen words (or lines).
type Block = [[u32; LANES]; LANES];

/// See [`Kernels::pack_rows`].
///
/// # Safety
/// `out` has room for the packed blocks.
#[inline(always)]
pub(super) unsafe fn pack_rows<const BF16: bool>(rows: &Lines, block_rows: usize, padded: usize, out: *mut u32) {
    let block_k = if BF16 { 2 * LANES } else { LANES };
    let k_blocks = rows.k.div_ceil(block_k);
    // SAFETY: the caller's promise.
    let out = unsafe { std::slice::from_raw_parts_mut(out, k_blocks * padded * LANES) };
    for k_block in 0..k_blocks {
        for first in (0..padded).step_by(LANES) {
            let mut block = load_block::<BF16>(rows, first, k_block * block_k);
            if rows.k_stride != 1 {
                transpose(&mut block);
            }
            for (row, words) in (first..padded).zip(&block) {
                let block_start = row / block_rows * block_rows;
                let height = block_rows.min(padded - block_start);
                let place = block_start * k_blocks + k_block * height + row - block_start;
                out[place * LANES..][..LANES].copy_from_slice(words);
            }
        }
    }
}

/// See [`Kernels::pack_panels`]. Streaming past the cache is left to others.
///
/// # Safety
/// `out` has room for the panels.
#[inline(always)]
pub(super) unsafe fn pack_panels<const BF16: bool>(columns: &Lines, panel_words: usize, _stream: bool, out: *mut u32) {
    let block_k = if BF16 { 2 * LANES } else { LANES };
    let (panels, k_blocks) = (columns.count.div_ceil(LANES), columns.k.div_ceil(block_k));
    // In the order of the source, along its stride of 1.
    let along_k = columns.k_stride == 1;
    for i in 0..panels * k_blocks {
        let (panel, k_block) = if along_k { (i / k_blocks, i % k_blocks) } else { (i % panels, i / panels) };
        let mut block = load_block::<BF16>(columns, panel * LANES, k_block * block_k);
        if along_k {
            transpose(&mut block);
        }
        let place = panel * panel_words + k_block * BLOCK_WORDS;
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(out.add(place), BLOCK_WORDS) }.copy_from_slice(block.as_flattened());
    }
}

/// Sixteen lines from `line` on, along a k block from `k` on, zero where there are none: an array for each line when
/// the source runs along K, else one for each word.
#[inline(always)]
fn load_block<const BF16: bool>(lines: &Lines, line: usize, k: usize) -> Block {
    let block_k = if BF16 { 2 * LANES } else { LANES };
    let mut block = [[0; LANES]; LANES];
    if lines.k_stride == 1 {
        for (i, words) in block.iter_mut().enumerate().take(lines.count.saturating_sub(line)) {
            let mut source = [0.0; 2 * LANES];
            let count = block_k.min(lines.k - k);
            lines.copy_run(line + i, k, &mut source[..count]);
            for (i, word) in words.iter_mut().enumerate() {
                *word = if BF16 { pair(source[2 * i], source[2 * i + 1]) } else { source[i].to_bits() };
            }
        }
        return block;
    }
    let count = lines.count.saturating_sub(line).min(LANES);
    let load = |k: usize| {
        let mut source = [0.0; LANES];
        if k < lines.k && count > 0 {
            lines.copy_run(line, k, &mut source[..count]);
        }
        source
    };
    for (i, words) in block.iter_mut().enumerate() {
        if BF16 {
            let (low, high) = (load(k + 2 * i), load(k + 2 * i + 1));
            for ((word, &low), &high) in words.iter_mut().zip(&low).zip(&high) {
                *word = pair(low, high);
            }
        } else {
            *words = load(k + i).map(f32::to_bits);
        }
    }
    block
}

/// Two f32 rounded to bf16, the first in the low half.
#[inline(always)]
fn pair(low: f32, high: f32) -> u32 {
    round(low) >> 16 | round(high) & 0xffff_0000
}

/// The bits of the nearest bf16, ties to even, in the high half (the low half is rubbish). A NaN stays one.
#[inline(always)]
pub(super) fn round(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if value.is_nan() { bits | 0x0040_0000 } else { rounded }
}

#[inline(always)]
fn transpose(block: &mut Block) {
    let source = *block;
    for (i, words) in block.iter_mut().enumerate() {
        for (j, word) in words.iter_mut().enumerate() {
            *word = source[j][i];
        }
    }
}

/// See [`Kernels::multiply`].
///
/// # Safety
/// As [`Kernels::multiply`] asks.
unsafe fn multiply<const BF16: bool>(product: &BlockProduct) {
    let &BlockProduct { rows, k_blocks, columns, .. } = product;
    for row in 0..rows {
        for first in (0..columns).step_by(LANES) {
            let width = LANES.min(columns - first);
            // SAFETY: the pointers hold what `BlockProduct` says: this row of C, this row of A in each k block, and
            // this panel of B.
            let (c, panel) = unsafe {
                let c = std::slice::from_raw_parts_mut(product.c.add(row * product.c_stride + first), width);
                let panel = product.b.add(first / LANES * product.panel_stride);
                (c, std::slice::from_raw_parts(panel, k_blocks * BLOCK_WORDS))
            };
            let mut sums = [0.0; LANES];
            if product.accumulate {
                sums[..width].copy_from_slice(c);
            }
            for (block, panel) in panel.chunks_exact(BLOCK_WORDS).enumerate() {
                // SAFETY: as above.
                let a = unsafe { std::slice::from_raw_parts(product.a.add((block * rows + row) * LANES), LANES) };
                for (&a, b) in a.iter().zip(panel.chunks_exact(LANES)) {
                    add_word::<BF16>(&mut sums, a, b);
                }
            }
            c.copy_from_slice(&sums[..width]);
        }
    }
}

/// `sums += a b`, for one word along K and 16 columns.
#[inline(always)]
fn add_word<const BF16: bool>(sums: &mut [f32; LANES], a: u32, b: &[u32]) {
    let low = |word: u32| f32::from_bits(word << 16);
    let high = |word: u32| f32::from_bits(word & 0xffff_0000);
    for (sum, &b) in sums.iter_mut().zip(b) {
        if BF16 {
            *sum += low(a) * low(b);
            *sum += high(a) * high(b);
        } else {
            *sum += f32::from_bits(a) * f32::from_bits(b);
        }
    }
}
