//! The quantised products on AVX-512: `vpdpbusd` adds four products of bytes to each of sixteen columns.

use std::arch::x86_64::*;

use super::activations::Record;
use super::driver::Tile;
use super::layout::{GROUPS, LANES, Layout};

/// Rows that one call takes at most.
pub(super) const ROWS: usize = 12;
/// Rows whose sums are in flight together: their chains of additions hide each other's latency.
const FLIGHT: usize = 4;
/// How far ahead of the codes in use memory is asked for, in bytes.
const AHEAD: usize = 4096;

/// One panel times the rows of `tile`, at most [`ROWS`].
///
/// # Safety
/// As [`Tile`] says, on a machine with AVX-512.
pub(super) unsafe fn multiply<L: Layout>(tile: &Tile) {
    // SAFETY: handed on.
    unsafe {
        match tile.rows.len() {
            1 => rows::<L, 1>(tile),
            2 => rows::<L, 2>(tile),
            3 => rows::<L, 3>(tile),
            4 => rows::<L, 4>(tile),
            5 => rows::<L, 5>(tile),
            6 => rows::<L, 6>(tile),
            7 => rows::<L, 7>(tile),
            8 => rows::<L, 8>(tile),
            9 => rows::<L, 9>(tile),
            10 => rows::<L, 10>(tile),
            11 => rows::<L, 11>(tile),
            12 => rows::<L, 12>(tile),
            rows => unreachable!("a block of {rows} rows"),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn rows<L: Layout, const N: usize>(tile: &Tile) {
    let mut sums = [_mm512_setzero_ps(); N];
    let records: [*const Record; N] = std::array::from_fn(|row| tile.rows[row]);
    let mut unit = tile.panel;
    // SAFETY: `Tile` says that the panel has these units, the rows these records, C these rows and columns.
    unsafe {
        for index in 0..tile.units {
            if N <= FLIGHT {
                for line in 0..L::UNIT_BYTES / 64 {
                    _mm_prefetch::<_MM_HINT_T0>(unit.wrapping_add(AHEAD + line * 64).cast());
                }
            }
            for block in 0..L::UNIT_BLOCKS {
                let codes = L::codes_512(unit, block);
                let scales = [L::scales_512(unit, block, 0), L::scales_512(unit, block, usize::from(L::HALVES))];
                let mins = L::mins_512(unit, block);
                let at = index * L::UNIT_BLOCKS + block;
                for first in (0..N).step_by(FLIGHT) {
                    let last = if first + FLIGHT < N { first + FLIGHT } else { N };
                    let mut products = [_mm512_setzero_si512(); FLIGHT];
                    for (half, scale) in scales.iter().enumerate() {
                        if half == 0 || L::HALVES {
                            for row in first..last {
                                products[row - first] = _mm512_set1_epi32((*records[row].add(at)).start[half]);
                            }
                        }
                        for group in half * GROUPS / 2..(half + 1) * GROUPS / 2 {
                            for row in first..last {
                                let words: *const i32 = (&raw const (*records[row].add(at)).codes).cast();
                                let a = _mm512_set1_epi32(words.add(group).read());
                                products[row - first] = _mm512_dpbusd_epi32(products[row - first], codes[group], a);
                            }
                        }
                        if half == 1 || L::HALVES {
                            for row in first..last {
                                let scale = _mm512_mul_ps(*scale, _mm512_set1_ps((*records[row].add(at)).scale));
                                sums[row] =
                                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[row - first]), scale, sums[row]);
                            }
                        }
                    }
                    if L::AFFINE {
                        for row in first..last {
                            let sum = _mm512_set1_ps((*records[row].add(at)).sum);
                            sums[row] = _mm512_fnmadd_ps(mins, sum, sums[row]);
                        }
                    }
                }
            }
            unit = unit.add(L::UNIT_BYTES);
        }
        let mask: __mmask16 = if tile.columns == LANES { !0 } else { (1 << tile.columns) - 1 };
        for (row, sum) in sums.into_iter().enumerate() {
            _mm512_mask_storeu_ps(tile.c.add(row * tile.c_stride), mask, sum);
        }
    }
}
