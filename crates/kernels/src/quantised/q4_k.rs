//! Q4_K: four-bit codes in super-blocks of 256, with a six-bit scale and minimum for each 32.
//!
//! Published block: f16 d, f16 dmin, 12 bytes of six-bit scales and minima, 128 bytes of codes, each 32 bytes holding
//! two blocks of 32, the first in the low halves. Unit of eight blocks: `[16]` d, `[16]` dmin, `[8][16]` scales,
//! `[8][16]` minima, `[8][4 groups][16 columns][4]` pairs of codes.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use super::layout::x86;
use super::layout::{BLOCK, GROUPS, Group, LANES, Layout, Width, halves, nibbles, put_half, put_nibbles};

pub(super) struct Q4K;

const BLOCKS: usize = 8;
const MIN_FACTOR: usize = 32;
const SCALES: usize = 64;
const MINS: usize = SCALES + BLOCKS * LANES;
const CODES: usize = MINS + BLOCKS * LANES;
const BLOCK_BYTES: usize = BLOCK / 2 * LANES;

/// Scale and minimum of block `index` from the twelve bytes: the first four of each in the low six bits of a byte, the
/// others' low four bits in bytes 8 to 11 and their high two bits above the first four.
pub(super) fn scale_and_min(bytes: &[u8], index: usize) -> (u8, u8) {
    if index < 4 {
        (bytes[index] & 63, bytes[index + 4] & 63)
    } else {
        let low = bytes[index + 4];
        (low & 15 | bytes[index - 4] >> 6 << 4, low >> 4 | bytes[index] >> 6 << 4)
    }
}

impl Layout for Q4K {
    const UNIT_BLOCKS: usize = BLOCKS;
    const UNIT_BYTES: usize = CODES + BLOCKS * BLOCK_BYTES;
    const SOURCE_BYTES: usize = 144;
    const BIAS: i32 = 0;
    const HALVES: bool = false;
    const AFFINE: bool = true;
    const WIDTH: Width = Width::Nibble;

    fn pack(source: &[u8], column: usize, unit: &mut [u8]) {
        put_half([source[0], source[1]], column, unit);
        put_half([source[2], source[3]], column, &mut unit[MIN_FACTOR..]);
        for block in 0..BLOCKS {
            let (scale, min) = scale_and_min(&source[4..16], block);
            unit[SCALES + block * LANES + column] = scale;
            unit[MINS + block * LANES + column] = min;
            let pairs = &source[16 + block / 2 * 32..][..32];
            let codes = std::array::from_fn(|k| if block % 2 == 0 { pairs[k] & 15 } else { pairs[k] >> 4 });
            put_nibbles(&codes, column, &mut unit[CODES + block * BLOCK_BYTES..]);
        }
    }

    fn codes(unit: &[u8], block: usize) -> [Group; GROUPS] {
        nibbles(&unit[CODES + block * BLOCK_BYTES..])
    }

    fn scales(unit: &[u8], block: usize, _half: usize) -> [f32; LANES] {
        let (factors, scales) = (halves(unit), &unit[SCALES + block * LANES..]);
        std::array::from_fn(|column| factors[column] * f32::from(scales[column]))
    }

    fn mins(unit: &[u8], block: usize) -> [f32; LANES] {
        let (factors, mins) = (halves(&unit[MIN_FACTOR..]), &unit[MINS + block * LANES..]);
        std::array::from_fn(|column| factors[column] * f32::from(mins[column]))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn codes_512(unit: *const u8, block: usize, group: usize) -> __m512i {
        // SAFETY: inside the unit.
        unsafe { x86::nibbles_512(unit.add(CODES + block * BLOCK_BYTES), group) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales_512(unit: *const u8, block: usize, _half: usize) -> __m512 {
        // SAFETY: inside the unit.
        unsafe { _mm512_mul_ps(x86::halves_512(unit), x86::bytes_512::<false>(unit.add(SCALES + block * LANES))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn mins_512(unit: *const u8, block: usize) -> __m512 {
        // SAFETY: inside the unit.
        unsafe {
            let factors = x86::halves_512(unit.add(MIN_FACTOR));
            _mm512_mul_ps(factors, x86::bytes_512::<false>(unit.add(MINS + block * LANES)))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn codes_256(unit: *const u8, block: usize, group: usize, side: usize) -> [__m256i; 2] {
        // SAFETY: inside the unit.
        unsafe { x86::nibbles_256(unit.add(CODES + block * BLOCK_BYTES), group, side) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales_256(unit: *const u8, block: usize, _half: usize, side: usize) -> __m256 {
        // SAFETY: inside the unit.
        unsafe {
            let scales = x86::bytes_256::<false>(unit.add(SCALES + block * LANES), side);
            _mm256_mul_ps(x86::halves_256(unit, side), scales)
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn mins_256(unit: *const u8, block: usize, side: usize) -> __m256 {
        // SAFETY: inside the unit.
        unsafe {
            let mins = x86::bytes_256::<false>(unit.add(MINS + block * LANES), side);
            _mm256_mul_ps(x86::halves_256(unit.add(MIN_FACTOR), side), mins)
        }
    }
}
