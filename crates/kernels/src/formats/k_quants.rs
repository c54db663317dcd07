//! The k-quants: blocks of 256 numbers in parts of 16 or 32, whose scales are small integers times the block's own
//! (llama.cpp, pull request 1684).
//!
//! Each format here is where its bits stand: `unpack` makes a byte of each number, `encode` the reverse.

use super::numbers::{F16_LARGEST, f16_to_f32, u16_at};
use super::search::{CodeSet, ScaledBlock, Whole, search_scaled, write_codes};
use super::search_affine::{AffineBlock, search_lines};
use super::{BlockFormat, Format};
use crate::simd::Simd;

/// Numbers of a block.
pub(super) const LEN: usize = 256;
/// A block's codes, a byte each.
pub(super) type Codes = [u8; LEN];

/// A block taken apart: what its f16 factors and the small integers of its parts are.
pub(crate) struct Parts<const N: usize> {
    /// Bits of the f16 that the scales are multiplied with.
    pub(crate) d: u16,
    /// Bits of the f16 that the leasts are multiplied with.
    pub(crate) d_least: u16,
    /// Signed ones as two's complement.
    pub(crate) scales: [u8; N],
    pub(crate) leasts: [u8; N],
    pub(crate) codes: Codes,
}

/// Parts of 16; a number is `d * scale * code - d_least * least`: two bits of code, four of scale and least.
pub(crate) struct Q2K;
/// Parts of 16; a number is `d * scale * code`: three bits of code, six of scale, both signed.
pub(crate) struct Q3K;
/// Parts of 32; a number is `d * scale * code - d_least * least`: four bits of code, six of scale and least.
pub(crate) struct Q4K;
/// As [`Q4K`] with five bits of code.
pub(crate) struct Q5K;
/// Parts of 16; a number is `d * scale * code`: six bits of code, eight of scale, both signed.
pub(crate) struct Q6K;

/// The scales and leasts of the eight parts of [`Q4K`] and [`Q5K`]: six bits each in twelve bytes.
#[inline(always)]
fn unpack_scales(bytes: &[u8]) -> ([u8; 8], [u8; 8]) {
    let bytes: &[u8; 12] = bytes.try_into().expect("12 bytes of scales");
    let (mut scales, mut leasts) = ([0; 8], [0; 8]);
    for i in 0..4 {
        scales[i] = bytes[i] & 63;
        leasts[i] = bytes[4 + i] & 63;
        scales[4 + i] = bytes[8 + i] & 15 | bytes[i] >> 6 << 4;
        leasts[4 + i] = bytes[8 + i] >> 4 | bytes[4 + i] >> 6 << 4;
    }
    (scales, leasts)
}

/// The reverse of [`unpack_scales`].
#[inline(always)]
fn pack_scales(scales: &[u8; 8], leasts: &[u8; 8], bytes: &mut [u8]) {
    for i in 0..4 {
        bytes[i] = scales[i] | scales[4 + i] >> 4 << 6;
        bytes[4 + i] = leasts[i] | leasts[4 + i] >> 4 << 6;
        bytes[8 + i] = scales[4 + i] & 15 | leasts[4 + i] << 4;
    }
}

/// The sixteen scales of [`Q3K`], 0..=63 for -32..=31: the low four bits of two scales in each of eight bytes, the high
/// two bits of four in each of four bytes.
#[inline(always)]
fn unpack_signed_scales(bytes: &[u8]) -> [u8; 16] {
    let bytes: &[u8; 12] = bytes.try_into().expect("12 bytes of scales");
    std::array::from_fn(|i| {
        let low = bytes[i % 8] >> (4 * (i / 8)) & 15;
        let high = bytes[8 + i % 4] >> (2 * (i / 4)) & 3;
        low | high << 4
    })
}

/// The reverse of [`unpack_signed_scales`].
#[inline(always)]
fn pack_signed_scales(scales: &[u8; 16], bytes: &mut [u8]) {
    bytes.fill(0);
    for (i, scale) in scales.iter().enumerate() {
        bytes[i % 8] |= (scale & 15) << (4 * (i / 8));
        bytes[8 + i % 4] |= (scale >> 4) << (2 * (i / 4));
    }
}

