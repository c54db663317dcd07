//! Blocks of 32 numbers with evenly spaced codes: a scale (`_0`), or a scale and the least number (`_1`).
//!
//! Code `i` of the first half stands in the low four bits of byte `i`, that of the second half in the high four; a
//! fifth bit stands in a word of 32 bits.

use super::numbers::f16_at;
use super::{BlockFormat, Format};

/// Numbers of a block.
pub(super) const LEN: usize = 32;

pub(super) struct Q8_0;
pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;

/// The 32 codes of four bits in 16 bytes.
#[inline(always)]
pub(super) fn unpack_nibbles(bytes: &[u8]) -> [u8; LEN] {
    let bytes: &[u8; LEN / 2] = bytes.try_into().expect("16 bytes of codes");
    std::array::from_fn(|i| if i < LEN / 2 { bytes[i] & 15 } else { bytes[i - LEN / 2] >> 4 })
}

/// Adds the fifth bits that four bytes hold.
#[inline(always)]
fn with_fifth_bits(mut codes: [u8; LEN], high: &[u8]) -> [u8; LEN] {
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

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        let scale = f16_at(block, 0);
        for (out, &code) in out.iter_mut().zip(&block[2..]) {
            *out = scale * f32::from(code as i8);
        }
    }
}

impl BlockFormat for Q4_0 {
    const FORMAT: Format = Format::Q4_0;
    const NAME: &'static str = "q4_0";
    const LEN: usize = LEN;
    const BYTES: usize = 2 + 16;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        decode_scaled(unpack_nibbles(&block[2..18]), 8, f16_at(block, 0), out);
    }
}

impl BlockFormat for Q4_1 {
    const FORMAT: Format = Format::Q4_1;
    const NAME: &'static str = "q4_1";
    const LEN: usize = LEN;
    const BYTES: usize = 4 + 16;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        decode_affine(unpack_nibbles(&block[4..20]), f16_at(block, 0), f16_at(block, 2), out);
    }
}

impl BlockFormat for Q5_0 {
    const FORMAT: Format = Format::Q5_0;
    const NAME: &'static str = "q5_0";
    const LEN: usize = LEN;
    const BYTES: usize = 2 + 4 + 16;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        let codes = with_fifth_bits(unpack_nibbles(&block[6..22]), &block[2..6]);
        decode_scaled(codes, 16, f16_at(block, 0), out);
    }
}

impl BlockFormat for Q5_1 {
    const FORMAT: Format = Format::Q5_1;
    const NAME: &'static str = "q5_1";
    const LEN: usize = LEN;
    const BYTES: usize = 4 + 4 + 16;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        let codes = with_fifth_bits(unpack_nibbles(&block[8..24]), &block[4..8]);
        decode_affine(codes, f16_at(block, 0), f16_at(block, 2), out);
    }
}
