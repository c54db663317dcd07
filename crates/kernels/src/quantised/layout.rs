//! What a weight format brings to the quantised products: how its blocks are laid out in panels, and how a block of a
//! panel becomes codes and scales again.
//!
//! A *panel* holds 16 columns (rows of the weight matrix, outputs of the product). Along K it is cut into *units* of one
//! or more blocks of 32, each unit a whole number of cache lines: first the [`Scales`] of its blocks, then block after
//! block the [`Codes`]. A block's codes, once unpacked, are eight *groups* of four along K: for each of the 16 columns
//! four bytes, as the dot-product instructions read them.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Columns of a panel.
pub(super) const LANES: usize = 16;
/// Length of a block along K: the activations have one scale a block.
pub(super) const BLOCK: usize = 32;
/// Groups of four codes in a block.
pub(super) const GROUPS: usize = BLOCK / 4;
/// A group's codes: four bytes for each column.
pub(super) type Group = [u8; 4 * LANES];

/// How the AVX2 kernel may add up products of codes and activations in 16 bits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    /// Unsigned codes up to 15: a whole block's sums fit.
    Nibble,
    /// Unsigned codes up to 127: two products fit.
    Byte,
    /// Signed codes: the sign moves to the activations.
    Signed,
}

/// How the codes of a block of sixteen columns are stored.
pub(super) trait Codes: 'static {
    /// Bytes of a block.
    const BYTES: usize;
    /// What is subtracted from an unsigned code.
    const BIAS: i32;
    /// How large codes are, for AVX2.
    const WIDTH: Width;

    /// Writes one column's codes into a block that was zero there.
    fn put(codes: &[u8; BLOCK], column: usize, block: &mut [u8]);
    /// The unsigned codes of a block.
    fn get(block: &[u8]) -> [Group; GROUPS];
    /// A group of a block.
    ///
    /// # Safety
    /// `block` is readable, and the machine has AVX-512.
    #[cfg(target_arch = "x86_64")]
    unsafe fn get_512(block: *const u8, group: usize) -> __m512i;
    /// Groups `group` and `group + 4`, of columns 0..8 or 8..16; signed if `WIDTH` says so.
    ///
    /// # Safety
    /// `block` is readable, and the machine has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn get_256(block: *const u8, group: usize, side: usize) -> [__m256i; 2];
}

/// How the scales of a unit of sixteen columns are stored, and its minima if it has any.
pub(super) trait Scales: 'static {
    /// Blocks of 32 in a unit.
    const BLOCKS: usize;
    /// Bytes of a unit's scales and minima.
    const BYTES: usize;
    /// Whether each half of a block has its own scale (and minimum).
    const HALVES: bool;
    /// Whether there are minima.
    const AFFINE: bool;
    /// What one column brings to a unit.
    type Column;

    /// Writes one column into a unit that was zero there.
    fn put(scales: &Self::Column, column: usize, unit: &mut [u8]);
    /// The columns' scales, of the whole block or of a half.
    fn scales(unit: &[u8], block: usize, half: usize) -> [f32; LANES];
    /// The columns' minima, if `AFFINE`.
    fn mins(_unit: &[u8], _block: usize, _half: usize) -> [f32; LANES] {
        [0.0; LANES]
    }

    /// As [`Scales::scales`].
    ///
    /// # Safety
    /// `unit` is readable, and the machine has AVX-512.
    #[cfg(target_arch = "x86_64")]
    unsafe fn scales_512(unit: *const u8, block: usize, half: usize) -> __m512;
    /// As [`Scales::mins`].
    ///
    /// # Safety
    /// As [`Scales::scales_512`].
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mins_512(_unit: *const u8, _block: usize, _half: usize) -> __m512 {
        _mm512_setzero_ps()
    }
    /// As [`Scales::scales`], of columns 0..8 or 8..16.
    ///
    /// # Safety
    /// `unit` is readable, and the machine has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn scales_256(unit: *const u8, block: usize, half: usize, side: usize) -> __m256;
    /// As [`Scales::mins`], of columns 0..8 or 8..16.
    ///
    /// # Safety
    /// As [`Scales::scales_256`].
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn mins_256(_unit: *const u8, _block: usize, _half: usize, _side: usize) -> __m256 {
        _mm256_setzero_ps()
    }
}