/// Codes of two bits: byte `i` of a half's 32 holds those of the numbers `i`, `32 + i`, `64 + i`, `96 + i`.
#[inline(always)]
fn unpack_two_bits(bytes: &[u8]) -> Codes {
    let bytes: &[u8; LEN / 4] = bytes.try_into().expect("64 bytes of codes");
    let mut codes = [0; LEN];
    for (codes, bytes) in codes.chunks_exact_mut(128).zip(bytes.chunks_exact(32)) {
        for (quarter, codes) in codes.chunks_exact_mut(32).enumerate() {
            codes.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte >> (2 * quarter) & 3);
        }
    }
    codes
}

/// The reverse of [`unpack_two_bits`]; higher bits are left out.
#[inline(always)]
fn pack_two_bits(codes: &Codes, bytes: &mut [u8]) {
    for (codes, bytes) in codes.chunks_exact(128).zip(bytes.chunks_exact_mut(32)) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = codes[i] & 3 | (codes[32 + i] & 3) << 2 | (codes[64 + i] & 3) << 4 | codes[96 + i] << 6;
        }
    }
}

/// Codes of four bits: byte `i` of a quarter's 32 holds those of the numbers `i` and `32 + i`.
#[inline(always)]
fn unpack_four_bits(bytes: &[u8]) -> Codes {
    let bytes: &[u8; LEN / 2] = bytes.try_into().expect("128 bytes of codes");
    let mut codes = [0; LEN];
    for (codes, bytes) in codes.chunks_exact_mut(64).zip(bytes.chunks_exact(32)) {
        let (low, high) = codes.split_at_mut(32);
        low.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte & 15);
        high.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte >> 4);
    }
    codes
}

/// The reverse of [`unpack_four_bits`]; higher bits are left out.
#[inline(always)]
fn pack_four_bits(codes: &Codes, bytes: &mut [u8]) {
    for (codes, bytes) in codes.chunks_exact(64).zip(bytes.chunks_exact_mut(32)) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = codes[i] & 15 | codes[32 + i] << 4;
        }
    }
}

/// One bit of each number: bit `part` of byte `i` is that of number `32 * part + i`.
#[inline(always)]
fn for_each_bit(bytes: &[u8], codes: &mut Codes, apply: impl Fn(&mut u8, u8)) {
    let bytes: &[u8; LEN / 8] = bytes.try_into().expect("32 bytes of bits");
    for (part, codes) in codes.chunks_exact_mut(32).enumerate() {
        codes.iter_mut().zip(bytes).for_each(|(code, byte)| apply(code, byte >> part & 1));
    }
}

/// The reverse of [`for_each_bit`]: bit `bit` of each code.
#[inline(always)]
fn pack_bit(codes: &Codes, bit: u32, bytes: &mut [u8]) {
    bytes.fill(0);
    for (part, codes) in codes.chunks_exact(32).enumerate() {
        bytes.iter_mut().zip(codes).for_each(|(byte, code)| *byte |= (code >> bit & 1) << part);
    }
}

/// Scales of sixteen parts, and the codes under them.
#[inline(always)]
fn encode_signed<S: Simd, C: CodeSet>(simd: S, set: C, values: &[f32], lowest: f32) -> (ScaledBlock<16>, Codes) {
    let chosen = search_scaled::<16, S, C>(simd, set, values, lowest);
    let (d, mut codes) = (f16_to_f32(chosen.d), [0; LEN]);
    let parts = values.chunks_exact(16).zip(codes.chunks_exact_mut(16));
    for ((values, codes), scale) in parts.zip(chosen.scales) {
        write_codes(simd, set, values, d * f32::from(scale), codes);
    }
    (chosen, codes)
}

/// `d * scale * code - d_least * least` for each part.
#[inline(always)]
fn decode_affine<const N: usize>(block: &Parts<N>, out: &mut [f32]) {
    let (d, d_least) = (f16_to_f32(block.d), f16_to_f32(block.d_least));
    let parts = out.chunks_exact_mut(LEN / N).zip(block.codes.chunks_exact(LEN / N));
    for ((out, codes), (scale, least)) in parts.zip(block.scales.into_iter().zip(block.leasts)) {
        let (scale, least) = (d * f32::from(scale), d_least * f32::from(least));
        out.iter_mut().zip(codes).for_each(|(out, &code)| *out = scale * f32::from(code) - least);
    }
}

