//! Formats without blocks: f32, f16 and bf16, little-endian.

use super::numbers::{f16_at, f32_to_bf16, f32_to_f16, u16_at};
use super::{BlockFormat, Format};
use crate::simd::Simd;

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl BlockFormat for F32 {
    const FORMAT: Format = Format::F32;
    const NAME: &'static str = "f32";
    const LEN: usize = 1;
    const BYTES: usize = 4;
    const LARGEST: f32 = f32::MAX;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    }

    #[inline(always)]
    fn encode<S: Simd>(_: S, values: &[f32], block: &mut [u8]) {
        block.copy_from_slice(&values[0].to_le_bytes());
    }
}

impl BlockFormat for F16 {
    const FORMAT: Format = Format::F16;
    const NAME: &'static str = "f16";
    const LEN: usize = 1;
    const BYTES: usize = 2;
    /// The last that rounds to 65504.
    const LARGEST: f32 = 65_519.996;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        out[0] = f16_at(block, 0);
    }

    #[inline(always)]
    fn encode<S: Simd>(_: S, values: &[f32], block: &mut [u8]) {
        block.copy_from_slice(&f32_to_f16(values[0]).to_le_bytes());
    }
}

impl BlockFormat for Bf16 {
    const FORMAT: Format = Format::Bf16;
    const NAME: &'static str = "bf16";
    const LEN: usize = 1;
    const BYTES: usize = 2;
    /// The last that rounds to the largest bf16.
    const LARGEST: f32 = f32::from_bits(0x7f7f_7fff);

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        out[0] = f32::from_bits(u32::from(u16_at(block, 0)) << 16);
    }

    #[inline(always)]
    fn encode<S: Simd>(_: S, values: &[f32], block: &mut [u8]) {
        block.copy_from_slice(&f32_to_bf16(values[0]).to_le_bytes());
    }
}
