//! Q8_0: signed bytes with an f16 scale for each 32.
//!
//! Published block: scale, 32 codes. Unit of two blocks: `[2][16]` scales, then `[2][8 groups][16 columns][4]` codes + 128.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use super::layout::x86;
use super::layout::{BLOCK, GROUPS, Group, LANES, Layout, Width, halves, put_bytes, put_half};

pub(super) struct Q8;

const SOURCE_BLOCK: usize = 2 + BLOCK;
const CODES: usize = 64;
const BLOCK_BYTES: usize = BLOCK * LANES;

impl Layout for Q8 {
    const UNIT_BLOCKS: usize = 2;
    const UNIT_BYTES: usize = CODES + 2 * BLOCK_BYTES;
    const SOURCE_BYTES: usize = 2 * SOURCE_BLOCK;
    const BIAS: i32 = 128;
    const HALVES: bool = false;
    const AFFINE: bool = false;
    const WIDTH: Width = Width::Signed;

    fn pack(source: &[u8], column: usize, unit: &mut [u8]) {
        for (index, block) in source.chunks_exact(SOURCE_BLOCK).enumerate() {
            put_half([block[0], block[1]], column, &mut unit[index * 32..]);
            let codes = std::array::from_fn(|k| block[2 + k] ^ 0x80);
            put_bytes(&codes, column, &mut unit[CODES + index * BLOCK_BYTES..]);
        }
    }

    fn codes(unit: &[u8], block: usize) -> [Group; GROUPS] {
        let codes = &unit[CODES + block * BLOCK_BYTES..];
        std::array::from_fn(|group| std::array::from_fn(|byte| codes[group * 64 + byte]))
    }

    fn scales(unit: &[u8], block: usize, _half: usize) -> [f32; LANES] {
        halves(&unit[block * 32..])
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn codes_512(unit: *const u8, block: usize, group: usize) -> __m512i {
        // SAFETY: inside the unit.
        unsafe { _mm512_loadu_si512(unit.add(CODES + block * BLOCK_BYTES + group * 64).cast()) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales_512(unit: *const u8, block: usize, _half: usize) -> __m512 {
        // SAFETY: inside the unit.
        unsafe { x86::halves_512(unit.add(block * 32)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mins_512(_unit: *const u8, _block: usize) -> __m512 {
        _mm512_setzero_ps()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn codes_256(unit: *const u8, block: usize, group: usize, side: usize) -> [__m256i; 2] {
        // SAFETY: both inside the unit.
        unsafe {
            let codes = unit.add(CODES + block * BLOCK_BYTES + group * 64 + side * 32);
            let flip = _mm256_set1_epi8(-128);
            [_mm256_loadu_si256(codes.cast()), _mm256_loadu_si256(codes.add(4 * 64).cast())]
                .map(|codes| _mm256_xor_si256(codes, flip))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales_256(unit: *const u8, block: usize, _half: usize, side: usize) -> __m256 {
        // SAFETY: inside the unit.
        unsafe { x86::halves_256(unit.add(block * 32), side) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn mins_256(_unit: *const u8, _block: usize, _side: usize) -> __m256 {
        _mm256_setzero_ps()
    }
}
