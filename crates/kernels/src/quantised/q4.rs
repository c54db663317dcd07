//! Four-bit codes with one scale for each 32: Q4_0 (code - 8), and the codebooks of IQ4_NL and MXFP4.
//!
//! Published block: scale (f16; in MXFP4 the exponent of a power of two), 16 bytes of codes, element k in the low half of
//! byte k, element k + 16 in its high half. Unit of two blocks: `[2][16]` scales of 16 bits (f16; in MXFP4 bf16), then
//! `[2][4 groups][16 columns][4]` pairs of codes.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::marker::PhantomData;

#[cfg(target_arch = "x86_64")]
use super::layout::x86;
use super::layout::{BLOCK, GROUPS, Group, LANES, Layout, Width, halves, nibbles, put_half, put_nibbles};

/// What the sixteen codes stand for.
pub(super) trait Codebook: 'static {
    /// The code's value plus the bias.
    const TABLE: [u8; 16];
    const BIAS: i32;
    /// Whether the table leaves codes as they are.
    const LINEAR: bool;
    /// Whether scales are bf16 made from an exponent, or f16.
    const EXPONENT: bool;
}

/// Q4_0.
pub(super) struct Linear;
/// IQ4_NL: the quantiles of a bell curve.
pub(super) struct NonLinear;
/// MXFP4: the values of a float of one sign, two exponent and one mantissa bits, doubled (OCP Microscaling Formats 1.0).
pub(super) struct Float;

impl Codebook for Linear {
    const TABLE: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    const BIAS: i32 = 8;
    const LINEAR: bool = true;
    const EXPONENT: bool = false;
}

impl Codebook for NonLinear {
    const TABLE: [u8; 16] =
        biased([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], Self::BIAS);
    const BIAS: i32 = 128;
    const LINEAR: bool = false;
    const EXPONENT: bool = false;
}

impl Codebook for Float {
    const TABLE: [u8; 16] = biased([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], Self::BIAS);
    const BIAS: i32 = 128;
    const LINEAR: bool = false;
    const EXPONENT: bool = true;
}

const fn biased(values: [i32; 16], bias: i32) -> [u8; 16] {
    let mut table = [0; 16];
    let mut code = 0;
    while code < 16 {
        table[code] = (values[code] + bias) as u8;
        code += 1;
    }
    table
}

pub(super) struct Q4<C>(PhantomData<C>);

const CODES: usize = 64;
const BLOCK_BYTES: usize = BLOCK / 2 * LANES;

impl<C: Codebook> Q4<C> {
    const SCALE_BYTES: usize = if C::EXPONENT { 1 } else { 2 };

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn table_512() -> __m512i {
        // SAFETY: sixteen bytes.
        _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(C::TABLE.as_ptr().cast()) })
    }
}

/// 2^(exponent - 128), as bf16: half the published scale, for the table holds doubled values.
fn power(exponent: u8) -> [u8; 2] {
    let scale = f32::from_bits(match exponent {
        0 | 1 => 0x0020_0000 << exponent,
        _ => (u32::from(exponent) - 1) << 23,
    });
    half::bf16::from_f32(scale).to_le_bytes()
}

impl<C: Codebook> Layout for Q4<C> {
    const UNIT_BLOCKS: usize = 2;
    const UNIT_BYTES: usize = CODES + 2 * BLOCK_BYTES;
    const SOURCE_BYTES: usize = 2 * (Self::SCALE_BYTES + BLOCK / 2);
    const BIAS: i32 = C::BIAS;
    const HALVES: bool = false;
    const AFFINE: bool = false;
    const WIDTH: Width = if C::LINEAR { Width::Nibble } else { Width::Signed };

    fn pack(source: &[u8], column: usize, unit: &mut [u8]) {
        for (index, block) in source.chunks_exact(Self::SCALE_BYTES + BLOCK / 2).enumerate() {
            let (scale, pairs) = block.split_at(Self::SCALE_BYTES);
            let scale = if C::EXPONENT { power(scale[0]) } else { [scale[0], scale[1]] };
            put_half(scale, column, &mut unit[index * 32..]);
            let codes = std::array::from_fn(|k| if k < 16 { pairs[k] & 15 } else { pairs[k - 16] >> 4 });
            put_nibbles(&codes, column, &mut unit[CODES + index * BLOCK_BYTES..]);
        }
    }

    fn codes(unit: &[u8], block: usize) -> [Group; GROUPS] {
        nibbles(&unit[CODES + block * BLOCK_BYTES..]).map(|group| group.map(|code| C::TABLE[usize::from(code)]))
    }

    fn scales(unit: &[u8], block: usize, _half: usize) -> [f32; LANES] {
        let row = &unit[block * 32..];
        if C::EXPONENT {
            std::array::from_fn(|column| half::bf16::from_le_bytes([row[2 * column], row[2 * column + 1]]).to_f32())
        } else {
            halves(row)
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn codes_512(unit: *const u8, block: usize, group: usize) -> __m512i {
        // SAFETY: inside the unit.
        unsafe {
            let codes = x86::nibbles_512(unit.add(CODES + block * BLOCK_BYTES), group);
            if C::LINEAR { codes } else { _mm512_shuffle_epi8(Self::table_512(), codes) }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales_512(unit: *const u8, block: usize, _half: usize) -> __m512 {
        // SAFETY: inside the unit.
        unsafe {
            if C::EXPONENT {
                let row = _mm256_loadu_si256(unit.add(block * 32).cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(row)))
            } else {
                x86::halves_512(unit.add(block * 32))
            }
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
        let codes = unsafe { x86::nibbles_256(unit.add(CODES + block * BLOCK_BYTES), group, side) };
        if C::LINEAR {
            return codes;
        }
        // SAFETY: sixteen bytes.
        let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(C::TABLE.as_ptr().cast()) });
        let table = _mm256_sub_epi8(table, _mm256_set1_epi8(-128));
        codes.map(|codes| _mm256_shuffle_epi8(table, codes))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales_256(unit: *const u8, block: usize, _half: usize, side: usize) -> __m256 {
        // SAFETY: inside the unit.
        unsafe {
            if C::EXPONENT {
                let row = _mm_loadu_si128(unit.add(block * 32 + side * 16).cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(row)))
            } else {
                x86::halves_256(unit.add(block * 32), side)
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn mins_256(_unit: *const u8, _block: usize, _side: usize) -> __m256 {
        _mm256_setzero_ps()
    }
}
