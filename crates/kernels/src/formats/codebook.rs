//! Formats whose codes of four bits choose from a table of 16 numbers that are not evenly spaced.

use super::k_quants::Parts;
use super::numbers::{F16_LARGEST, f16_at, f16_to_f32, half_e8m0, u16_at};
use super::search::{Candidates, Table, errors, extreme, least, search_scaled, write_codes};
use super::uniform::{encode_scaled, pack_nibbles, unpack_nibbles};
use super::{BlockFormat, Format};
use crate::simd::{LANES, Simd};

/// What the codes of IQ4_NL and IQ4_XS mean (llama.cpp, `ggml-common.h`, `kvalues_iq4nl`): denser around zero.
static NON_LINEAR: [f32; 16] =
    [-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.];
/// Twice what the codes of MXFP4 mean (OCP Microscaling Formats 1.0, E2M1). The second zero reads as +0, as in ggml.
const E2M1_DOUBLED: [f32; 16] = [0., 1., 2., 3., 4., 6., 8., 12., 0., -1., -2., -3., -4., -6., -8., -12.];
/// The same in rising order, the zero once and the largest twice.
static E2M1_RISING: [f32; 16] = [-12., -8., -6., -4., -3., -2., -1., 0., 1., 2., 3., 4., 6., 8., 12., 12.];
/// The codes of [`E2M1_RISING`].
const E2M1_CODES: [u8; 16] = [15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7, 7];

pub(super) struct Iq4Nl;
pub(crate) struct Iq4Xs;
pub(super) struct Mxfp4;

/// Numbers of a block, or of a part of one that has its own scale.
const LEN: usize = 32;
/// Parts of a block of IQ4_XS.
const PARTS: usize = 8;

#[inline(always)]
fn look_up(table: &[f32; 16], scale: f32, codes: &[u8], out: &mut [f32]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = scale * table[usize::from(code & 15)];
    }
}

impl BlockFormat for Iq4Nl {
    const FORMAT: Format = Format::IQ4_NL;
    const NAME: &'static str = "iq4_nl";
    const LEN: usize = LEN;
    const BYTES: usize = 2 + 16;
    const LARGEST: f32 = 113.0 * F16_LARGEST;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        look_up(&NON_LINEAR, f16_at(block, 0), &unpack_nibbles(&block[2..18]), out);
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        let codes = encode_scaled(simd, Table(&NON_LINEAR), values, &mut block[..2]);
        pack_nibbles(&codes, &mut block[2..18]);
    }
}

impl Iq4Xs {
    /// Layout: scale f16, the parts' high two bits u16, their low four bits, codes. A part's scale is -32..=31.
    #[inline(always)]
    pub(crate) fn unpack(block: &[u8]) -> Parts<PARTS> {
        let high = u16_at(block, 2);
        let mut codes = [0; PARTS * LEN];
        for (codes, pairs) in codes.chunks_exact_mut(LEN).zip(block[8..].chunks_exact(LEN / 2)) {
            codes.copy_from_slice(&unpack_nibbles(pairs));
        }
        let scales = std::array::from_fn(|part| {
            let low = block[4 + part / 2] >> (4 * (part % 2)) & 15;
            (low | ((high >> (2 * part) & 3) as u8) << 4).wrapping_sub(32)
        });
        Parts { d: u16_at(block, 0), d_least: 0, scales, leasts: [0; PARTS], codes }
    }
}

impl BlockFormat for Iq4Xs {
    const FORMAT: Format = Format::IQ4_XS;
    const NAME: &'static str = "iq4_xs";
    const LEN: usize = PARTS * LEN;
    const BYTES: usize = 2 + 2 + 4 + 128;
    const LARGEST: f32 = 31.0 * 113.0 * F16_LARGEST;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        let Parts { d, scales, codes, .. } = Self::unpack(block);
        for ((out, codes), scale) in out.chunks_exact_mut(LEN).zip(codes.chunks_exact(LEN)).zip(scales) {
            look_up(&NON_LINEAR, f16_to_f32(d) * f32::from(scale.cast_signed()), codes, out);
        }
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        let set = Table(&NON_LINEAR);
        let chosen = search_scaled::<PARTS, S, _>(simd, set, values, -32.0);
        block[..8].fill(0);
        block[..2].copy_from_slice(&chosen.d.to_le_bytes());
        let mut high = 0;
        for (part, values) in values.chunks_exact(LEN).enumerate() {
            let factor = chosen.scales[part];
            let bits = (factor + 32) as u8;
            block[4 + part / 2] |= (bits & 15) << (4 * (part % 2));
            high |= u16::from(bits >> 4) << (2 * part);
            let mut codes = [0; LEN];
            write_codes(simd, set, values, f16_to_f32(chosen.d) * f32::from(factor), &mut codes);
            pack_nibbles(&codes, &mut block[8 + 16 * part..24 + 16 * part]);
        }
        block[2..4].copy_from_slice(&high.to_le_bytes());
    }
}

impl BlockFormat for Mxfp4 {
    const FORMAT: Format = Format::MXFP4;
    const NAME: &'static str = "mxfp4";
    const LEN: usize = LEN;
    const BYTES: usize = 1 + 16;
    /// Three quarters of 2^128: larger ones might be read as infinity.
    const LARGEST: f32 = 1.5 * f32::from_bits(254 << 23);

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        look_up(&E2M1_DOUBLED, half_e8m0(block[0]), &unpack_nibbles(&block[1..17]), out);
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        // The largest number, brought to 1..2 so that squares neither overflow nor vanish, says which exponents come
        // into question; the plain rule's is the third.
        let power = exponent_of(extreme(values));
        let scaled: [f32; LEN] = std::array::from_fn(|i| times_power_of_two(values[i], -power));
        let exponents: [u8; LANES] = std::array::from_fn(|i| (power + 123 + (i as i32).min(4)).clamp(0, 254) as u8);
        let scales: Candidates = exponents.map(|exponent| times_power_of_two(half_e8m0(exponent), -power));
        let set = Table(&E2M1_RISING);
        let (best, _) = least(&errors(simd, set, &scaled, &scales));
        let mut codes = [0; LEN];
        write_codes(simd, set, &scaled, scales[best], &mut codes);
        block[0] = exponents[best];
        pack_nibbles(&codes.map(|code| E2M1_CODES[usize::from(code & 15)]), &mut block[1..17]);
    }
}

/// The whole part of the logarithm to the base two; that of the least normal number for smaller ones.
#[inline(always)]
fn exponent_of(x: f32) -> i32 {
    ((x.to_bits() >> 23 & 255) as i32 - 127).max(-126)
}

/// `x * 2^power` for powers of -127..=126, in two steps, for the whole may be no normal number.
#[inline(always)]
fn times_power_of_two(x: f32, power: i32) -> f32 {
    let factor = |power: i32| f32::from_bits(((127 + power) as u32) << 23);
    x * factor(power / 2) * factor(power - power / 2)
}
