//! Packing with AVX-512: loads along whichever stride is 1, rounds to bf16 in the register, and transposes blocks of
//! 16 by 16 words where the packed layout runs across the source.

use std::arch::x86_64::*;

use super::kernels::Lines;
use super::mat::Numbers;
use super::packed::{BLOCK_WORDS, LANES};

/// Sixteen lines (or words) of sixteen words (or lines).
type Block = [__m512i; LANES];

/// See [`Kernels::pack_rows`](super::kernels::Kernels::pack_rows).
///
/// # Safety
/// `out` has room for the packed blocks; the machine has [`Isa::Avx512`](crate::isa::Isa::Avx512).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn pack_rows<const BF16: bool>(rows: &Lines, block_rows: usize, padded: usize, out: *mut u32) {
    let block_k = if BF16 { 2 * LANES } else { LANES };
    let (tiles, k_blocks) = (padded.div_ceil(LANES), rows.k.div_ceil(block_k));
    // In the order of the source, along its stride of 1.
    let along_k = rows.k_stride == 1;
    let (outer, inner) = if along_k { (tiles, k_blocks) } else { (k_blocks, tiles) };
    for outer in 0..outer {
        for inner in 0..inner {
            let (tile, k_block) = if along_k { (outer, inner) } else { (inner, outer) };
            let (row, k) = (tile * LANES, k_block * block_k);
            if along_k {
                prefetch_lines(rows, row + LANES, k);
            } else {
                prefetch_words::<BF16>(rows, row, k + block_k);
            }
            let mut words = load_block::<BF16>(rows, row, k);
            if !along_k {
                transpose(&mut words);
            }
            // The sixteen rows may belong to several blocks.
            let (mut block_start, mut in_block) = (row / block_rows * block_rows, row % block_rows);
            for &words in words.iter().take(padded - row) {
                if in_block == block_rows {
                    (block_start, in_block) = (block_start + block_rows, 0);
                }
                let height = block_rows.min(padded - block_start);
                let place = (block_start * k_blocks + k_block * height + in_block) * LANES;
                // SAFETY: a row of a packed block, for which the caller promised room.
                unsafe { _mm512_storeu_si512(out.add(place).cast(), words) };
                in_block += 1;
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
    let block_k = if BF16 { 2 * LANES } else { LANES };
    let (panels, k_blocks) = (columns.count.div_ceil(LANES), columns.k.div_ceil(block_k));
    // In the order of the source, along its stride of 1.
    let along_k = columns.k_stride == 1;
    let (outer, inner) = if along_k { (panels, k_blocks) } else { (k_blocks, panels) };
    for outer in 0..outer {
        for inner in 0..inner {
            let (panel, k_block) = if along_k { (outer, inner) } else { (inner, outer) };
            if along_k {
                prefetch_lines(columns, (panel + 1) * LANES, k_block * block_k);
            } else {
                prefetch_words::<BF16>(columns, panel * LANES, (k_block + 1) * block_k);
            }
            let mut block = load_block::<BF16>(columns, panel * LANES, k_block * block_k);
            if along_k {
                transpose(&mut block);
            }
            let first = panel * panel_words + k_block * BLOCK_WORDS;
            for (i, &words) in block.iter().enumerate() {
                // SAFETY: a row of the packed panel, for which the caller promised room and alignment.
                unsafe {
                    let out = out.add(first + i * LANES).cast();
                    if stream { _mm512_stream_si512(out, words) } else { _mm512_store_si512(out, words) }
                };
            }
        }
    }
    if stream {
        // Streamed stores wait for no lock and no atomic: make them seen before the panels are handed on.
        _mm_sfence();
    }
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

/// Sixteen lines from `line` on, along a k block from `k` on, zero where there are none: a register for each line when
/// the source runs along K, else one for each word.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn load_block<const BF16: bool>(lines: &Lines, line: usize, k: usize) -> Block {
    let block_k = if BF16 { 2 * LANES } else { LANES };
    let (count, k_count) = (lines.count.saturating_sub(line).min(LANES), (lines.k - k).min(block_k));
    let mut block = [_mm512_setzero_si512(); LANES];
    if count == 0 {
        return block;
    }
    let at = line * lines.line_stride + k * lines.k_stride;
    let data = match lines.data {
        Numbers::F32(data) => data,
        Numbers::Bf16(data) => {
            // SAFETY: as below.
            return unsafe { load_rounded(data.as_ptr().add(at), lines, count, k_count) };
        }
    };
    // SAFETY: inside the lines, as `Lines` checked when it was made; so are all the addresses below, which stay under
    // `count` lines and `k_count` elements.
    let start = unsafe { data.as_ptr().add(at) };
    if lines.k_stride == 1 {
        let (low, high) = (mask(k_count), mask(k_count.saturating_sub(LANES)));
        for (i, words) in block.iter_mut().enumerate().take(count) {
            // SAFETY: as above; the masks keep to `k_count` elements.
            *words = unsafe {
                let line = start.add(i * lines.line_stride);
                if BF16 && k_count == block_k {
                    round_pair(_mm512_loadu_ps(line.add(LANES)), _mm512_loadu_ps(line))
                } else if BF16 {
                    let far = line.wrapping_add(LANES);
                    round_pair(_mm512_maskz_loadu_ps(high, far), _mm512_maskz_loadu_ps(low, line))
                } else {
                    _mm512_castps_si512(_mm512_maskz_loadu_ps(low, line))
                }
            };
        }
    } else {
        let lanes = mask(count);
        for (i, words) in block.iter_mut().enumerate() {
            // SAFETY: as above; the mask keeps to `count` lines.
            let element = |k: usize| unsafe {
                if k < k_count {
                    _mm512_maskz_loadu_ps(lanes, start.add(k * lines.k_stride))
                } else {
                    _mm512_setzero_ps()
                }
            };
            *words = if BF16 {
                interleave(round_pair(element(2 * i + 1), element(2 * i)))
            } else {
                _mm512_castps_si512(element(i))
            };
        }
    }
    block
}

/// As [`load_block`] for a source of bf16: nothing to round.
///
/// # Safety
/// At `start` stand `count` lines, with the strides of `lines`, of `k_count` elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn load_rounded(start: *const u16, lines: &Lines, count: usize, k_count: usize) -> Block {
    let mut block = [_mm512_setzero_si512(); LANES];
    if lines.k_stride == 1 {
        let elements: __mmask32 = if k_count >= 2 * LANES { !0 } else { (1 << k_count) - 1 };
        for (i, words) in block.iter_mut().enumerate().take(count) {
            // SAFETY: the caller's promise; the mask keeps to `k_count` elements.
            *words = unsafe { _mm512_maskz_loadu_epi16(elements, start.add(i * lines.line_stride).cast()) };
        }
        return block;
    }
    let lanes = mask(count);
    let element = |k: usize| match k < k_count {
        // SAFETY: the caller's promise; the mask keeps to `count` lines.
        true => unsafe { _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, start.add(k * lines.k_stride).cast())) },
        false => _mm512_setzero_si512(),
    };
    for (i, words) in block.iter_mut().enumerate() {
        *words = _mm512_or_si512(element(2 * i), _mm512_slli_epi32::<16>(element(2 * i + 1)));
    }
    block
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
    const ORDER: [u16; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 32 {
            order[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        order
    };
    // SAFETY: two types for the same 512 bits.
    let order: __m512i = unsafe { std::mem::transmute(ORDER) };
    _mm512_permutexvar_epi16(order, halves)
}

/// Transposes sixteen by sixteen words.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: &mut Block) {
    let mut turned = *rows;
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
}
