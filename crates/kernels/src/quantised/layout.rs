//! What a weight format brings to the quantised products: how its blocks are laid out in panels, and how a block of a
//! panel becomes codes and scales again.
//!
//! A *panel* holds 16 columns (rows of the weight matrix, outputs of the product). Along K it is cut into *units* of one
//! or more blocks of 32, each unit a whole number of cache lines. A block's codes, once unpacked, are eight *groups* of
//! four along K: for each of the 16 columns four bytes, as the dot-product instructions read them.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256, __m256i, __m512, __m512i};

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

/// A weight format as the kernels see it.
///
/// A weight is `scale * (code - BIAS) - min`, its code unsigned.
pub(super) trait Layout: 'static {
    /// Blocks of 32 in a unit.
    const UNIT_BLOCKS: usize;
    /// Bytes of a panel's unit.
    const UNIT_BYTES: usize;
    /// Bytes of one column's unit in the published format.
    const SOURCE_BYTES: usize;
    /// What is subtracted from an unsigned code.
    const BIAS: i32;
    /// Whether each half of a block has its own scale.
    const HALVES: bool;
    /// Whether blocks have a minimum.
    const AFFINE: bool;
    /// How large codes are, for AVX2.
    const WIDTH: Width;

    /// Writes one column of a unit, given its blocks in the published format; `unit` was zero.
    fn pack(source: &[u8], column: usize, unit: &mut [u8]);

    /// The unsigned codes of a block.
    fn codes(unit: &[u8], block: usize) -> [Group; GROUPS];
    /// The columns' scales, of the whole block or of a half.
    fn scales(unit: &[u8], block: usize, half: usize) -> [f32; LANES];
    /// The columns' minima, if `AFFINE`.
    fn mins(_unit: &[u8], _block: usize) -> [f32; LANES] {
        [0.0; LANES]
    }

    /// A group of a block.
    ///
    /// # Safety
    /// `unit` is readable, and the machine has AVX-512.
    #[cfg(target_arch = "x86_64")]
    unsafe fn codes_512(unit: *const u8, block: usize, group: usize) -> __m512i;
    /// As [`Layout::scales`].
    ///
    /// # Safety
    /// As [`Layout::codes_512`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn scales_512(unit: *const u8, block: usize, half: usize) -> __m512;
    /// As [`Layout::mins`].
    ///
    /// # Safety
    /// As [`Layout::codes_512`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn mins_512(unit: *const u8, block: usize) -> __m512;

    /// The codes of groups `group` and `group + 4`, of columns 0..8 or 8..16; signed if `WIDTH` says so.
    ///
    /// # Safety
    /// `unit` is readable, and the machine has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn codes_256(unit: *const u8, block: usize, group: usize, side: usize) -> [__m256i; 2];
    /// As [`Layout::scales`], of columns 0..8 or 8..16.
    ///
    /// # Safety
    /// As [`Layout::codes_256`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn scales_256(unit: *const u8, block: usize, half: usize, side: usize) -> __m256;
    /// As [`Layout::mins`], of columns 0..8 or 8..16.
    ///
    /// # Safety
    /// As [`Layout::codes_256`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn mins_256(unit: *const u8, block: usize, side: usize) -> __m256;
}

/// Writes one column's 32 codes, a byte each, into a block's 512 bytes.
pub(super) fn put_bytes(codes: &[u8; BLOCK], column: usize, block: &mut [u8]) {
    for (group, codes) in codes.chunks_exact(4).enumerate() {
        block[group * 64 + column * 4..][..4].copy_from_slice(codes);
    }
}

/// Writes one column's 32 codes of four bits into a block's 256 bytes: group `g` in the low halves of the bytes of
/// group `g + 4`.
pub(super) fn put_nibbles(codes: &[u8; BLOCK], column: usize, block: &mut [u8]) {
    let (low, high) = codes.split_at(BLOCK / 2);
    for (group, (low, high)) in low.chunks_exact(4).zip(high.chunks_exact(4)).enumerate() {
        for (byte, (low, high)) in block[group * 64 + column * 4..][..4].iter_mut().zip(low.iter().zip(high)) {
            *byte = low & 15 | high << 4;
        }
    }
}

/// The groups that [`put_nibbles`] wrote.
pub(super) fn nibbles(block: &[u8]) -> [Group; GROUPS] {
    std::array::from_fn(|group| {
        std::array::from_fn(|byte| {
            let pair = block[group % 4 * 64 + byte];
            if group < 4 { pair & 15 } else { pair >> 4 }
        })
    })
}

/// A column's f16 of a row of sixteen.
pub(super) fn put_half(bytes: [u8; 2], column: usize, row: &mut [u8]) {
    row[2 * column..][..2].copy_from_slice(&bytes);
}

/// Sixteen f16.
pub(super) fn halves(row: &[u8]) -> [f32; LANES] {
    std::array::from_fn(|column| half::f16::from_le_bytes([row[2 * column], row[2 * column + 1]]).to_f32())
}

/// Instructions that several formats unpack with.
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

    /// A group that [`super::put_nibbles`] wrote.
    ///
    /// # Safety
    /// 256 bytes are readable at `block`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(in super::super) unsafe fn nibbles_512(block: *const u8, group: usize) -> __m512i {
        // SAFETY: the caller's promise.
        let pairs = unsafe { _mm512_loadu_si512(block.add(group % 4 * 64).cast()) };
        _mm512_and_si512(if group < 4 { pairs } else { _mm512_srli_epi16::<4>(pairs) }, _mm512_set1_epi8(15))
    }

    /// Groups `group` and `group + 4` of eight columns.
    ///
    /// # Safety
    /// 256 bytes are readable at `block`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in super::super) unsafe fn nibbles_256(block: *const u8, group: usize, side: usize) -> [__m256i; 2] {
        let mask = _mm256_set1_epi8(15);
        // SAFETY: the caller's promise.
        let pairs = unsafe { _mm256_loadu_si256(block.add(group * 64 + side * 32).cast()) };
        [_mm256_and_si256(pairs, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), mask)]
    }

    /// Sixteen f16 at `row`.
    ///
    /// # Safety
    /// 32 bytes are readable at `row`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in super::super) unsafe fn halves_512(row: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(row.cast()) })
    }

    /// Eight of sixteen f16 at `row`.
    ///
    /// # Safety
    /// 32 bytes are readable at `row`.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub(in super::super) unsafe fn halves_256(row: *const u8, side: usize) -> __m256 {
        // SAFETY: the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(row.add(side * 16).cast()) })
    }

    /// Sixteen bytes, unsigned.
    ///
    /// # Safety
    /// 16 bytes are readable at `row`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in super::super) unsafe fn bytes_512<const SIGNED: bool>(row: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        let bytes = unsafe { _mm_loadu_si128(row.cast()) };
        let words = if SIGNED { _mm512_cvtepi8_epi32(bytes) } else { _mm512_cvtepu8_epi32(bytes) };
        _mm512_cvtepi32_ps(words)
    }

    /// Eight of sixteen bytes.
    ///
    /// # Safety
    /// 16 bytes are readable at `row`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in super::super) unsafe fn bytes_256<const SIGNED: bool>(row: *const u8, side: usize) -> __m256 {
        // SAFETY: the caller's promise.
        let bytes = unsafe { _mm_loadl_epi64(row.add(side * 8).cast()) };
        let words = if SIGNED { _mm256_cvtepi8_epi32(bytes) } else { _mm256_cvtepu8_epi32(bytes) };
        _mm256_cvtepi32_ps(words)
    }
}