/// A weight format as the kernels see it.
///
/// A weight is `scale * (code - BIAS) - min`, its code unsigned.
pub(super) trait Layout: 'static {
    /// How its scales are stored.
    type Scales: Scales;
    /// How its codes are stored.
    type Codes: Codes;
    /// Bytes of one column's unit in the published format.
    const SOURCE_BYTES: usize;

    /// Takes one column's unit, or what there is of it, in the published format apart; hands on the codes of each block.
    fn read(source: &[u8], codes: impl FnMut(usize, &[u8; BLOCK])) -> <Self::Scales as Scales>::Column;

    /// Blocks of 32 in a unit.
    const UNIT_BLOCKS: usize = Self::Scales::BLOCKS;
    /// Bytes of a panel's unit.
    const UNIT_BYTES: usize = Self::Scales::BYTES + Self::UNIT_BLOCKS * Self::Codes::BYTES;
    /// What is subtracted from an unsigned code.
    const BIAS: i32 = Self::Codes::BIAS;
    /// Whether each half of a block has its own scale.
    const HALVES: bool = Self::Scales::HALVES;
    /// Parts of a block that have their own scale.
    const PARTS: usize = if Self::HALVES { 2 } else { 1 };
    /// Whether there are minima.
    const AFFINE: bool = Self::Scales::AFFINE;
    /// Whether minima are those of halves. Then codes have no bias, and the records' starts are the sums of the halves.
    const AFFINE_HALVES: bool = Self::AFFINE && Self::HALVES;
    /// What the records' starts are made with.
    const START_BIAS: i32 = if Self::AFFINE_HALVES { -1 } else { Self::BIAS };
    /// How large codes are, for AVX2.
    const WIDTH: Width = Self::Codes::WIDTH;

    /// Writes one column of a unit, given its blocks in the published format; `unit` was zero.
    fn pack(source: &[u8], column: usize, unit: &mut [u8]) {
        const { assert!(Self::UNIT_BYTES.is_multiple_of(64) && (!Self::AFFINE_HALVES || Self::BIAS == 0)) };
        let (scales, blocks) = unit.split_at_mut(Self::Scales::BYTES);
        let read = Self::read(source, |block, codes| {
            Self::Codes::put(codes, column, &mut blocks[block * Self::Codes::BYTES..][..Self::Codes::BYTES]);
        });
        Self::Scales::put(&read, column, scales);
    }

    /// The unsigned codes of a block.
    fn codes(unit: &[u8], block: usize) -> [Group; GROUPS] {
        Self::Codes::get(&unit[Self::Scales::BYTES + block * Self::Codes::BYTES..])
    }

    /// A group of a block.
    ///
    /// # Safety
    /// `unit` is readable, and the machine has AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn codes_512(unit: *const u8, block: usize, group: usize) -> __m512i {
        // SAFETY: inside the unit.
        unsafe { Self::Codes::get_512(unit.add(Self::Scales::BYTES + block * Self::Codes::BYTES), group) }
    }

    /// Groups `group` and `group + 4` of a block, of columns 0..8 or 8..16; signed if `WIDTH` says so.
    ///
    /// # Safety
    /// `unit` is readable, and the machine has AVX2.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn codes_256(unit: *const u8, block: usize, group: usize, side: usize) -> [__m256i; 2] {
        // SAFETY: inside the unit.
        unsafe { Self::Codes::get_256(unit.add(Self::Scales::BYTES + block * Self::Codes::BYTES), group, side) }
    }
}

/// Instructions that all formats use.
#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::Layout;

    /// How far ahead of the codes in use memory is asked for, in bytes.
    const AHEAD: usize = 8192;

    /// Asks for the lines that stand `AHEAD` bytes behind a block's share of its unit. A whole unit's lines at once would
    /// be more than a core can wait for: it would stand still.
    #[inline]
    #[target_feature(enable = "sse")]
    pub(in super::super) fn fetch_ahead<L: Layout>(unit: *const u8, block: usize) {
        let lines = const { (L::UNIT_BYTES / 64).div_ceil(L::UNIT_BLOCKS) };
        for line in block * lines..(block + 1) * lines {
            _mm_prefetch::<_MM_HINT_T0>(unit.wrapping_add(AHEAD + line * 64).cast());
        }
    }
}
