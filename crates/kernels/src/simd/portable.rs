//! Sixteen lanes as an array: every processor, and the meaning of every operation.

use super::{Kernel, LANES, Simd};

/// Plain Rust. `mul_add` is one instruction on most processors and a library call on x86-64 without FMA.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type Array = [f32; LANES];

#[inline(always)]
fn zip(a: Array, b: Array, f: impl Fn(f32, f32) -> f32) -> Array {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn fold(mut a: Array, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            a[i] = f(a[i], a[i + half]);
        }
        half /= 2;
    }
    a[0]
}

impl Simd for Portable {
    type Vector = Array;
    const WIDE_TILE: bool = false;

    #[inline]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
    #[inline(always)]
    fn splat(self, value: f32) -> Array {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, from: &Array) -> Array {
        *from
    }
    #[inline(always)]
    fn store(self, value: Array, to: &mut Array) {
        *to = value;
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Array {
        from.map(|half| f32::from_bits(u32::from(half) << 16))
    }
    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Array {
        from.map(f32::from)
    }
    #[inline(always)]
    fn add(self, a: Array, b: Array) -> Array {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Array, b: Array) -> Array {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Array, b: Array) -> Array {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Array, b: Array) -> Array {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn sqrt(self, a: Array) -> Array {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn fma(self, a: Array, b: Array, c: Array) -> Array {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Array, b: Array) -> Array {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Array, b: Array) -> Array {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn select_less(self, a: Array, b: Array, x: Array, y: Array) -> Array {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn abs(self, a: Array) -> Array {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn power_of_two(self, shifted: Array) -> Array {
        shifted.map(|s| f32::from_bits((s.to_bits() << 23).wrapping_add(0x3f80_0000)))
    }
    #[inline(always)]
    fn sum(self, a: Array) -> f32 {
        fold(a, |a, b| a + b)
    }
    #[inline(always)]
    fn largest(self, a: Array) -> f32 {
        fold(a, |a, b| if a > b { a } else { b })
    }
}
