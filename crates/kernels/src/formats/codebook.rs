//! Formats whose codes of four bits choose from a table of 16 numbers that are not evenly spaced.

use super::numbers::{f16_at, half_e8m0, u16_at};
use super::uniform::unpack_nibbles;
use super::{BlockFormat, Format};

/// What the codes of IQ4_NL and IQ4_XS mean (llama.cpp, `ggml-common.h`, `kvalues_iq4nl`): denser around zero.
pub(super) const NON_LINEAR: [f32; 16] =
    [-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.];
/// Twice what the codes of MXFP4 mean (OCP Microscaling Formats 1.0, E2M1). The second zero reads as +0, as in ggml.
pub(super) const E2M1_DOUBLED: [f32; 16] = [0., 1., 2., 3., 4., 6., 8., 12., 0., -1., -2., -3., -4., -6., -8., -12.];

pub(super) struct Iq4Nl;
pub(super) struct Iq4Xs;
pub(super) struct Mxfp4;

/// Numbers of a block, or of a part of one that has its own scale.
const LEN: usize = 32;
/// Parts of a block of IQ4_XS.
const PARTS: usize = 8;

#[inline(always)]
fn decode_with(table: &[f32; 16], scale: f32, codes: &[u8], out: &mut [f32]) {
    for (out, code) in out.iter_mut().zip(unpack_nibbles(codes)) {
        *out = scale * table[usize::from(code & 15)];
    }
}

impl BlockFormat for Iq4Nl {
    const FORMAT: Format = Format::IQ4_NL;
    const NAME: &'static str = "iq4_nl";
    const LEN: usize = LEN;
    const BYTES: usize = 2 + 16;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        decode_with(&NON_LINEAR, f16_at(block, 0), &block[2..18], out);
    }
}

/// Layout: scale f16, the parts' high two bits u16, their low four bits, codes. A part's scale is -32..=31.
impl BlockFormat for Iq4Xs {
    const FORMAT: Format = Format::IQ4_XS;
    const NAME: &'static str = "iq4_xs";
    const LEN: usize = PARTS * LEN;
    const BYTES: usize = 2 + 2 + 4 + 128;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        let (scale, high) = (f16_at(block, 0), u16_at(block, 2));
        for (part, out) in out.chunks_exact_mut(LEN).enumerate() {
            let low = block[4 + part / 2] >> (4 * (part % 2)) & 15;
            let factor = i32::from(low) + (i32::from(high >> (2 * part) & 3) << 4) - 32;
            decode_with(&NON_LINEAR, scale * factor as f32, &block[8 + 16 * part..24 + 16 * part], out);
        }
    }
}

impl BlockFormat for Mxfp4 {
    const FORMAT: Format = Format::MXFP4;
    const NAME: &'static str = "mxfp4";
    const LEN: usize = LEN;
    const BYTES: usize = 1 + 16;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        decode_with(&E2M1_DOUBLED, half_e8m0(block[0]), &block[1..17], out);
    }
}
