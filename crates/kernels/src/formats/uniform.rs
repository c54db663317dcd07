//! Blocks of 32 numbers with evenly spaced codes: a scale (`_0`), or a scale and the least number (`_1`).
//!
//! Code `i` of the first half stands in the low four bits of byte `i`, that of the second half in the high four; a
//! fifth bit stands in a word of 32 bits.

use super::numbers::{F16_LARGEST, f16_at, f16_to_f32};
use super::search::{CodeSet, Whole, search_scale, write_codes};
use super::search_affine::search_line;
use super::{BlockFormat, Format};
use crate::simd::Simd;

/// Numbers of a block.
pub(super) const LEN: usize = 32;

pub(super) struct Q8_0;
pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;

/// The 32 codes of four bits in 16 bytes.
#[inline(always)]
pub(crate) fn unpack_nibbles(bytes: &[u8]) -> [u8; LEN] {
    let bytes: &[u8; LEN / 2] = bytes.try_into().expect("16 bytes of codes");
    std::array::from_fn(|i| if i < LEN / 2 { bytes[i] & 15 } else { bytes[i - LEN / 2] >> 4 })
}

/// The reverse of [`unpack_nibbles`]; higher bits are left out.
#[inline(always)]
pub(super) fn pack_nibbles(codes: &[u8; LEN], bytes: &mut [u8]) {
    let bytes: &mut [u8; LEN / 2] = bytes.try_into().expect("16 bytes of codes");
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = codes[i] & 15 | codes[LEN / 2 + i] << 4;
    }
}

/// The fifth bits as four bytes.
#[inline(always)]
fn pack_fifth_bits(codes: &[u8; LEN], bytes: &mut [u8]) {
    let word = codes.iter().enumerate().fold(0u32, |word, (i, code)| word | u32::from(code >> 4 & 1) << i);
    bytes.copy_from_slice(&word.to_le_bytes());
}

/// A scale, written, and the codes under it.
#[inline(always)]
pub(super) fn encode_scaled<S: Simd>(simd: S, set: impl CodeSet, values: &[f32], scale: &mut [u8]) -> [u8; LEN] {
    let bits = search_scale(simd, set, values);
    scale.copy_from_slice(&bits.to_le_bytes());
    let mut codes = [0; LEN];
    write_codes(simd, set, values, f16_to_f32(bits), &mut codes);
    codes
}

/// A scale and a least number, written, and the codes under them.
#[inline(always)]
fn encode_affine<const HIGHEST: i32, S: Simd>(simd: S, values: &[f32], block: &mut [u8]) -> [u8; LEN] {
    let mut codes = [0; LEN];
    let (scale, least) = search_line::<HIGHEST, S>(simd, values, &mut codes);
    block[..2].copy_from_slice(&scale.to_le_bytes());
    block[2..4].copy_from_slice(&least.to_le_bytes());
    codes
}

/// Adds the fifth bits that four bytes hold.
#[inline(always)]
pub(crate) fn with_fifth_bits(mut codes: [u8; LEN], high: &[u8]) -> [u8; LEN] {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= ((high >> i & 1) as u8) << 4;
    }
    codes
}

/// `scale * (code - zero)`.
#[inline(always)]
fn decode_scaled(codes: [u8; LEN], zero: i32, scale: f32, out: &mut [f32]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = scale * (i32::from(code) - zero) as f32;
    }
}

/// `scale * code + least`.
#[inline(always)]
fn decode_affine(codes: [u8; LEN], scale: f32, least: f32, out: &mut [f32]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = scale * f32::from(code) + least;
    }
}

impl BlockFormat for Q8_0 {
    const FORMAT: Format = Format::Q8_0;
    const NAME: &'static str = "q8_0";
    const LEN: usize = LEN;
    const BYTES: usize = 2 + 32;
    const LARGEST: f32 = 127.0 * F16_LARGEST;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        let scale = f16_at(block, 0);
        for (out, &code) in out.iter_mut().zip(&block[2..]) {
            *out = scale * f32::from(code as i8);
        }
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        // The lowest code would be -128, which the reference leaves out.
        let codes = encode_scaled(simd, Whole::<-127, 127>, values, &mut block[..2]);
        block[2..].iter_mut().zip(codes).for_each(|(byte, code)| *byte = code.wrapping_sub(127));
    }
}

impl BlockFormat for Q4_0 {
    const FORMAT: Format = Format::Q4_0;
    const NAME: &'static str = "q4_0";
    const LEN: usize = LEN;
    const BYTES: usize = 2 + 16;
    const LARGEST: f32 = 8.0 * F16_LARGEST;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        decode_scaled(unpack_nibbles(&block[2..18]), 8, f16_at(block, 0), out);
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        let codes = encode_scaled(simd, Whole::<-8, 7>, values, &mut block[..2]);
        pack_nibbles(&codes, &mut block[2..18]);
    }
}

impl BlockFormat for Q4_1 {
    const FORMAT: Format = Format::Q4_1;
    const NAME: &'static str = "q4_1";
    const LEN: usize = LEN;
    const BYTES: usize = 4 + 16;
    const LARGEST: f32 = F16_LARGEST;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        decode_affine(unpack_nibbles(&block[4..20]), f16_at(block, 0), f16_at(block, 2), out);
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        let codes = encode_affine::<15, S>(simd, values, block);
        pack_nibbles(&codes, &mut block[4..20]);
    }
}

impl BlockFormat for Q5_0 {
    const FORMAT: Format = Format::Q5_0;
    const NAME: &'static str = "q5_0";
    const LEN: usize = LEN;
    const BYTES: usize = 2 + 4 + 16;
    const LARGEST: f32 = 16.0 * F16_LARGEST;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        let codes = with_fifth_bits(unpack_nibbles(&block[6..22]), &block[2..6]);
        decode_scaled(codes, 16, f16_at(block, 0), out);
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        let codes = encode_scaled(simd, Whole::<-16, 15>, values, &mut block[..2]);
        pack_fifth_bits(&codes, &mut block[2..6]);
        pack_nibbles(&codes, &mut block[6..22]);
    }
}

impl BlockFormat for Q5_1 {
    const FORMAT: Format = Format::Q5_1;
    const NAME: &'static str = "q5_1";
    const LEN: usize = LEN;
    const BYTES: usize = 4 + 4 + 16;
    const LARGEST: f32 = F16_LARGEST;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        let codes = with_fifth_bits(unpack_nibbles(&block[8..24]), &block[4..8]);
        decode_affine(codes, f16_at(block, 0), f16_at(block, 2), out);
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        let codes = encode_affine::<31, S>(simd, values, block);
        pack_fifth_bits(&codes, &mut block[4..8]);
        pack_nibbles(&codes, &mut block[8..24]);
    }
}
