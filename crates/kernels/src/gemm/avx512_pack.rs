//! Packing with AVX-512: loads along whichever stride is 1, rounds to bf16 in the register, and transposes blocks of
//! 16 by 16 words where the packed layout runs across the source.

use std::arch::x86_64::*;

use super::kernels::Lines;
use super::packed::{BLOCK_WORDS, LANES};
use crate::narrow::Numbers;
use crate::simd::x86::PAIRS;

/// Sixteen lines (or words) of sixteen words (or lines).
type Block = [__m512i; LANES];

/// See [`Kernels::pack_rows`](super::kernels::Kernels::pack_rows).
///
/// # Safety
/// `out` has room for the packed blocks; the machine has [`Isa::Avx512`](crate::isa::Isa::Avx512).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn pack_rows<const BF16: bool>(rows: &Lines, block_rows: usize, padded: usize, out: *mut u32) {
    let k_blocks = rows.k.div_ceil(block_k(BF16));
    let blocks = RowBlocks { block_rows, padded, k_blocks, out };
    // SAFETY: handed on.
    unsafe {
        match rows.k_stride == 1 {
            true => pack_rows_along::<BF16>(rows, &blocks),
            false => pack_rows_across::<BF16>(rows, &blocks),
        }
    }
}

/// Where packed rows go: `[blocks of rows][k blocks][rows of the block][16 words]`.
struct RowBlocks {
    block_rows: usize,
    /// Rows of all blocks.
    padded: usize,
    k_blocks: usize,
    out: *mut u32,
}

impl RowBlocks {
    /// The words of `row` at k block 0, and how far it is from a k block to the next.
    #[inline]
    fn row(&self, row: usize) -> (*mut u32, usize) {
        debug_assert!(row < self.padded);
        let in_block = row % self.block_rows;
        let block_start = row - in_block;
        let height = self.block_rows.min(self.padded - block_start);
        (self.out.wrapping_add((block_start * self.k_blocks + in_block) * LANES), height * LANES)
    }
}

/// Row after row, in the order of the source.
///
/// # Safety
/// As [`pack_rows`]; rows run along K.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn pack_rows_along<const BF16: bool>(rows: &Lines, blocks: &RowBlocks) {
    let block_k = block_k(BF16);
    for row in 0..blocks.padded {
        let (mut out, step) = blocks.row(row);
        for k in (0..rows.k).step_by(block_k) {
            let count = if row < rows.count { (rows.k - k).min(block_k) } else { 0 };
            // SAFETY: the caller's promises: `count` elements are there, and room for a row of a packed block.
            unsafe { _mm512_storeu_si512(out.cast(), load_along::<BF16>(rows, row, k, count)) };
            out = out.wrapping_add(step);
        }
    }
}

/// K block after k block, in the order of the source.
///
/// # Safety
/// As [`pack_rows`]; rows run across K.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn pack_rows_across<const BF16: bool>(rows: &Lines, blocks: &RowBlocks) {
    let block_k = block_k(BF16);
    let tiles = blocks.padded.div_ceil(LANES);
    for k_block in 0..blocks.k_blocks {
        for tile in 0..tiles {
            let (row, k) = (tile * LANES, k_block * block_k);
            prefetch_words::<BF16>(rows, row, k + block_k);
            // The sixteen rows may belong to several blocks.
            let there = (blocks.padded - row).min(LANES);
            let place = |i: usize| {
                let (start, step) = blocks.row(row + i);
                start.wrapping_add(k_block * step)
            };
            if rows.count >= row + LANES && rows.k >= k + block_k {
                // SAFETY: the caller's promise, as below; sixteen rows and a whole k block are there.
                let words = transpose(unsafe { load_across::<BF16, true>(rows, row, k) });
                for (i, words) in words.into_iter().enumerate() {
                    // SAFETY: a row of a packed block, for which the caller promised room.
                    unsafe { _mm512_storeu_si512(place(i).cast(), words) };
                }
            } else {
                // SAFETY: as above; what is not there is not read.
                let words = transpose(unsafe { load_across::<BF16, false>(rows, row, k) });
                for (i, words) in words.into_iter().enumerate().take(there) {
                    // SAFETY: as above.
                    unsafe { _mm512_storeu_si512(place(i).cast(), words) };
                }
            }
        }
    }
}

