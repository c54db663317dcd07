//! The quantised products on AVX-512: `vpdpbusd` adds four products of bytes to each of sixteen columns.

use std::arch::x86_64::*;

use super::activations::Record;
use super::driver::Tile;
use super::layout::{GROUPS, LANES, Layout, Scales, x86};

/// Rows that one call takes at most: their sums and products fit into the registers.
pub(super) const ROWS: usize = 8;

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
            rows => unreachable!("a block of {rows} rows"),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn rows<L: Layout, const N: usize>(tile: &Tile) {
    const { assert!(GROUPS == 8) };
    let mut sums = [_mm512_setzero_ps(); N];
    let records: [*const Record; N] = std::array::from_fn(|row| tile.rows[row]);
    let mut unit = tile.panel;
    // SAFETY: `Tile` says that the panel has these units, the rows these records, C these rows and columns.
    unsafe {
        for index in 0..tile.units {
            for block in 0..L::UNIT_BLOCKS {
                if tile.fetch {
                    x86::fetch_ahead::<L>(unit, block);
                }
                let records: [&Record; N] = records.map(|row| &*row.add(index * L::UNIT_BLOCKS + block));
                let mut products = [_mm512_setzero_si512(); N];
                // Macros, so that groups and halves are constants for any N: loops over them are not always unrolled.
                macro_rules! start {
                    ($half:literal) => {
                        for (product, record) in products.iter_mut().zip(records) {
                            let start = if L::AFFINE_HALVES { 0 } else { record.start[$half] };
                            *product = _mm512_set1_epi32(start);
                        }
                    };
                }
                macro_rules! multiply {
                    ($($group:literal)*) => {$(
                        let codes = L::codes_512(unit, block, $group);
                        for (product, record) in products.iter_mut().zip(records) {
                            let a = _mm512_set1_epi32(record.codes.as_ptr().cast::<i32>().add($group).read());
                            *product = _mm512_dpbusd_epi32(*product, codes, a);
                        }
                    )*};
                }
                macro_rules! add {
                    ($half:literal) => {
                        let scales = L::Scales::scales_512(unit, block, $half);
                        for ((sum, product), record) in sums.iter_mut().zip(products).zip(records) {
                            let scale = _mm512_mul_ps(scales, _mm512_set1_ps(record.scale));
                            *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), scale, *sum);
                        }
                        if L::AFFINE {
                            let mins = L::Scales::mins_512(unit, block, $half);
                            for (sum, record) in sums.iter_mut().zip(records) {
                                *sum = _mm512_fnmadd_ps(mins, _mm512_set1_ps(record.part::<L>($half)), *sum);
                            }
                        }
                    };
                }
                start!(0);
                multiply!(0 1 2 3);
                if L::HALVES {
                    add!(0);
                    start!(1);
                    multiply!(4 5 6 7);
                    add!(1);
                } else {
                    multiply!(4 5 6 7);
                    add!(0);
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