/// `d * scale * (code - zero)` for each of sixteen parts.
#[inline(always)]
fn decode_signed(block: &Parts<16>, zero: i32, out: &mut [f32]) {
    let d = f16_to_f32(block.d);
    let parts = out.chunks_exact_mut(16).zip(block.codes.chunks_exact(16));
    for ((out, codes), scale) in parts.zip(block.scales) {
        let scale = d * f32::from(scale.cast_signed());
        out.iter_mut().zip(codes).for_each(|(out, &code)| *out = scale * (i32::from(code) - zero) as f32);
    }
}

impl Q2K {
    /// Layout: scale (low four bits) and least of each part, codes, `d`, `d_least`.
    #[inline(always)]
    pub(crate) fn unpack(block: &[u8]) -> Parts<16> {
        Parts {
            d: u16_at(block, 80),
            d_least: u16_at(block, 82),
            scales: std::array::from_fn(|i| block[i] & 15),
            leasts: std::array::from_fn(|i| block[i] >> 4),
            codes: unpack_two_bits(&block[16..80]),
        }
    }
}

impl Q3K {
    /// Layout: third bits of the codes, low two bits, scales, `d`. A third bit that is set takes nothing away, one that
    /// is not takes four.
    #[inline(always)]
    pub(crate) fn unpack(block: &[u8]) -> Parts<16> {
        let mut codes = unpack_two_bits(&block[32..96]);
        for_each_bit(&block[..32], &mut codes, |code, bit| *code |= bit << 2);
        let scales = unpack_signed_scales(&block[96..108]).map(|scale| scale.wrapping_sub(32));
        Parts { d: u16_at(block, 108), d_least: 0, scales, leasts: [0; 16], codes }
    }
}

impl Q4K {
    /// Layout: `d`, `d_least`, scales, codes.
    #[inline(always)]
    pub(crate) fn unpack(block: &[u8]) -> Parts<8> {
        let (scales, leasts) = unpack_scales(&block[4..16]);
        let codes = unpack_four_bits(&block[16..144]);
        Parts { d: u16_at(block, 0), d_least: u16_at(block, 2), scales, leasts, codes }
    }
}

impl Q5K {
    /// Layout: `d`, `d_least`, scales, fifth bits of the codes, low four bits.
    #[inline(always)]
    pub(crate) fn unpack(block: &[u8]) -> Parts<8> {
        let (scales, leasts) = unpack_scales(&block[4..16]);
        let mut codes = unpack_four_bits(&block[48..176]);
        for_each_bit(&block[16..48], &mut codes, |code, bit| *code |= bit << 4);
        Parts { d: u16_at(block, 0), d_least: u16_at(block, 2), scales, leasts, codes }
    }
}

impl Q6K {
    /// Layout: low four bits of the codes, high two, scales, `d`. In each half of 128, byte `i` of 64 holds the low bits
    /// of the numbers `i` and `64 + i`.
    #[inline(always)]
    pub(crate) fn unpack(block: &[u8]) -> Parts<16> {
        let mut codes = unpack_two_bits(&block[128..192]);
        for (codes, bytes) in codes.chunks_exact_mut(128).zip(block[..128].chunks_exact(64)) {
            let (low, high) = codes.split_at_mut(64);
            low.iter_mut().zip(bytes).for_each(|(code, byte)| *code = *code << 4 | byte & 15);
            high.iter_mut().zip(bytes).for_each(|(code, byte)| *code = *code << 4 | byte >> 4);
        }
        let scales = std::array::from_fn(|i| block[192 + i]);
        Parts { d: u16_at(block, 208), d_least: 0, scales, leasts: [0; 16], codes }
    }
}

