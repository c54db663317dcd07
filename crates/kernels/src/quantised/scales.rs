//! How the scales of a unit are stored: [`OfBlocks`], [`WithMins`], [`OfParts`] and [`Paired`].

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::array::from_fn;

use super::layout::{LANES, Scales};

/// Bytes of a row of sixteen f16.
const ROW: usize = 2 * LANES;

/// A column's f16 of a row of sixteen.
fn put_half(bytes: [u8; 2], column: usize, row: &mut [u8]) {
    row[2 * column..][..2].copy_from_slice(&bytes);
}

/// Sixteen f16.
fn halves(row: &[u8]) -> [f32; LANES] {
    from_fn(|column| half::f16::from_le_bytes([row[2 * column], row[2 * column + 1]]).to_f32())
}

/// Sixteen bytes.
fn bytes(row: &[u8], is_signed: bool) -> [f32; LANES] {
    from_fn(|column| if is_signed { f32::from(row[column].cast_signed()) } else { f32::from(row[column]) })
}

fn product(factors: [f32; LANES], scales: [f32; LANES]) -> [f32; LANES] {
    from_fn(|column| factors[column] * scales[column])
}

/// The same reads in registers.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Sixteen f16 at `row`.
    ///
    /// # Safety
    /// 32 bytes are readable at `row`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn halves_512(row: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(row.cast()) })
    }

    /// Eight of sixteen f16 at `row`.
    ///
    /// # Safety
    /// 32 bytes are readable at `row`.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub(super) unsafe fn halves_256(row: *const u8, side: usize) -> __m256 {
        // SAFETY: the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(row.add(side * 16).cast()) })
    }

    /// Sixteen bytes at `row`.
    ///
    /// # Safety
    /// 16 bytes are readable at `row`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn bytes_512<const SIGNED: bool>(row: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        let bytes = unsafe { _mm_loadu_si128(row.cast()) };
        _mm512_cvtepi32_ps(if SIGNED { _mm512_cvtepi8_epi32(bytes) } else { _mm512_cvtepu8_epi32(bytes) })
    }

    /// Eight of sixteen bytes at `row`.
    ///
    /// # Safety
    /// 16 bytes are readable at `row`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn bytes_256<const SIGNED: bool>(row: *const u8, side: usize) -> __m256 {
        // SAFETY: the caller's promise.
        let bytes = unsafe { _mm_loadl_epi64(row.add(side * 8).cast()) };
        _mm256_cvtepi32_ps(if SIGNED { _mm256_cvtepi8_epi32(bytes) } else { _mm256_cvtepu8_epi32(bytes) })
    }
}

/// A scale for each block of 32: f16, or bf16 if it is a power of two. `[2][16]`
pub(super) struct OfBlocks<const EXPONENT: bool>;

impl<const EXPONENT: bool> Scales for OfBlocks<EXPONENT> {
    const BLOCKS: usize = 2;
    const BYTES: usize = 2 * ROW;
    const HALVES: bool = false;
    const AFFINE: bool = false;
    type Column = [[u8; 2]; 2];

    fn put(scales: &Self::Column, column: usize, unit: &mut [u8]) {
        scales.iter().zip(unit.chunks_exact_mut(ROW)).for_each(|(&scale, row)| put_half(scale, column, row));
    }

