//! Sixteen lanes as one AVX-512 register or two AVX2 registers.
//!
//! The methods are `#[inline(always)]` wrappers of single instructions. They end up inside the
//! functions of [`Simd::call`], the only ones that are compiled with the instruction set.

use super::{Kernel, LANES, Simd};
use std::arch::x86_64::*;

/// Proof that the processor has AVX-512 F, BW, DQ, VL, BF16.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Proof that the processor has AVX2 and FMA.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// Runs a kernel compiled for AVX-512.
#[inline]
pub(super) fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // `Isa::Avx512` is only ever handed out when the processor has these features.
    debug_assert!(is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16"));
    Avx512(()).call(kernel)
}

/// Runs a kernel compiled for AVX2 and FMA.
#[inline]
pub(super) fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // `Isa::Avx2` is only ever handed out when the processor has these features.
    debug_assert!(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"));
    Avx2(()).call(kernel)
}

/// From sixteen low halves and sixteen high halves to sixteen pairs.
pub(crate) const PAIRS: [u16; 2 * LANES] = {
    let mut order = [0; 2 * LANES];
    let mut i = 0;
    while i < 2 * LANES {
        order[i] = (i / 2 + i % 2 * LANES) as u16;
        i += 1;
    }
    order
};

/// One method of one AVX-512 instruction (or of a few).
macro_rules! avx512 {
    ($name:ident($($arg:ident: $ty:ty),*) -> $out:ty, $body:expr) => {
        #[inline(always)]
        fn $name(self, $($arg: $ty),*) -> $out {
            // SAFETY: `self` proves that the processor has AVX-512; references cover 16 lanes.
            unsafe { $body }
        }
    };
}

impl Simd for Avx512 {
    type Vector = __m512;
    const WIDE_TILE: bool = true;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
        fn compiled<K: Kernel>(kernel: K) -> K::Output {
            kernel.run(Avx512(()))
        }
        // SAFETY: `self` proves that the processor has these features.
        unsafe { compiled(kernel) }
    }

    avx512!(splat(value: f32) -> __m512, _mm512_set1_ps(value));
    avx512!(load(from: &[f32; LANES]) -> __m512, _mm512_loadu_ps(from.as_ptr()));
    avx512!(load_bf16(from: &[u16; LANES]) -> __m512, {
        let halves = _mm256_loadu_si256(from.as_ptr().cast());
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
    });
    avx512!(load_i8(from: &[i8; LANES]) -> __m512, {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast())))
    });
    avx512!(narrow_two(first: __m512, second: __m512) -> __m512,
        std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(second, first)));
    avx512!(narrow_pairs(low: __m512, high: __m512) -> __m512, {
        let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
        let order = _mm512_loadu_si512(PAIRS.as_ptr().cast());
        _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves))
    });
    avx512!(fma_pairs(a: __m512, b: __m512, c: __m512) -> __m512,
        _mm512_dpbf16_ps(c, std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b)));
    avx512!(add(a: __m512, b: __m512) -> __m512, _mm512_add_ps(a, b));
    avx512!(sub(a: __m512, b: __m512) -> __m512, _mm512_sub_ps(a, b));
    avx512!(mul(a: __m512, b: __m512) -> __m512, _mm512_mul_ps(a, b));
    avx512!(div(a: __m512, b: __m512) -> __m512, _mm512_div_ps(a, b));
    avx512!(sqrt(a: __m512) -> __m512, _mm512_sqrt_ps(a));
    avx512!(fma(a: __m512, b: __m512, c: __m512) -> __m512, _mm512_fmadd_ps(a, b, c));
    avx512!(max(a: __m512, b: __m512) -> __m512, _mm512_max_ps(a, b));
    avx512!(min(a: __m512, b: __m512) -> __m512, _mm512_min_ps(a, b));
    avx512!(abs(a: __m512) -> __m512, _mm512_abs_ps(a));
    avx512!(select_less(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512,
        _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x));
    avx512!(power_of_two(shifted: __m512) -> __m512, {
        let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
        _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f80_0000)))
    });
    avx512!(sum(a: __m512) -> f32,
        sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))));
    avx512!(largest(a: __m512) -> f32,
        largest_of_eight(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))));

    #[inline(always)]
    fn store(self, value: __m512, to: &mut [f32; LANES]) {
        // SAFETY: `self` proves AVX-512; the array holds 16 lanes.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
    }
    #[inline(always)]
    fn store_bf16(self, value: __m512, to: &mut [u16; LANES]) {
        // SAFETY: `self` proves AVX-512; the array holds 16 halves.
        unsafe {
            let halves = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(value));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), halves);
        }
    }
    #[inline(always)]
    fn load_part(self, from: &[f32], fill: f32) -> __m512 {
        let mask = lane_mask(from.len());
        // SAFETY: `self` proves AVX-512; lanes outside the mask are not read.
        unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, from.as_ptr()) }
    }
    #[inline(always)]
    fn store_part(self, value: __m512, to: &mut [f32]) {
        let mask = lane_mask(to.len());
        // SAFETY: `self` proves AVX-512; lanes outside the mask are not written.
        unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), mask, value) }
    }
}

