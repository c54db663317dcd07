//! [`Planes`] and [`Table`]: codes of two to eight bits.
//!
//! A *plane* holds some bits of every code of a block, in as many rows of 64 bytes as it has bits: a row is four bytes for
//! each of the 16 columns, and a byte holds the bits of several groups. With four bits, group g stands in row `g % 4`, in
//! the low halves of its bytes for the first four groups and in the high halves for the others; with two, in row `g % 2`
//! at bit `2 (g / 2)`; with one, at bit g. A shift and a mask give a group.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::layout::{BLOCK, Codes, GROUPS, Group, LANES, Width};

/// Bytes of a row of a plane.
const ROW: usize = 4 * LANES;

/// Where a group's bits stand in a plane: its row's first byte, and how far they are shifted in it.
#[inline(always)]
const fn place<const BITS: usize>(group: usize) -> (usize, usize) {
    (group % BITS * ROW, group / BITS * BITS)
}

#[inline(always)]
const fn mask(bits: usize) -> u8 {
    ((1u16 << bits) - 1) as u8
}

/// Writes one column's codes, bits `from..from + BITS` of them.
#[inline(always)]
fn put<const BITS: usize>(codes: &[u8; BLOCK], from: usize, column: usize, plane: &mut [u8]) {
    for (group, codes) in codes.as_chunks::<4>().0.iter().enumerate() {
        let (row, shift) = place::<BITS>(group);
        for (byte, code) in plane[row + column * 4..][..4].iter_mut().zip(codes) {
            *byte |= (code >> from & mask(BITS)) << shift;
        }
    }
}

/// Adds what `put` wrote to codes.
#[inline(always)]
fn get<const BITS: usize>(plane: &[u8], at: usize, groups: &mut [Group; GROUPS]) {
    for (group, codes) in groups.iter_mut().enumerate() {
        let (row, shift) = place::<BITS>(group);
        for (code, byte) in codes.iter_mut().zip(&plane[row..row + ROW]) {
            *code |= (byte >> shift & mask(BITS)) << at;
        }
    }
}

/// A group's bits of a plane, at bit `at` of each byte.
///
/// # Safety
/// The plane is readable.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn get_512<const BITS: usize>(plane: *const u8, at: usize, group: usize) -> __m512i {
    let (row, shift) = place::<BITS>(group);
    // SAFETY: the caller's promise.
    let bits = unsafe { _mm512_loadu_si512(plane.add(row).cast()) };
    let count = _mm_cvtsi32_si128(shift.abs_diff(at) as i32);
    let moved = if shift < at { _mm512_sll_epi16(bits, count) } else { _mm512_srl_epi16(bits, count) };
    if BITS == 8 { bits } else { _mm512_and_si512(moved, _mm512_set1_epi8((mask(BITS) << at) as i8)) }
}

/// As [`get_512`], for eight columns.
///
/// # Safety
/// The plane is readable.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn get_256<const BITS: usize>(plane: *const u8, at: usize, group: usize, side: usize) -> __m256i {
    let (row, shift) = place::<BITS>(group);
    // SAFETY: the caller's promise.
    let bits = unsafe { _mm256_loadu_si256(plane.add(row + side * (ROW / 2)).cast()) };
    let count = _mm_cvtsi32_si128(shift.abs_diff(at) as i32);
    let moved = if shift < at { _mm256_sll_epi16(bits, count) } else { _mm256_srl_epi16(bits, count) };
    if BITS == 8 { bits } else { _mm256_and_si256(moved, _mm256_set1_epi8((mask(BITS) << at) as i8)) }
}

/// Codes of `LOW + HIGH` bits, the low ones in one plane, the high ones, if any, in another behind it.
pub(super) struct Planes<const LOW: usize, const HIGH: usize, const BIAS: i32>;