    fn scales(unit: &[u8], block: usize, _half: usize) -> [f32; LANES] {
        let row = &unit[block * ROW..];
        if EXPONENT {
            from_fn(|column| half::bf16::from_le_bytes([row[2 * column], row[2 * column + 1]]).to_f32())
        } else {
            halves(row)
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales_512(unit: *const u8, block: usize, _half: usize) -> __m512 {
        // SAFETY: inside the unit.
        unsafe {
            if EXPONENT {
                let row = _mm256_loadu_si256(unit.add(block * ROW).cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(row)))
            } else {
                x86::halves_512(unit.add(block * ROW))
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales_256(unit: *const u8, block: usize, _half: usize, side: usize) -> __m256 {
        // SAFETY: inside the unit.
        unsafe {
            if EXPONENT {
                let row = _mm_loadu_si128(unit.add(block * ROW + side * LANES).cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(row)))
            } else {
                x86::halves_256(unit.add(block * ROW), side)
            }
        }
    }
}

/// A scale and a minimum for a block of 32, both f16: `[16]` scales, `[16]` minima.
pub(super) struct WithMins;

impl Scales for WithMins {
    const BLOCKS: usize = 1;
    const BYTES: usize = 2 * ROW;
    const HALVES: bool = false;
    const AFFINE: bool = true;
    /// Scale and minimum.
    type Column = [[u8; 2]; 2];

    fn put(scales: &Self::Column, column: usize, unit: &mut [u8]) {
        OfBlocks::<false>::put(scales, column, unit);
    }

    fn scales(unit: &[u8], _block: usize, _half: usize) -> [f32; LANES] {
        halves(unit)
    }

    fn mins(unit: &[u8], _block: usize, _half: usize) -> [f32; LANES] {
        halves(&unit[ROW..])
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn scales_512(unit: *const u8, _block: usize, _half: usize) -> __m512 {
        // SAFETY: inside the unit.
        unsafe { x86::halves_512(unit) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mins_512(unit: *const u8, _block: usize, _half: usize) -> __m512 {
        // SAFETY: inside the unit.
        unsafe { x86::halves_512(unit.add(ROW)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales_256(unit: *const u8, _block: usize, _half: usize, side: usize) -> __m256 {
        // SAFETY: inside the unit.
        unsafe { x86::halves_256(unit, side) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn mins_256(unit: *const u8, _block: usize, _half: usize, side: usize) -> __m256 {
        // SAFETY: inside the unit.
        unsafe { x86::halves_256(unit.add(ROW), side) }
    }
}

/// What one column of a super-block of 256 brings: f16 factors of all scales and all minima, and for each part a byte.
pub(super) struct SuperBlock<const PARTS: usize> {
    pub(super) factor: [u8; 2],
    pub(super) min_factor: [u8; 2],
    pub(super) scales: [u8; PARTS],
    pub(super) mins: [u8; PARTS],
}

/// Blocks of 32 in a super-block.
const BLOCKS: usize = 8;
/// Where the bytes begin.
const PARTS_AT: usize = 2 * ROW;

/// A byte as the scale, and one as the minimum, if it has any, of each of `PARTS` parts of a super-block: `[16]` f16
/// factors, `[16]` f16 factors of the minima (or unused), `[PARTS][16]` scales, `[PARTS][16]` minima.
pub(super) struct OfParts<const PARTS: usize, const SIGNED: bool, const MINS: bool>;

impl<const PARTS: usize, const SIGNED: bool, const MINS: bool> OfParts<PARTS, SIGNED, MINS> {
    const MINS_AT: usize = PARTS_AT + PARTS * LANES;

    /// Where a block's or half's byte stands behind the first.
    const fn row(block: usize, half: usize) -> usize {
        (block * (PARTS / BLOCKS) + half) * LANES
    }
}

impl<const PARTS: usize, const SIGNED: bool, const MINS: bool> Scales for OfParts<PARTS, SIGNED, MINS> {
    const BLOCKS: usize = BLOCKS;
    const BYTES: usize = Self::MINS_AT + if MINS { PARTS * LANES } else { 0 };
    const HALVES: bool = PARTS == 2 * BLOCKS;
    const AFFINE: bool = MINS;
    type Column = SuperBlock<PARTS>;

    fn put(column: &Self::Column, index: usize, unit: &mut [u8]) {
        put_half(column.factor, index, unit);
        for (part, &scale) in column.scales.iter().enumerate() {
            unit[PARTS_AT + part * LANES + index] = scale;
        }
        if MINS {
            put_half(column.min_factor, index, &mut unit[ROW..]);
            for (part, &min) in column.mins.iter().enumerate() {
                unit[Self::MINS_AT + part * LANES + index] = min;
            }
        }
    }

    fn scales(unit: &[u8], block: usize, half: usize) -> [f32; LANES] {
        product(halves(unit), bytes(&unit[PARTS_AT + Self::row(block, half)..], SIGNED))
    }

    fn mins(unit: &[u8], block: usize, half: usize) -> [f32; LANES] {
        product(halves(&unit[ROW..]), bytes(&unit[Self::MINS_AT + Self::row(block, half)..], false))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn scales_512(unit: *const u8, block: usize, half: usize) -> __m512 {
        // SAFETY: inside the unit.
        unsafe {
            let scales = x86::bytes_512::<SIGNED>(unit.add(PARTS_AT + Self::row(block, half)));
            _mm512_mul_ps(x86::halves_512(unit), scales)
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mins_512(unit: *const u8, block: usize, half: usize) -> __m512 {
        // SAFETY: inside the unit.
        unsafe {
            let mins = x86::bytes_512::<false>(unit.add(Self::MINS_AT + Self::row(block, half)));
            _mm512_mul_ps(x86::halves_512(unit.add(ROW)), mins)
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales_256(unit: *const u8, block: usize, half: usize, side: usize) -> __m256 {
        // SAFETY: inside the unit.
        unsafe {
            let scales = x86::bytes_256::<SIGNED>(unit.add(PARTS_AT + Self::row(block, half)), side);
            _mm256_mul_ps(x86::halves_256(unit, side), scales)
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn mins_256(unit: *const u8, block: usize, half: usize, side: usize) -> __m256 {
        // SAFETY: inside the unit.
        unsafe {
            let mins = x86::bytes_256::<false>(unit.add(Self::MINS_AT + Self::row(block, half)), side);
            _mm256_mul_ps(x86::halves_256(unit.add(ROW), side), mins)
        }
    }
}

/// Four bits each as the scale and the minimum of each half: `[16]` f16 factors of the scales, `[16]` of the minima,
/// `[16][16]` pairs, the scale in the low half of a byte.
pub(super) struct Paired;

const LOW: u8 = 15;

impl Scales for Paired {
    const BLOCKS: usize = BLOCKS;
    const BYTES: usize = PARTS_AT + 2 * BLOCKS * LANES;
    const HALVES: bool = true;
    const AFFINE: bool = true;
    type Column = SuperBlock<16>;

    fn put(column: &Self::Column, index: usize, unit: &mut [u8]) {
        put_half(column.factor, index, unit);
        put_half(column.min_factor, index, &mut unit[ROW..]);
        for (part, (&scale, &min)) in column.scales.iter().zip(&column.mins).enumerate() {
            unit[PARTS_AT + part * LANES + index] = scale & LOW | min << 4;
        }
    }

    fn scales(unit: &[u8], block: usize, half: usize) -> [f32; LANES] {
        let pairs = &unit[PARTS_AT + (2 * block + half) * LANES..];
        product(halves(unit), from_fn(|column| f32::from(pairs[column] & LOW)))
    }

    fn mins(unit: &[u8], block: usize, half: usize) -> [f32; LANES] {
        let pairs = &unit[PARTS_AT + (2 * block + half) * LANES..];
        product(halves(&unit[ROW..]), from_fn(|column| f32::from(pairs[column] >> 4)))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn scales_512(unit: *const u8, block: usize, half: usize) -> __m512 {
        // SAFETY: inside the unit.
        unsafe {
            let pairs = _mm_loadu_si128(unit.add(PARTS_AT + (2 * block + half) * LANES).cast());
            let scales = _mm512_cvtepu8_epi32(_mm_and_si128(pairs, _mm_set1_epi8(LOW as i8)));
            _mm512_mul_ps(x86::halves_512(unit), _mm512_cvtepi32_ps(scales))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mins_512(unit: *const u8, block: usize, half: usize) -> __m512 {
        // SAFETY: inside the unit.
        unsafe {
            let pairs = _mm_loadu_si128(unit.add(PARTS_AT + (2 * block + half) * LANES).cast());
            let mins = _mm512_srli_epi32::<4>(_mm512_cvtepu8_epi32(pairs));
            _mm512_mul_ps(x86::halves_512(unit.add(ROW)), _mm512_cvtepi32_ps(mins))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales_256(unit: *const u8, block: usize, half: usize, side: usize) -> __m256 {
        // SAFETY: inside the unit.
        unsafe {
            let pairs = _mm_loadl_epi64(unit.add(PARTS_AT + (2 * block + half) * LANES + side * 8).cast());
            let scales = _mm256_cvtepu8_epi32(_mm_and_si128(pairs, _mm_set1_epi8(LOW as i8)));
            _mm256_mul_ps(x86::halves_256(unit, side), _mm256_cvtepi32_ps(scales))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn mins_256(unit: *const u8, block: usize, half: usize, side: usize) -> __m256 {
        // SAFETY: inside the unit.
        unsafe {
            let pairs = _mm_loadl_epi64(unit.add(PARTS_AT + (2 * block + half) * LANES + side * 8).cast());
            let mins = _mm256_srli_epi32::<4>(_mm256_cvtepu8_epi32(pairs));
            _mm256_mul_ps(x86::halves_256(unit.add(ROW), side), _mm256_cvtepi32_ps(mins))
        }
    }
}
