//! Sixteen f32 lanes on every processor: one body of code, compiled for each instruction set.
//!
//! A loop is written once over [`Simd`], packed in a [`Kernel`], and run by [`dispatch`], which compiles it for AVX-512
//! (one register of 16), AVX2 (two of 8) and plain Rust (an array). Every operation rounds alike everywhere
//! (multiply-adds are always fused, sums over lanes go down one tree), so **a kernel gives the same bits on every
//! instruction set**; the tests rely on it.
//!
//! Holding a value of [`x86::Avx512`] or [`x86::Avx2`] proves that the processor has it: only [`dispatch`] makes them.

pub(crate) mod math;
mod portable;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

use crate::gemm::bf16_of;
use crate::isa::Isa;
use std::ops::{Add, Div, Mul, Sub};

/// Lanes of a vector, on every instruction set.
pub(crate) const LANES: usize = 16;

/// An instruction set's vectors of 16 f32.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen lanes.
    type Vector: Copy;

    /// Whether the registers hold 16 accumulating vectors (or only four).
    const WIDE_TILE: bool;

    /// Runs a kernel as a function of its own (unless the compiler thinks better): what is called from many places.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, value: f32) -> Self::Vector;
    fn load(self, from: &[f32; LANES]) -> Self::Vector;
    fn store(self, value: Self::Vector, to: &mut [f32; LANES]);
    /// Sixteen bf16, widened.
    fn load_bf16(self, from: &[u16; LANES]) -> Self::Vector;
    /// Rounded to the nearest bf16, ties to even; a NaN stays one. AVX-512 takes denormals for zero.
    #[inline(always)]
    fn store_bf16(self, value: Self::Vector, to: &mut [u16; LANES]) {
        let mut lanes = [0.0; LANES];
        self.store(value, &mut lanes);
        *to = lanes.map(bf16_of);
    }
    /// Thirty-two numbers rounded to bf16, two to a lane, in their order: the first in the low half.
    #[inline(always)]
    fn narrow_two(self, first: Self::Vector, second: Self::Vector) -> Self::Vector {
        let mut halves = [[0; LANES]; 2];
        self.store_bf16(first, &mut halves[0]);
        self.store_bf16(second, &mut halves[1]);
        let halves = halves.as_flattened();
        self.load(&std::array::from_fn(|i| pair(halves[2 * i], halves[2 * i + 1])))
    }
    /// Pairs of numbers rounded to bf16, one pair to a lane: `low` in the low half.
    #[inline(always)]
    fn narrow_pairs(self, low: Self::Vector, high: Self::Vector) -> Self::Vector {
        let mut halves = [[0; LANES]; 2];
        self.store_bf16(low, &mut halves[0]);
        self.store_bf16(high, &mut halves[1]);
        self.load(&std::array::from_fn(|i| pair(halves[0][i], halves[1][i])))
    }
    /// `c` plus the products of both halves of `a` and `b`, which hold pairs of bf16. How that rounds is the
    /// instruction set's own.
    #[inline(always)]
    fn fma_pairs(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        let [mut x, mut y] = [[0.0; LANES]; 2];
        self.store(a, &mut x);
        self.store(b, &mut y);
        let part = |x: [f32; LANES], part: fn(u32) -> u32| self.load(&x.map(|x| f32::from_bits(part(x.to_bits()))));
        let [low, high]: [fn(u32) -> u32; 2] = [|word| word << 16, |word| word & 0xffff_0000];
        self.fma(part(x, high), part(y, high), self.fma(part(x, low), part(y, low), c))
    }
    /// Sixteen signed bytes, as whole numbers.
    fn load_i8(self, from: &[i8; LANES]) -> Self::Vector;
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn sqrt(self, a: Self::Vector) -> Self::Vector;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// `a > b ? a : b`: the second when either is NaN.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a < b ? a : b`: the second when either is NaN.
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a < b ? x : y` lane by lane; `y` where unordered.
    fn select_less(self, a: Self::Vector, b: Self::Vector, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    /// The sign bit cleared.
    fn abs(self, a: Self::Vector) -> Self::Vector;
    /// `2^n` for whole `n` in -127..=128 given as `n + 1.5 * 2^23` (-127 gives zero, 128 infinity).
    fn power_of_two(self, shifted: Self::Vector) -> Self::Vector;
    /// The sum over lanes: halves added to halves, 16 to 8 to 4 to 2 to 1.
    fn sum(self, a: Self::Vector) -> f32;
    /// The largest lane (any answer when a lane is NaN).
    fn largest(self, a: Self::Vector) -> f32;

    /// Loads up to 16 numbers; the lanes beyond hold `fill`.
    #[inline(always)]
    fn load_part(self, from: &[f32], fill: f32) -> Self::Vector {
        let mut lanes = [fill; LANES];
        lanes[..from.len()].copy_from_slice(from);
        self.load(&lanes)
    }

    /// Stores the first `to.len()` (up to 16) lanes.
    #[inline(always)]
    fn store_part(self, value: Self::Vector, to: &mut [f32]) {
        let mut lanes = [0.0; LANES];
        self.store(value, &mut lanes);
        to.copy_from_slice(&lanes[..to.len()]);
    }
}

/// What numbers are kept in.
pub(crate) trait Number: bytemuck::Pod {
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> Lanes<S>;
    fn store<S: Simd>(value: Lanes<S>, to: &mut [Self; LANES]);

    /// Up to 16 numbers, whole vectors the short way; zeros beyond.
    #[inline(always)]
    fn load_any<S: Simd>(simd: S, from: &[Self]) -> Lanes<S> {
        match from.try_into() {
            Ok(whole) => Self::load(simd, whole),
            Err(_) => {
                let mut whole = [Self::zeroed(); LANES];
                whole[..from.len()].copy_from_slice(from);
                Self::load(simd, &whole)
            }
        }
    }

    /// As many lanes as `to` holds.
    #[inline(always)]
    fn store_any<S: Simd>(value: Lanes<S>, to: &mut [Self]) {
        match to.try_into() {
            Ok(whole) => Self::store(value, whole),
            Err(_) => {
                let mut whole = [Self::zeroed(); LANES];
                Self::store(value, &mut whole);
                to.copy_from_slice(&whole[..to.len()]);
            }
        }
    }
}

impl Number for f32 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> Lanes<S> {
        Lanes::load(simd, from)
    }
    #[inline(always)]
    fn store<S: Simd>(value: Lanes<S>, to: &mut [Self; LANES]) {
        value.store(to);
    }
}

/// The bits of a bf16.
impl Number for u16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self; LANES]) -> Lanes<S> {
        Lanes { simd, value: simd.load_bf16(from) }
    }
    #[inline(always)]
    fn store<S: Simd>(value: Lanes<S>, to: &mut [Self; LANES]) {
        value.simd.store_bf16(value.value, to);
    }
}

/// Calls the lines of some values into the cache, to be read or written.
#[inline(always)]
pub(crate) fn prefetch<const WRITE: bool, T>(start: *const T, count: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..count * size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
        let start = start.wrapping_byte_add(line).cast();
        // SAFETY: every processor that this is compiled for takes these as hints: the address is not touched.
        unsafe { if WRITE { _mm_prefetch::<_MM_HINT_ET0>(start) } else { _mm_prefetch::<_MM_HINT_T0>(start) } };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, count);
}

/// Two bf16 in the bits of an f32.
#[inline(always)]
fn pair(low: u16, high: u16) -> f32 {
    f32::from_bits(u32::from(low) | u32::from(high) << 16)
}

/// Code written once over [`Simd`]. `run` must be `#[inline(always)]`, and so must what it calls, or the calls are
/// compiled without the instruction set.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs a kernel compiled for `isa`.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => x86::run_avx512(kernel),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => x86::run_avx2(kernel),
        _ => kernel.run(portable::Portable),
    }
}

