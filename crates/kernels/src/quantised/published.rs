//! The published block formats as [`Layout`]s: where their scales and codes go. Packing moves bits, and rounds nothing.

use std::marker::PhantomData;

use super::codes::{Float, NonLinear, Planes, Table};
use super::layout::{BLOCK, Codes, Layout};
use super::scales::{OfBlocks, OfParts, Paired, SuperBlock, WithMins};
use crate::formats::codebook;
use crate::formats::k_quants::{self, Parts};
use crate::formats::numbers::half_e8m0;
use crate::formats::uniform::{unpack_nibbles, with_fifth_bits};

/// Blocks of 32 with one scale: Q4_0, Q5_0, Q8_0, IQ4_NL and, with an exponent as scale, MXFP4.
pub(super) struct Scaled<C, const EXPONENT: bool>(PhantomData<C>);

pub(super) type Q40 = Scaled<Planes<4, 0, 8>, false>;
pub(super) type Q50 = Scaled<Planes<4, 1, 16>, false>;
pub(super) type Q80 = Scaled<Planes<8, 0, 128>, false>;
pub(super) type Iq4Nl = Scaled<Table<NonLinear>, false>;
pub(super) type Mxfp4 = Scaled<Table<Float>, true>;

impl<C: Codes, const EXPONENT: bool> Scaled<C, EXPONENT> {
    const SCALE_BYTES: usize = if EXPONENT { 1 } else { 2 };
    const BLOCK_BYTES: usize = Self::SCALE_BYTES + source_bytes::<C>();
}

/// Bytes of a column's block in the published format: as many bits as in ours.
const fn source_bytes<C: Codes>() -> usize {
    C::BYTES / super::layout::LANES
}

impl<C: Codes, const EXPONENT: bool> Layout for Scaled<C, EXPONENT> {
    type Scales = OfBlocks<EXPONENT>;
    type Codes = C;
    const SOURCE_BYTES: usize = 2 * Self::BLOCK_BYTES;

    fn read(source: &[u8], mut codes: impl FnMut(usize, &[u8; BLOCK])) -> [[u8; 2]; 2] {
        let mut scales = [[0; 2]; 2];
        for (index, block) in source.chunks_exact(Self::BLOCK_BYTES).enumerate() {
            let (scale, bits) = block.split_at(Self::SCALE_BYTES);
            scales[index] = if EXPONENT {
                // A power of two, half the published scale, for the table holds doubled values.
                half::bf16::from_f32(half_e8m0(scale[0])).to_le_bytes()
            } else {
                [scale[0], scale[1]]
            };
            codes(index, &unpack(bits));
        }
        scales
    }
}

/// The unsigned codes of a block: 16 bytes of four bits each, 4 bytes of fifth bits before them, or 32 signed bytes.
fn unpack(bits: &[u8]) -> [u8; BLOCK] {
    match bits.len() {
        32 => std::array::from_fn(|k| bits[k] ^ 0x80),
        20 => with_fifth_bits(unpack_nibbles(&bits[4..]), bits),
        _ => unpack_nibbles(bits),
    }
}

/// Blocks of 32 with a scale and a least number: Q4_1 and Q5_1.
pub(super) struct Affine<C>(PhantomData<C>);

pub(super) type Q41 = Affine<Planes<4, 0, 0>>;
pub(super) type Q51 = Affine<Planes<4, 1, 0>>;

impl<C: Codes> Layout for Affine<C> {
    type Scales = WithMins;
    type Codes = C;
    const SOURCE_BYTES: usize = 4 + source_bytes::<C>();

    fn read(source: &[u8], mut codes: impl FnMut(usize, &[u8; BLOCK])) -> [[u8; 2]; 2] {
        codes(0, &unpack(&source[4..]));
        // The least number is added there, and taken away here.
        [[source[0], source[1]], [source[2], source[3] ^ 0x80]]
    }
}

/// Declares layouts of super-blocks of 256: name, source with `unpack`, bytes, parts, scales, codes.
macro_rules! super_blocks {
    ($($name:ident: $source:path, $bytes:literal, $parts:literal, $scales:ty, $codes:ty;)*) => {$(
        pub(super) struct $name;

        impl Layout for $name {
            type Scales = $scales;
            type Codes = $codes;
            const SOURCE_BYTES: usize = $bytes;

            fn read(source: &[u8], codes: impl FnMut(usize, &[u8; BLOCK])) -> SuperBlock<$parts> {
                super_block(<$source>::unpack(source), codes)
            }
        }
    )*};
}

super_blocks! {
    Q2K: k_quants::Q2K, 84, 16, Paired, Planes<2, 0, 0>;
    Q3K: k_quants::Q3K, 110, 16, OfParts<16, true, false>, Planes<2, 1, 4>;
    Q4K: k_quants::Q4K, 144, 8, OfParts<8, false, true>, Planes<4, 0, 0>;
    Q5K: k_quants::Q5K, 176, 8, OfParts<8, false, true>, Planes<4, 1, 0>;
    Q6K: k_quants::Q6K, 210, 16, OfParts<16, true, false>, Planes<4, 2, 32>;
    Iq4Xs: codebook::Iq4Xs, 136, 8, OfParts<8, true, false>, Table<NonLinear>;
}

fn super_block<const N: usize>(block: Parts<N>, mut codes: impl FnMut(usize, &[u8; BLOCK])) -> SuperBlock<N> {
    for (index, block) in block.codes.as_chunks::<BLOCK>().0.iter().enumerate() {
        codes(index, block);
    }
    let Parts { d, d_least, scales, leasts, .. } = block;
    SuperBlock { factor: d.to_le_bytes(), min_factor: d_least.to_le_bytes(), scales, mins: leasts }
}