impl BlockFormat for Q2K {
    const FORMAT: Format = Format::Q2_K;
    const NAME: &'static str = "q2_k";
    const LEN: usize = LEN;
    const BYTES: usize = 16 + 64 + 2 + 2;
    const LARGEST: f32 = 15.0 * F16_LARGEST;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        decode_affine(&Self::unpack(block), out);
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        let mut codes = [0; LEN];
        let AffineBlock { d, d_least, scales, leasts } = search_lines::<16, 3, S>(simd, values, 15.0, &mut codes);
        for i in 0..16 {
            block[i] = scales[i] | leasts[i] << 4;
        }
        pack_two_bits(&codes, &mut block[16..80]);
        block[80..82].copy_from_slice(&d.to_le_bytes());
        block[82..84].copy_from_slice(&d_least.to_le_bytes());
    }
}

impl BlockFormat for Q3K {
    const FORMAT: Format = Format::Q3_K;
    const NAME: &'static str = "q3_k";
    const LEN: usize = LEN;
    const BYTES: usize = 32 + 64 + 12 + 2;
    const LARGEST: f32 = 3.0 * 31.0 * F16_LARGEST;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        decode_signed(&Self::unpack(block), 4, out);
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        let (chosen, codes) = encode_signed(simd, Whole::<-4, 3>, values, -32.0);
        pack_bit(&codes, 2, &mut block[..32]);
        pack_two_bits(&codes, &mut block[32..96]);
        pack_signed_scales(&chosen.scales.map(|scale| (scale + 32) as u8), &mut block[96..108]);
        block[108..110].copy_from_slice(&chosen.d.to_le_bytes());
    }
}

impl BlockFormat for Q4K {
    const FORMAT: Format = Format::Q4_K;
    const NAME: &'static str = "q4_k";
    const LEN: usize = LEN;
    const BYTES: usize = 2 + 2 + 12 + 128;
    const LARGEST: f32 = 63.0 * F16_LARGEST;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        decode_affine(&Self::unpack(block), out);
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        let mut codes = [0; LEN];
        let AffineBlock { d, d_least, scales, leasts } = search_lines::<8, 15, S>(simd, values, 63.0, &mut codes);
        block[..2].copy_from_slice(&d.to_le_bytes());
        block[2..4].copy_from_slice(&d_least.to_le_bytes());
        pack_scales(&scales, &leasts, &mut block[4..16]);
        pack_four_bits(&codes, &mut block[16..144]);
    }
}

impl BlockFormat for Q5K {
    const FORMAT: Format = Format::Q5_K;
    const NAME: &'static str = "q5_k";
    const LEN: usize = LEN;
    const BYTES: usize = 2 + 2 + 12 + 32 + 128;
    const LARGEST: f32 = 63.0 * F16_LARGEST;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        decode_affine(&Self::unpack(block), out);
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        let mut codes = [0; LEN];
        let AffineBlock { d, d_least, scales, leasts } = search_lines::<8, 31, S>(simd, values, 63.0, &mut codes);
        block[..2].copy_from_slice(&d.to_le_bytes());
        block[2..4].copy_from_slice(&d_least.to_le_bytes());
        pack_scales(&scales, &leasts, &mut block[4..16]);
        pack_bit(&codes, 4, &mut block[16..48]);
        pack_four_bits(&codes, &mut block[48..176]);
    }
}

impl BlockFormat for Q6K {
    const FORMAT: Format = Format::Q6_K;
    const NAME: &'static str = "q6_k";
    const LEN: usize = LEN;
    const BYTES: usize = 128 + 64 + 16 + 2;
    const LARGEST: f32 = 31.0 * 127.0 * F16_LARGEST;

    #[inline(always)]
    fn decode(block: &[u8], out: &mut [f32]) {
        decode_signed(&Self::unpack(block), 32, out);
    }

    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], block: &mut [u8]) {
        let (chosen, codes) = encode_signed(simd, Whole::<-32, 31>, values, -128.0);
        for (codes, bytes) in codes.chunks_exact(128).zip(block[..128].chunks_exact_mut(64)) {
            for (i, byte) in bytes.iter_mut().enumerate() {
                *byte = codes[i] & 15 | codes[64 + i] << 4;
            }
        }
        pack_two_bits(&codes.map(|code| code >> 4), &mut block[128..192]);
        block[192..208].copy_from_slice(&chosen.scales.map(|scale| scale as u8));
        block[208..210].copy_from_slice(&chosen.d.to_le_bytes());
    }
}