/// Lanes with operators, for formulas that should read as formulas.
#[derive(Clone, Copy)]
pub(crate) struct Lanes<S: Simd> {
    pub(crate) simd: S,
    pub(crate) value: S::Vector,
}

macro_rules! operator {
    ($trait:ident, $method:ident) => {
        impl<S: Simd> $trait for Lanes<S> {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Self { simd: self.simd, value: self.simd.$method(self.value, other.value) }
            }
        }
    };
}
operator!(Add, add);
operator!(Sub, sub);
operator!(Mul, mul);
operator!(Div, div);

impl<S: Simd> Lanes<S> {
    #[inline(always)]
    pub(crate) fn splat(simd: S, value: f32) -> Self {
        Self { simd, value: simd.splat(value) }
    }

    #[inline(always)]
    pub(crate) fn load(simd: S, from: &[f32; LANES]) -> Self {
        Self { simd, value: simd.load(from) }
    }

    #[inline(always)]
    fn load_part(simd: S, from: &[f32], fill: f32) -> Self {
        Self { simd, value: simd.load_part(from, fill) }
    }

    /// Loads up to 16 numbers, whole vectors the short way; the lanes beyond hold `fill`.
    #[inline(always)]
    pub(crate) fn load_any(simd: S, from: &[f32], fill: f32) -> Self {
        match from.try_into() {
            Ok(whole) => Self::load(simd, whole),
            Err(_) => Self::load_part(simd, from, fill),
        }
    }

    /// Stores as many lanes as `to` holds.
    #[inline(always)]
    pub(crate) fn store_any(self, to: &mut [f32]) {
        match to.try_into() {
            Ok(whole) => self.store(whole),
            Err(_) => self.store_part(to),
        }
    }

    #[inline(always)]
    pub(crate) fn store(self, to: &mut [f32; LANES]) {
        self.simd.store(self.value, to);
    }

    #[inline(always)]
    fn store_part(self, to: &mut [f32]) {
        self.simd.store_part(self.value, to);
    }

    /// `self * factor + addend`, rounded once.
    #[inline(always)]
    pub(crate) fn fma(self, factor: Self, addend: Self) -> Self {
        Self { simd: self.simd, value: self.simd.fma(self.value, factor.value, addend.value) }
    }

    #[inline(always)]
    pub(crate) fn max(self, other: Self) -> Self {
        Self { simd: self.simd, value: self.simd.max(self.value, other.value) }
    }

    #[inline(always)]
    pub(crate) fn min(self, other: Self) -> Self {
        Self { simd: self.simd, value: self.simd.min(self.value, other.value) }
    }

    #[inline(always)]
    pub(crate) fn abs(self) -> Self {
        Self { simd: self.simd, value: self.simd.abs(self.value) }
    }

    #[inline(always)]
    pub(crate) fn sqrt(self) -> Self {
        Self { simd: self.simd, value: self.simd.sqrt(self.value) }
    }

    /// `self < bound ? x : y`.
    #[inline(always)]
    pub(crate) fn select_less(self, bound: Self, x: Self, y: Self) -> Self {
        Self { simd: self.simd, value: self.simd.select_less(self.value, bound.value, x.value, y.value) }
    }

    #[inline(always)]
    pub(crate) fn sum(self) -> f32 {
        self.simd.sum(self.value)
    }

    #[inline(always)]
    pub(crate) fn largest(self) -> f32 {
        self.simd.largest(self.value)
    }
}
