//! The products on AVX-512: `vdpbf16ps` for bf16, fused multiply-adds for f32.
//!
//! Both precisions walk K word by word: sixteen columns of a word are one register of B, a row's word is broadcast, and
//! one instruction adds the product to the row's sums. The packers are in [`super::avx512_pack`].

use std::arch::x86_64::*;

use super::Precision;
use super::avx512_pack::{pack_panels, pack_rows};
use super::kernels::{BlockProduct, Kernels};
use super::packed::{BLOCK_WORDS, LANES};

pub(super) static F32: Kernels = Kernels {
    block_rows: 12,
    row_multiple: 1,
    k_blocks: 24,
    precision: Precision::F32,
    takes_unpacked: true,
    pack_rows: pack_rows::<false>,
    pack_panels: pack_panels::<false>,
    multiply: multiply::<false>,
};

pub(super) static BF16: Kernels = Kernels {
    precision: Precision::Bf16,
    pack_rows: pack_rows::<true>,
    pack_panels: pack_panels::<true>,
    multiply: multiply::<true>,
    ..F32
};

/// See [`Kernels::multiply`].
///
/// # Safety
/// As [`Kernels::multiply`] asks, on a machine with [`Isa::Avx512`](crate::isa::Isa::Avx512).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn multiply<const BF16: bool>(product: &BlockProduct) {
    // SAFETY: handed on.
    unsafe {
        match product.unpacked_stride {
            None => blocks::<BF16, true>(product),
            Some(_) => blocks::<BF16, false>(product),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn blocks<const BF16: bool, const PACKED: bool>(product: &BlockProduct) {
    // SAFETY: handed on.
    unsafe {
        match product.rows {
            1 => rows::<BF16, PACKED, 1, 8>(product),
            2 => rows::<BF16, PACKED, 2, 8>(product),
            3 => rows::<BF16, PACKED, 3, 8>(product),
            4 => rows::<BF16, PACKED, 4, 4>(product),
            5 => rows::<BF16, PACKED, 5, 4>(product),
            6 => rows::<BF16, PACKED, 6, 4>(product),
            7 => rows::<BF16, PACKED, 7, 2>(product),
            8 => rows::<BF16, PACKED, 8, 2>(product),
            9 => rows::<BF16, PACKED, 9, 2>(product),
            10 => rows::<BF16, PACKED, 10, 2>(product),
            11 => rows::<BF16, PACKED, 11, 2>(product),
            12 => rows::<BF16, PACKED, 12, 2>(product),
            rows => unreachable!("a block of {rows} rows"),
        }
    }
}

/// All panels for a block of `ROWS` rows: `MOST` at a time, then fewer.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn rows<const BF16: bool, const PACKED: bool, const ROWS: usize, const MOST: usize>(product: &BlockProduct) {
    let panels = product.columns.div_ceil(LANES);
    let mut panel = 0;
    // SAFETY: handed on; each call's panels are among those of the product.
    unsafe {
        while MOST == 8 && panel + 8 <= panels {
            tile::<BF16, PACKED, ROWS, 8>(product, panel);
            panel += 8;
        }
        while MOST >= 4 && panel + 4 <= panels {
            tile::<BF16, PACKED, ROWS, 4>(product, panel);
            panel += 4;
        }
        while panel + 2 <= panels {
            tile::<BF16, PACKED, ROWS, 2>(product, panel);
            panel += 2;
        }
        if panel < panels {
            tile::<BF16, PACKED, ROWS, 1>(product, panel);
        }
    }
}

/// `ROWS` rows times `PANELS` panels, from panel `panel` on.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn tile<const BF16: bool, const PACKED: bool, const ROWS: usize, const PANELS: usize>(
    product: &BlockProduct,
    panel: usize,
) {
    let columns = product.columns - panel * LANES;
    // Columns of the last panel; those before it are whole.
    let last = columns.min(PANELS * LANES) - (PANELS - 1) * LANES;
    let mask: __mmask16 = if last == LANES { !0 } else { (1 << last) - 1 };
    let mut sums = [[_mm512_setzero_ps(); PANELS]; ROWS];
    // SAFETY: `BlockProduct` says that A, B and C hold these rows, panels and columns; the mask keeps to the columns.
    unsafe {
        let c = product.c.add(panel * LANES);
        if product.accumulate {
            for (row, sums) in sums.iter_mut().enumerate() {
                for (p, sum) in sums.iter_mut().enumerate() {
                    let c = c.add(row * product.c_stride + p * LANES);
                    *sum = if p + 1 < PANELS { _mm512_loadu_ps(c) } else { _mm512_maskz_loadu_ps(mask, c) };
                }
            }
        }
        // C is read and written only after the sums are done: have it in the cache by then.
        for row in 0..ROWS {
            for p in 0..PANELS {
                _mm_prefetch::<_MM_HINT_ET0>(c.wrapping_add(row * product.c_stride + p * LANES).cast());
            }
        }
        let (row_stride, block_stride) = match product.unpacked_stride {
            Some(stride) if !PACKED => (stride, LANES),
            _ => (LANES, ROWS * LANES),
        };
        let mut a = product.a;
        let mut b = product.b.add(panel * product.panel_stride);
        for _ in 0..product.k_blocks {
            for word in 0..LANES {
                let mut columns = [_mm512_setzero_si512(); PANELS];
                for (p, columns) in columns.iter_mut().enumerate() {
                    *columns = _mm512_load_si512(b.add(p * product.panel_stride + word * LANES).cast());
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_epi32(a.add(row * row_stride + word).read().cast_signed());
                    for (sum, &b) in sums.iter_mut().zip(&columns) {
                        *sum = add_product::<BF16>(*sum, a, b);
                    }
                }
            }
            a = a.add(block_stride);
            b = b.add(BLOCK_WORDS);
        }
        for (row, sums) in sums.iter().enumerate() {
            for (p, &sum) in sums.iter().enumerate() {
                let c = c.add(row * product.c_stride + p * LANES);
                if p + 1 < PANELS || last == LANES {
                    _mm512_storeu_ps(c, sum);
                } else {
                    _mm512_mask_storeu_ps(c, mask, sum);
                }
            }
        }
    }
}

/// `sum + a b` for words: an f32 each, or a pair of bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_product<const BF16: bool>(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    if BF16 {
        // SAFETY: two types for the same 512 bits.
        let (a, b) =
            unsafe { (std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b)) };
        _mm512_dpbf16_ps(sum, a, b)
    } else {
        _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
    }
}