impl<const LOW: usize, const HIGH: usize, const BIAS: i32> Codes for Planes<LOW, HIGH, BIAS> {
    const BYTES: usize = (LOW + HIGH) * ROW;
    const BIAS: i32 = BIAS;
    const WIDTH: Width = match LOW + HIGH {
        ..=4 => Width::Nibble,
        5..=7 => Width::Byte,
        _ => Width::Signed,
    };

    fn put(codes: &[u8; BLOCK], column: usize, block: &mut [u8]) {
        let (low, high) = block.split_at_mut(LOW * ROW);
        put::<LOW>(codes, 0, column, low);
        if HIGH > 0 {
            put::<HIGH>(codes, LOW, column, high);
        }
    }

    fn get(block: &[u8]) -> [Group; GROUPS] {
        let mut groups = [[0; 4 * LANES]; GROUPS];
        get::<LOW>(block, 0, &mut groups);
        if HIGH > 0 {
            get::<HIGH>(&block[LOW * ROW..], LOW, &mut groups);
        }
        groups
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn get_512(block: *const u8, group: usize) -> __m512i {
        // SAFETY: both planes are inside the block.
        unsafe {
            let low = get_512::<LOW>(block, 0, group);
            if HIGH > 0 { _mm512_or_si512(low, get_512::<HIGH>(block.add(LOW * ROW), LOW, group)) } else { low }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn get_256(block: *const u8, group: usize, side: usize) -> [__m256i; 2] {
        [group, group + GROUPS / 2].map(|group| {
            // SAFETY: both planes are inside the block.
            unsafe {
                let low = get_256::<LOW>(block, 0, group, side);
                if HIGH > 0 {
                    _mm256_or_si256(low, get_256::<HIGH>(block.add(LOW * ROW), LOW, group, side))
                } else if LOW == 8 {
                    _mm256_sub_epi8(low, _mm256_set1_epi8(BIAS as u8 as i8))
                } else {
                    low
                }
            }
        })
    }
}

/// What sixteen codes stand for.
pub(super) trait Codebook: 'static {
    /// The code's value.
    const VALUES: [i8; 16];
}

/// IQ4_NL and IQ4_XS: the quantiles of a bell curve.
pub(super) struct NonLinear;
/// MXFP4: the values of a float of one sign, two exponent and one mantissa bits, doubled (OCP Microscaling Formats 1.0).
pub(super) struct Float;

impl Codebook for NonLinear {
    const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
}

impl Codebook for Float {
    const VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
}

/// Codes of four bits that choose from a table; what is multiplied is the number there.
pub(super) struct Table<C>(PhantomData<C>);

type Indices = Planes<4, 0, 0>;

impl<C: Codebook> Table<C> {
    const UNSIGNED: [u8; 16] = {
        let mut table = [0; 16];
        let mut code = 0;
        while code < 16 {
            table[code] = C::VALUES[code].cast_unsigned() ^ 0x80;
            code += 1;
        }
        table
    };
}

impl<C: Codebook> Codes for Table<C> {
    const BYTES: usize = Indices::BYTES;
    const BIAS: i32 = 128;
    const WIDTH: Width = Width::Signed;

    fn put(codes: &[u8; BLOCK], column: usize, block: &mut [u8]) {
        Indices::put(codes, column, block);
    }

    fn get(block: &[u8]) -> [Group; GROUPS] {
        Indices::get(block).map(|group| group.map(|code| Self::UNSIGNED[usize::from(code)]))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn get_512(block: *const u8, group: usize) -> __m512i {
        // SAFETY: inside the block; sixteen bytes.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(Self::UNSIGNED.as_ptr().cast()));
            _mm512_shuffle_epi8(table, Indices::get_512(block, group))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn get_256(block: *const u8, group: usize, side: usize) -> [__m256i; 2] {
        // SAFETY: inside the block; sixteen bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(C::VALUES.as_ptr().cast()));
            Indices::get_256(block, group, side).map(|codes| _mm256_shuffle_epi8(table, codes))
        }
    }
}