/// See [`Kernels::pack_panels`](super::kernels::Kernels::pack_panels).
///
/// # Safety
/// `out` has room for the panels and is 64-byte aligned; the machine has [`Isa::Avx512`](crate::isa::Isa::Avx512).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn pack_panels<const BF16: bool>(columns: &Lines, panel_words: usize, stream: bool, out: *mut u32) {
    // SAFETY: handed on.
    unsafe {
        match (columns.k_stride == 1, stream) {
            (true, true) => panels_along::<BF16, true>(columns, panel_words, out),
            (true, false) => panels_along::<BF16, false>(columns, panel_words, out),
            (false, true) => panels_across::<BF16, true>(columns, panel_words, out),
            (false, false) => panels_across::<BF16, false>(columns, panel_words, out),
        }
    }
    if stream {
        // Streamed stores wait for no lock and no atomic: make them seen before the panels are handed on.
        _mm_sfence();
    }
}

/// Panel after panel, in the order of the source.
///
/// # Safety
/// As [`pack_panels`]; columns run along K.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn panels_along<const BF16: bool, const STREAM: bool>(columns: &Lines, panel_words: usize, out: *mut u32) {
    let block_k = block_k(BF16);
    for (panel, column) in (0..columns.count).step_by(LANES).enumerate() {
        let mut out = out.wrapping_add(panel * panel_words);
        for k in (0..columns.k).step_by(block_k) {
            prefetch_lines(columns, column + LANES, k);
            let (count, k_count) = ((columns.count - column).min(LANES), (columns.k - k).min(block_k));
            // SAFETY: the caller's promises: what is counted is there, and room for a k block of a panel.
            unsafe {
                if count == LANES && k_count == block_k {
                    let lines = std::array::from_fn(|i| load_along::<BF16>(columns, column + i, k, block_k));
                    store::<STREAM>(transpose(lines), out);
                } else {
                    let lines = std::array::from_fn(|i| match i < count {
                        true => load_along::<BF16>(columns, column + i, k, k_count),
                        false => _mm512_setzero_si512(),
                    });
                    store::<STREAM>(transpose(lines), out);
                }
            }
            out = out.wrapping_add(BLOCK_WORDS);
        }
    }
}

/// K block after k block, in the order of the source.
///
/// # Safety
/// As [`pack_panels`]; columns run across K.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn panels_across<const BF16: bool, const STREAM: bool>(columns: &Lines, panel_words: usize, out: *mut u32) {
    let block_k = block_k(BF16);
    for (k_block, k) in (0..columns.k).step_by(block_k).enumerate() {
        for (panel, column) in (0..columns.count).step_by(LANES).enumerate() {
            let out = out.wrapping_add(panel * panel_words + k_block * BLOCK_WORDS);
            prefetch_words::<BF16>(columns, column, k + block_k);
            // SAFETY: the caller's promises: whole blocks are there, of others only what is there is read, and there is
            // room for a k block of a panel.
            unsafe {
                if columns.count >= column + LANES && columns.k >= k + block_k {
                    store::<STREAM>(load_across::<BF16, true>(columns, column, k), out);
                } else {
                    store::<STREAM>(load_across::<BF16, false>(columns, column, k), out);
                }
            }
        }
    }
}

/// Writes a k block of a panel, past the cache if wanted.
///
/// # Safety
/// `out` has room for it and is 64-byte aligned.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const STREAM: bool>(block: Block, out: *mut u32) {
    for (i, words) in block.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let out = out.add(i * LANES).cast();
            if STREAM { _mm512_stream_si512(out, words) } else { _mm512_store_si512(out, words) }
        };
    }
}

/// Elements along K of a k block.
const fn block_k(bf16: bool) -> usize {
    if bf16 { 2 * LANES } else { LANES }
}

/// Calls sixteen lines into the cache, along two cache lines from `k` on. The processor foresees a long run along one
/// line, not a step to the next.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch_lines(lines: &Lines, line: usize, k: usize) {
    for line in line..lines.count.min(line + LANES) {
        let start = lines.address(line, k);
        _mm_prefetch::<_MM_HINT_T1>(start);
        if matches!(lines.data, Numbers::F32(_)) {
            _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(64));
        }
    }
}

/// Calls the k block from `k` on of sixteen lines from `line` on into the cache, when the source runs across lines.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch_words<const BF16: bool>(lines: &Lines, line: usize, k: usize) {
    let block_k = if BF16 { 2 * LANES } else { LANES };
    for k in k..lines.k.min(k + block_k) {
        _mm_prefetch::<_MM_HINT_T1>(lines.address(line, k));
    }
}

