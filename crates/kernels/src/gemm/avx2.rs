//! The products on AVX2: fused multiply-adds on f32, to which pairs of bf16 are expanded in the register.

use std::arch::x86_64::*;

use super::kernels::{BlockProduct, Kernels, Lines};
use super::packed::{BLOCK_WORDS, LANES};
use super::{Precision, portable};

pub(super) static F32: Kernels = Kernels {
    block_rows: 6,
    row_multiple: 1,
    k_blocks: 16,
    precision: Precision::F32,
    takes_unpacked: false,
    pack_rows: pack_rows::<false>,
    pack_panels: pack_panels::<false>,
    multiply: multiply::<false>,
};

pub(super) static BF16: Kernels = Kernels {
    block_rows: 4,
    precision: Precision::Bf16,
    pack_rows: pack_rows::<true>,
    pack_panels: pack_panels::<true>,
    multiply: multiply::<true>,
    ..F32
};

/// See [`portable::pack_rows`], here compiled for AVX2.
///
/// # Safety
/// As there, on a machine with AVX2.
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_rows<const BF16: bool>(rows: &Lines, block_rows: usize, padded: usize, out: *mut u32) {
    // SAFETY: handed on.
    unsafe { portable::pack_rows::<BF16>(rows, block_rows, padded, out) }
}

/// See [`portable::pack_panels`], here compiled for AVX2.
///
/// # Safety
/// As there, on a machine with AVX2.
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_panels<const BF16: bool>(columns: &Lines, panel_words: usize, stream: bool, out: *mut u32) {
    // SAFETY: handed on.
    unsafe { portable::pack_panels::<BF16>(columns, panel_words, stream, out) }
}

/// See [`Kernels::multiply`].
///
/// # Safety
/// As [`Kernels::multiply`] asks, on a machine with [`Isa::Avx2`](crate::isa::Isa::Avx2).
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply<const BF16: bool>(product: &BlockProduct) {
    for panel in 0..product.columns.div_ceil(LANES) {
        // SAFETY: handed on; the panel is one of the product's.
        unsafe {
            match product.rows {
                1 => tile::<BF16, 1>(product, panel),
                2 => tile::<BF16, 2>(product, panel),
                3 => tile::<BF16, 3>(product, panel),
                4 => tile::<BF16, 4>(product, panel),
                5 => tile::<BF16, 5>(product, panel),
                6 => tile::<BF16, 6>(product, panel),
                rows => unreachable!("a block of {rows} rows"),
            }
        }
    }
}

/// `ROWS` rows times one panel, held as its two halves of eight columns.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const BF16: bool, const ROWS: usize>(product: &BlockProduct, panel: usize) {
    let width = LANES.min(product.columns - panel * LANES);
    let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
    // SAFETY: `BlockProduct` says that A, B and C hold these rows, this panel and `width` columns of it; at an edge C
    // is met through a row of its own.
    unsafe {
        let c = product.c.add(panel * LANES);
        if product.accumulate {
            for (row, sums) in sums.iter_mut().enumerate() {
                let c = c.add(row * product.c_stride);
                let mut edge = [0.0; LANES];
                let mut source = c.cast_const();
                if width < LANES {
                    edge[..width].copy_from_slice(std::slice::from_raw_parts(c, width));
                    source = edge.as_ptr();
                }
                *sums = [_mm256_loadu_ps(source), _mm256_loadu_ps(source.add(LANES / 2))];
            }
        }
        let mut a = product.a;
        let mut b = product.b.add(panel * product.panel_stride);
        for _ in 0..product.k_blocks {
            for word in 0..LANES {
                let columns = b.add(word * LANES);
                let columns = [_mm256_load_si256(columns.cast()), _mm256_load_si256(columns.add(LANES / 2).cast())];
                for (row, sums) in sums.iter_mut().enumerate() {
                    let a = _mm256_set1_epi32(a.add(row * LANES + word).read().cast_signed());
                    for (sum, &b) in sums.iter_mut().zip(&columns) {
                        *sum = add_product::<BF16>(*sum, a, b);
                    }
                }
            }
            a = a.add(ROWS * LANES);
            b = b.add(BLOCK_WORDS);
        }
        for (row, sums) in sums.iter().enumerate() {
            let c = c.add(row * product.c_stride);
            let mut edge = [0.0; LANES];
            let target = if width < LANES { edge.as_mut_ptr() } else { c };
            _mm256_storeu_ps(target, sums[0]);
            _mm256_storeu_ps(target.add(LANES / 2), sums[1]);
            if width < LANES {
                std::slice::from_raw_parts_mut(c, width).copy_from_slice(&edge[..width]);
            }
        }
    }
}

/// `sum + a b` for words: an f32 each, or a pair of bf16, of which the first comes first.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_product<const BF16: bool>(sum: __m256, a: __m256i, b: __m256i) -> __m256 {
    if BF16 {
        let sum = _mm256_fmadd_ps(low(a), low(b), sum);
        _mm256_fmadd_ps(high(a), high(b), sum)
    } else {
        _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), sum)
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn low(words: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
}

#[inline]
#[target_feature(enable = "avx2")]
fn high(words: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000_u32.cast_signed())))
}
