//! The products in plain loops: for any processor, and the reference that each instruction set is compared with.

use half::bf16;

use super::Precision;
use super::kernels::{BlockProduct, Kernels, Lines};
use super::packed::{BLOCK_WORDS, LANES};

pub(super) static F32: Kernels = Kernels {
    block_rows: 8,
    row_multiple: 1,
    k_blocks: 16,
    precision: Precision::F32,
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

/// The word that holds what follows along K from word `word` of line `line`.
#[inline(always)]
fn word<const BF16: bool>(lines: &Lines, line: usize, word: usize) -> u32 {
    if BF16 {
        let half = |k| u32::from(bf16::from_f32(lines.at(line, k)).to_bits());
        half(2 * word) | half(2 * word + 1) << 16
    } else {
        lines.at(line, word).to_bits()
    }
}

/// See [`Kernels::pack_rows`].
///
/// # Safety
/// `out` has room for the packed blocks.
#[inline(always)]
pub(super) unsafe fn pack_rows<const BF16: bool>(rows: &Lines, block_rows: usize, padded: usize, out: *mut u32) {
    let k_blocks = if BF16 { Precision::Bf16 } else { Precision::F32 }.k_blocks(rows.k);
    // SAFETY: the caller's promise.
    let out = unsafe { std::slice::from_raw_parts_mut(out, k_blocks * padded * LANES) };
    let block_words = (block_rows * k_blocks * LANES).max(1);
    for (block, out) in out.chunks_mut(block_words).enumerate() {
        let height = out.len() / (k_blocks * LANES);
        for (place, out) in out.iter_mut().enumerate() {
            let (k_block, row, lane) = (place / (height * LANES), place / LANES % height, place % LANES);
            *out = word::<BF16>(rows, block * block_rows + row, k_block * LANES + lane);
        }
    }
}

/// See [`Kernels::pack_panels`].
///
/// # Safety
/// `out` has room for the panels.
#[inline(always)]
pub(super) unsafe fn pack_panels<const BF16: bool>(columns: &Lines, panel_words: usize, _stream: bool, out: *mut u32) {
    // SAFETY: the caller's promise.
    let out = unsafe { std::slice::from_raw_parts_mut(out, columns.count.div_ceil(LANES) * panel_words) };
    if panel_words == 0 {
        return;
    }
    for (panel, out) in out.chunks_exact_mut(panel_words).enumerate() {
        for (place, out) in out.iter_mut().enumerate() {
            *out = word::<BF16>(columns, panel * LANES + place % LANES, place / LANES);
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
