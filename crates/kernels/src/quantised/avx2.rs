//! The quantised products on AVX2: `vpmaddubsw` multiplies bytes and adds neighbours in 16 bits; where the processor has
//! AVX-VNNI (Alder Lake, Zen 5 and later), `vpdpbusd` adds four products in 32 bits at once.
//!
//! Every sum of integers is exact, so the results are those of the other instruction sets to the bit.

use std::arch::x86_64::*;

use super::activations::Record;
use super::driver::Tile;
use super::layout::{GROUPS, LANES, Layout, Scales, Width, x86};

/// Rows that one call takes at most.
pub(super) const ROWS: usize = 4;

/// One panel times the rows of `tile`, at most [`ROWS`].
///
/// # Safety
/// As [`Tile`] says, on a machine with AVX2, and with AVX-VNNI if `VNNI`.
pub(super) unsafe fn multiply<L: Layout, const VNNI: bool>(tile: &Tile) {
    // SAFETY: handed on.
    unsafe {
        match tile.rows.len() {
            1 => compiled::<L, 1, VNNI>(tile),
            2 => compiled::<L, 2, VNNI>(tile),
            3 => compiled::<L, 3, VNNI>(tile),
            4 => compiled::<L, 4, VNNI>(tile),
            rows => unreachable!("a block of {rows} rows"),
        }
    }
}

/// [`rows`], compiled for the one or the other.
unsafe fn compiled<L: Layout, const N: usize, const VNNI: bool>(tile: &Tile) {
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn plain<L: Layout, const N: usize>(tile: &Tile) {
        // SAFETY: handed on.
        unsafe { rows::<L, N, false>(tile) }
    }
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn vnni<L: Layout, const N: usize>(tile: &Tile) {
        // SAFETY: handed on.
        unsafe { rows::<L, N, true>(tile) }
    }
    // SAFETY: handed on.
    unsafe { if VNNI { vnni::<L, N>(tile) } else { plain::<L, N>(tile) } }
}

/// Inlined into what has the instruction set.
#[inline(always)]
unsafe fn rows<L: Layout, const N: usize, const VNNI: bool>(tile: &Tile) {
    let records: [*const Record; N] = std::array::from_fn(|row| tile.rows[row]);
    let mut unit = tile.panel;
    // SAFETY: `Tile` says that the panel has these units, the rows these records, C these rows and columns; the caller has
    // the instructions.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); N]; 2];
        for index in 0..tile.units {
            for block in 0..L::UNIT_BLOCKS {
                if tile.fetch {
                    x86::fetch_ahead::<L>(unit, block);
                }
                let records: [&Record; N] = records.map(|row| &*row.add(index * L::UNIT_BLOCKS + block));
                for (side, sums) in sums.iter_mut().enumerate() {
                    let products = block_products::<L, N, VNNI>(unit, block, side, &records);
                    for half in 0..L::PARTS {
                        let scales = L::Scales::scales_256(unit, block, half, side);
                        for ((sum, products), record) in sums.iter_mut().zip(&products).zip(records) {
                            let start = if L::AFFINE_HALVES { 0 } else { record.start[half] };
                            let product = _mm256_add_epi32(products[half], _mm256_set1_epi32(start));
                            let scale = _mm256_mul_ps(scales, _mm256_set1_ps(record.scale));
                            *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), scale, *sum);
                        }
                        if L::AFFINE {
                            let mins = L::Scales::mins_256(unit, block, half, side);
                            for (sum, record) in sums.iter_mut().zip(records) {
                                *sum = _mm256_fnmadd_ps(mins, _mm256_set1_ps(record.part::<L>(half)), *sum);
                            }
                        }
                    }
                }
            }
            unit = unit.add(L::UNIT_BYTES);
        }
        let [left, right] = sums;
        for (row, (left, right)) in left.into_iter().zip(right).enumerate() {
            let mut edge = [0.0; LANES];
            let c = tile.c.add(row * tile.c_stride);
            let target = if tile.columns < LANES { edge.as_mut_ptr() } else { c };
            _mm256_storeu_ps(target, left);
            _mm256_storeu_ps(target.add(LANES / 2), right);
            if tile.columns < LANES {
                std::slice::from_raw_parts_mut(c, tile.columns).copy_from_slice(&edge[..tile.columns]);
            }
        }
    }
}

/// The sums of a block's products for eight columns, of its two halves, or of the whole in the first. What signed codes
/// need no correction for is taken from the start again.
#[inline(always)]
unsafe fn block_products<L: Layout, const N: usize, const VNNI: bool>(
    unit: *const u8,
    block: usize,
    side: usize,
    records: &[&Record; N],
) -> [[__m256i; 2]; N] {
    // SAFETY: the unit is whole, and so are the records; the caller has the instructions.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        for group in 0..GROUPS / 2 {
            let pair = L::codes_256(unit, block, group, side);
            for (half, codes) in pair.into_iter().enumerate() {
                let target = if L::HALVES { half } else { 0 };
                for row in 0..N {
                    let words: *const i32 = records[row].codes.as_ptr().cast();
                    let a = _mm256_set1_epi32(words.add(group + half * GROUPS / 2).read());
                    let sum = &mut sums[row][target];
                    *sum = match L::WIDTH {
                        Width::Nibble | Width::Byte if VNNI => _mm256_dpbusd_avx_epi32(*sum, codes, a),
                        Width::Signed if VNNI => {
                            _mm256_dpbusd_avx_epi32(*sum, _mm256_abs_epi8(codes), _mm256_sign_epi8(a, codes))
                        }
                        Width::Nibble => _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, a)),
                        Width::Byte => _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, a), ones)),
                        Width::Signed => {
                            let products = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(a, codes));
                            _mm256_add_epi32(*sum, _mm256_madd_epi16(products, ones))
                        }
                    };
                }
            }
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            if L::WIDTH == Width::Nibble && !VNNI {
                *sums = sums.map(|sum| _mm256_madd_epi16(sum, ones));
            }
            if L::WIDTH == Width::Signed {
                sums[0] = _mm256_sub_epi32(sums[0], _mm256_set1_epi32(records[row].start[0]));
            }
        }
        sums
    }
}
