//! Q6_K: six-bit codes in super-blocks of 256, with a signed byte as scale for each 16.
//!
//! Published block: 128 bytes of low four bits, 64 bytes of high two bits, 16 scales, f16 d. Each half of 128 elements
//! has 64 low and 32 high bytes: element l + 32 q takes its low bits from byte `l + 32 (q % 2)`, low half for q < 2, and
//! its high bits from bits 2 q of byte l. Unit of eight blocks: `[16]` d (and 32 bytes unused), `[16][16]` scales,
//! `[8][4 groups][16 columns][4]` pairs of low bits, `[8][2 groups][16 columns][4]` quadruples of high bits.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use super::layout::x86;
use super::layout::{BLOCK, GROUPS, Group, LANES, Layout, Width, halves, nibbles, put_half, put_nibbles};

pub(super) struct Q6K;

const BLOCKS: usize = 8;
const SCALES: usize = 64;
const LOW: usize = SCALES + 2 * BLOCKS * LANES;
const LOW_BYTES: usize = BLOCK / 2 * LANES;
const HIGH: usize = LOW + BLOCKS * LOW_BYTES;
const HIGH_BYTES: usize = BLOCK / 4 * LANES;

/// The code of element `element` of a published block, without its bias.
pub(super) fn code(source: &[u8], element: usize) -> u8 {
    let (half, quarter, l) = (element / 128, element % 128 / 32, element % 32);
    let low = source[64 * half + l + 32 * (quarter % 2)];
    let high = source[128 + 32 * half + l];
    let low = if quarter < 2 { low & 15 } else { low >> 4 };
    low | (high >> (2 * quarter) & 3) << 4
}

impl Layout for Q6K {
    const UNIT_BLOCKS: usize = BLOCKS;
    const UNIT_BYTES: usize = HIGH + BLOCKS * HIGH_BYTES;
    const SOURCE_BYTES: usize = 210;
    const BIAS: i32 = 32;
    const HALVES: bool = true;
    const AFFINE: bool = false;
    const WIDTH: Width = Width::Byte;

    fn pack(source: &[u8], column: usize, unit: &mut [u8]) {
        put_half([source[208], source[209]], column, unit);
        for (index, scale) in source[192..208].iter().enumerate() {
            unit[SCALES + index * LANES + column] = *scale;
        }
        for block in 0..BLOCKS {
            let codes: [u8; BLOCK] = std::array::from_fn(|k| code(source, block * BLOCK + k));
            put_nibbles(&codes, column, &mut unit[LOW + block * LOW_BYTES..]);
            // Group g's high bits: bits 2 (g / 2) of the bytes of group g % 2.
            let high = &mut unit[HIGH + block * HIGH_BYTES..][..HIGH_BYTES];
            for (k, code) in codes.iter().enumerate() {
                let group = k / 4;
                high[group % 2 * 64 + column * 4 + k % 4] |= code >> 4 << (2 * (group / 2));
            }
        }
    }

    fn codes(unit: &[u8], block: usize) -> [Group; GROUPS] {
        let mut groups = nibbles(&unit[LOW + block * LOW_BYTES..]);
        let high = &unit[HIGH + block * HIGH_BYTES..];
        for (group, codes) in groups.iter_mut().enumerate() {
            for (byte, code) in codes.iter_mut().enumerate() {
                *code |= (high[group % 2 * 64 + byte] >> (2 * (group / 2)) & 3) << 4;
            }
        }
        groups
    }

    fn scales(unit: &[u8], block: usize, half: usize) -> [f32; LANES] {
        let (factors, scales) = (halves(unit), &unit[SCALES + (2 * block + half) * LANES..]);
        std::array::from_fn(|column| factors[column] * f32::from(scales[column].cast_signed()))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn codes_512(unit: *const u8, block: usize, group: usize) -> __m512i {
        // SAFETY: inside the unit.
        unsafe {
            let low = x86::nibbles_512(unit.add(LOW + block * LOW_BYTES), group);
            let bits = _mm512_loadu_si512(unit.add(HIGH + block * HIGH_BYTES + group % 2 * 64).cast());
            // Groups 0 and 1 have their high bits lowest, then 2 and 3, 4 and 5, 6 and 7.
            let high = match group / 2 {
                0 => _mm512_slli_epi16::<4>(bits),
                1 => _mm512_slli_epi16::<2>(bits),
                2 => bits,
                _ => _mm512_srli_epi16::<2>(bits),
            };
            _mm512_or_si512(low, _mm512_and_si512(high, _mm512_set1_epi8(0x30)))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales_512(unit: *const u8, block: usize, half: usize) -> __m512 {
        // SAFETY: inside the unit.
        unsafe {
            let scales = x86::bytes_512::<true>(unit.add(SCALES + (2 * block + half) * LANES));
            _mm512_mul_ps(x86::halves_512(unit), scales)
        }
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
        // SAFETY: inside the unit.
        unsafe {
            let [first, second] = x86::nibbles_256(unit.add(LOW + block * LOW_BYTES), group, side);
            let high = unit.add(HIGH + block * HIGH_BYTES + group % 2 * 64 + side * 32);
            let bits = _mm256_loadu_si256(high.cast());
            // Groups 0 and 1 have their high bits lowest, then 2 and 3, 4 and 5, 6 and 7.
            let (low, high) = if group < 2 {
                (_mm256_slli_epi16::<4>(bits), bits)
            } else {
                (_mm256_slli_epi16::<2>(bits), _mm256_srli_epi16::<2>(bits))
            };
            let mask = _mm256_set1_epi8(0x30);
            [_mm256_or_si256(first, _mm256_and_si256(low, mask)), _mm256_or_si256(second, _mm256_and_si256(high, mask))]
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales_256(unit: *const u8, block: usize, half: usize, side: usize) -> __m256 {
        // SAFETY: inside the unit.
        unsafe {
            let scales = x86::bytes_256::<true>(unit.add(SCALES + (2 * block + half) * LANES), side);
            _mm256_mul_ps(x86::halves_256(unit, side), scales)
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn mins_256(_unit: *const u8, _block: usize, _side: usize) -> __m256 {
        _mm256_setzero_ps()
    }
}
