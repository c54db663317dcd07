//! Formats without blocks: f32, f16 and bf16, little-endian.

use super::numbers::{f16_at, u16_at};
use super::{BlockFormat, Format};

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl BlockFormat for F32 {
    const FORMAT: Format = Format::F32;
    const NAME: &'static str = "f32";
    const LEN: usize = 1;
    const BYTES: usize = 4;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    }
}

impl BlockFormat for F16 {
    const FORMAT: Format = Format::F16;
    const NAME: &'static str = "f16";
    const LEN: usize = 1;
    const BYTES: usize = 2;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        out[0] = f16_at(block, 0);
    }
}

impl BlockFormat for Bf16 {
    const FORMAT: Format = Format::Bf16;
    const NAME: &'static str = "bf16";
    const LEN: usize = 1;
    const BYTES: usize = 2;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        out[0] = f32::from_bits(u32::from(u16_at(block, 0)) << 16);
    }
}