/// `count` elements of a line that runs along K, from `k` on, as a block's words; zero behind them.
///
/// # Safety
/// The line has these elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn load_along<const BF16: bool>(lines: &Lines, line: usize, k: usize, count: usize) -> __m512i {
    let at = line * lines.line_stride + k;
    // SAFETY: the caller's promise; the masks keep to `count` elements, and masked lanes may lie outside.
    unsafe {
        match lines.data {
            Numbers::Bf16(data) => {
                let elements: __mmask32 = if count >= 2 * LANES { !0 } else { (1 << count) - 1 };
                _mm512_maskz_loadu_epi16(elements, data.as_ptr().wrapping_add(at).cast())
            }
            Numbers::F32(data) => {
                let line = data.as_ptr().wrapping_add(at);
                if !BF16 {
                    return _mm512_castps_si512(_mm512_maskz_loadu_ps(mask(count), line));
                }
                let far = line.wrapping_add(LANES);
                if count >= 2 * LANES {
                    return round_pair(_mm512_loadu_ps(far), _mm512_loadu_ps(line));
                }
                let high = _mm512_maskz_loadu_ps(mask(count.saturating_sub(LANES)), far);
                round_pair(high, _mm512_maskz_loadu_ps(mask(count), line))
            }
        }
    }
}

/// Sixteen lines from `line` on, that run across K, along a k block from `k` on: a register for each word, zero where
/// there is nothing.
///
/// # Safety
/// If `WHOLE`, sixteen lines of a whole k block are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn load_across<const BF16: bool, const WHOLE: bool>(lines: &Lines, line: usize, k: usize) -> Block {
    let lanes = if WHOLE { !0 } else { mask(lines.count.saturating_sub(line)) };
    let is_there = |k: usize| WHOLE || k < lines.k;
    let at = |k: usize| line * lines.line_stride + k * lines.k_stride;
    match lines.data {
        Numbers::F32(data) => {
            let element = |k: usize| match is_there(k) {
                // SAFETY: as promised, or the mask keeps to the lines that are there.
                true => unsafe { _mm512_maskz_loadu_ps(lanes, data.as_ptr().wrapping_add(at(k))) },
                false => _mm512_setzero_ps(),
            };
            std::array::from_fn(|i| match BF16 {
                true => interleave(round_pair(element(k + 2 * i + 1), element(k + 2 * i))),
                false => _mm512_castps_si512(element(k + i)),
            })
        }
        Numbers::Bf16(data) => {
            let element = |k: usize| match is_there(k) {
                // SAFETY: as above.
                true => unsafe {
                    _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, data.as_ptr().wrapping_add(at(k)).cast()))
                },
                false => _mm512_setzero_si512(),
            };
            std::array::from_fn(|i| {
                _mm512_or_si512(element(k + 2 * i), _mm512_slli_epi32::<16>(element(k + 2 * i + 1)))
            })
        }
    }
}

fn mask(lanes: usize) -> __mmask16 {
    if lanes >= LANES { !0 } else { (1 << lanes) - 1 }
}

/// Thirty-two bf16: those of `low`, then those of `high`.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn round_pair(high: __m512, low: __m512) -> __m512i {
    // SAFETY: two types for the same 512 bits.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

/// From two halves of sixteen bf16 to sixteen pairs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave(halves: __m512i) -> __m512i {
    // SAFETY: two types for the same 512 bits.
    let order: __m512i = unsafe { std::mem::transmute(PAIRS) };
    _mm512_permutexvar_epi16(order, halves)
}

/// Transposes sixteen by sixteen words.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: Block) -> Block {
    let [mut rows, mut turned] = [rows, rows];
    for i in 0..8 {
        turned[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        turned[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for i in (0..LANES).step_by(4) {
        rows[i] = _mm512_unpacklo_epi64(turned[i], turned[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(turned[i], turned[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(turned[i + 1], turned[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(turned[i + 1], turned[i + 3]);
    }
    for i in 0..4 {
        turned[i] = _mm512_shuffle_i32x4::<0x88>(rows[i], rows[i + 4]);
        turned[i + 4] = _mm512_shuffle_i32x4::<0xdd>(rows[i], rows[i + 4]);
        turned[i + 8] = _mm512_shuffle_i32x4::<0x88>(rows[i + 8], rows[i + 12]);
        turned[i + 12] = _mm512_shuffle_i32x4::<0xdd>(rows[i + 8], rows[i + 12]);
    }
    for i in 0..8 {
        rows[i] = _mm512_shuffle_i32x4::<0x88>(turned[i], turned[i + 8]);
        rows[i + 8] = _mm512_shuffle_i32x4::<0xdd>(turned[i], turned[i + 8]);
    }
    rows
}