/// The first `count` (up to 16) lanes.
#[inline(always)]
fn lane_mask(count: usize) -> __mmask16 {
    assert!(count <= LANES);
    ((1u32 << count) - 1) as __mmask16
}

/// Two registers of eight lanes.
#[derive(Clone, Copy)]
pub(crate) struct Pair(__m256, __m256);

/// A method that does the same to both halves.
macro_rules! avx2 {
    ($name:ident($($arg:ident),*), $instruction:expr) => {
        #[inline(always)]
        fn $name(self, $($arg: Pair),*) -> Pair {
            // SAFETY: `self` proves that the processor has AVX2 and FMA.
            unsafe { Pair($instruction($($arg.0),*), $instruction($($arg.1),*)) }
        }
    };
}

impl Simd for Avx2 {
    type Vector = Pair;
    const WIDE_TILE: bool = false;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma")]
        fn compiled<K: Kernel>(kernel: K) -> K::Output {
            kernel.run(Avx2(()))
        }
        // SAFETY: `self` proves that the processor has these features.
        unsafe { compiled(kernel) }
    }

    avx2!(add(a, b), _mm256_add_ps);
    avx2!(sub(a, b), _mm256_sub_ps);
    avx2!(mul(a, b), _mm256_mul_ps);
    avx2!(div(a, b), _mm256_div_ps);
    avx2!(sqrt(a), _mm256_sqrt_ps);
    avx2!(fma(a, b, c), _mm256_fmadd_ps);
    avx2!(max(a, b), _mm256_max_ps);
    avx2!(min(a, b), _mm256_min_ps);
    avx2!(abs(a), absolute_of_eight);
    avx2!(select_less(a, b, x, y), select_less_of_eight);
    avx2!(power_of_two(shifted), power_of_two_of_eight);

    #[inline(always)]
    fn splat(self, value: f32) -> Pair {
        // SAFETY: `self` proves AVX2.
        unsafe { Pair(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Pair {
        // SAFETY: `self` proves AVX2; the array holds 16 lanes.
        unsafe { Pair(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))) }
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Pair {
        // SAFETY: `self` proves AVX2; the array holds two halves of eight.
        unsafe {
            let widen = |half: *const u16| {
                let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(half.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
            };
            Pair(widen(from.as_ptr()), widen(from.as_ptr().add(LANES / 2)))
        }
    }
    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Pair {
        // SAFETY: `self` proves AVX2; the array holds two halves of eight.
        unsafe {
            let widen = |half: *const i8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(half.cast())));
            Pair(widen(from.as_ptr()), widen(from.as_ptr().add(LANES / 2)))
        }
    }
    #[inline(always)]
    fn store(self, value: Pair, to: &mut [f32; LANES]) {
        // SAFETY: `self` proves AVX2; the array holds 16 lanes.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), value.0);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), value.1);
        }
    }
    #[inline(always)]
    fn sum(self, a: Pair) -> f32 {
        // SAFETY: `self` proves AVX2.
        unsafe { sum_of_eight(_mm256_add_ps(a.0, a.1)) }
    }
    #[inline(always)]
    fn largest(self, a: Pair) -> f32 {
        // SAFETY: `self` proves AVX2.
        unsafe { largest_of_eight(_mm256_max_ps(a.0, a.1)) }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn absolute_of_eight(a: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_set1_ps(-0.0), a)
}

#[inline]
#[target_feature(enable = "avx2")]
fn select_less_of_eight(a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
    _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b))
}

#[inline]
#[target_feature(enable = "avx2")]
fn power_of_two_of_eight(shifted: __m256) -> __m256 {
    let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
    _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f80_0000)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn sum_of_eight(a: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn largest_of_eight(a: __m256) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}
