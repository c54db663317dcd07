//! Numbers kept as bf16, for what is read again much later: half the memory and half the traffic.

use std::ops::Range;

use crate::gemm::bf16_of;
use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::{Kernel, LANES, Lanes, Number, Simd, dispatch, prefetch};
use crate::tasks::for_each_block_of;

/// Numbers kept in f32, or as the bits of bf16.
#[derive(Clone, Copy, Debug)]
pub enum Numbers<'a> {
    /// As they are.
    F32(&'a [f32]),
    /// The bits of bf16.
    Bf16(&'a [u16]),
}

impl Numbers<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::Bf16(data) => data.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Some of them.
    ///
    /// # Panics
    /// If the range leaves them.
    #[must_use]
    pub fn part(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(data) => Self::F32(&data[range]),
            Self::Bf16(data) => Self::Bf16(&data[range]),
        }
    }
}

impl Numbers<'_> {
    /// Calls some of them into the cache, or what stands behind the last.
    #[inline(always)]
    pub(crate) fn prefetch(self, start: usize, count: usize) {
        match self {
            Self::F32(data) => prefetch::<false, _>(data.as_ptr().wrapping_add(start), count),
            Self::Bf16(data) => prefetch::<false, _>(data.as_ptr().wrapping_add(start), count),
        }
    }

    /// Up to 16 of them; the lanes beyond are zero.
    #[inline(always)]
    pub(crate) fn lanes<S: Simd>(self, simd: S, range: Range<usize>) -> Lanes<S> {
        match self {
            Self::F32(data) => f32::load_any(simd, &data[range]),
            Self::Bf16(data) => u16::load_any(simd, &data[range]),
        }
    }
}

/// Room for numbers in f32, or for the bits of bf16.
#[derive(Debug)]
pub enum NumbersMut<'a> {
    /// As they are.
    F32(&'a mut [f32]),
    /// The bits of bf16.
    Bf16(&'a mut [u16]),
}

impl NumbersMut<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.as_ref().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers, to be read.
    pub fn as_ref(&self) -> Numbers<'_> {
        match self {
            Self::F32(data) => Numbers::F32(data),
            Self::Bf16(data) => Numbers::Bf16(data),
        }
    }

    /// The same room, lent for a while.
    pub fn as_mut(&mut self) -> NumbersMut<'_> {
        match self {
            Self::F32(data) => NumbersMut::F32(data),
            Self::Bf16(data) => NumbersMut::Bf16(data),
        }
    }
}

/// Numbers of a task.
const BLOCK: usize = 1 << 14;

impl NumbersMut<'_> {
    /// Writes as many lanes as the range holds.
    #[inline(always)]
    pub(crate) fn set_lanes<S: Simd>(&mut self, range: Range<usize>, lanes: Lanes<S>) {
        match self {
            Self::F32(data) => f32::store_any(lanes, &mut data[range]),
            Self::Bf16(data) => u16::store_any(lanes, &mut data[range]),
        }
    }
}

/// [`NumbersMut`] that several threads write in parts which do not overlap.
pub(crate) enum DisjointNumbers<'a> {
    F32(DisjointMut<'a, f32>),
    Bf16(DisjointMut<'a, u16>),
}

impl<'a> DisjointNumbers<'a> {
    pub(crate) fn new(numbers: NumbersMut<'a>) -> Self {
        match numbers {
            NumbersMut::F32(data) => Self::F32(DisjointMut::new(data)),
            NumbersMut::Bf16(data) => Self::Bf16(DisjointMut::new(data)),
        }
    }

    /// # Safety
    /// As [`DisjointMut::range`].
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> NumbersMut<'_> {
        // SAFETY: handed on.
        unsafe {
            match self {
                Self::F32(data) => NumbersMut::F32(data.range(range)),
                Self::Bf16(data) => NumbersMut::Bf16(data.range(range)),
            }
        }
    }
}

/// `out = x`, rounded to the nearest bf16, ties to even; a NaN stays one. AVX-512 takes denormals for zero.
pub fn narrow(x: &[f32], out: &mut [u16]) {
    narrow_on(Isa::current(), x, out);
}

/// `out = x`, exactly.
pub fn widen(x: &[u16], out: &mut [f32]) {
    widen_on(Isa::current(), x, out);
}

fn narrow_on(isa: Isa, x: &[f32], out: &mut [u16]) {
    assert_eq!(x.len(), out.len());
    let out = DisjointMut::new(out);
    for_each_block_of(BLOCK, x.len(), 1, |block| {
        // SAFETY: blocks are disjoint.
        dispatch(isa, Narrow { x: &x[block.clone()], out: unsafe { out.range(block) } });
    });
}

fn widen_on(isa: Isa, x: &[u16], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    let out = DisjointMut::new(out);
    for_each_block_of(BLOCK, x.len(), 1, |block| {
        // SAFETY: blocks are disjoint.
        dispatch(isa, Widen { x: &x[block.clone()], out: unsafe { out.range(block) } });
    });
}

struct Narrow<'a> {
    x: &'a [f32],
    out: &'a mut [u16],
}

impl Kernel for Narrow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ((x, x_rest), (out, out_rest)) = (self.x.as_chunks::<LANES>(), self.out.as_chunks_mut::<LANES>());
        x.iter().zip(out).for_each(|(x, out)| simd.store_bf16(simd.load(x), out));
        x_rest.iter().zip(out_rest).for_each(|(&x, out)| *out = bf16_of(x));
    }
}

struct Widen<'a> {
    x: &'a [u16],
    out: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ((x, x_rest), (out, out_rest)) = (self.x.as_chunks::<LANES>(), self.out.as_chunks_mut::<LANES>());
        x.iter().zip(out).for_each(|(x, out)| simd.store(simd.load_bf16(x), out));
        x_rest.iter().zip(out_rest).for_each(|(&x, out)| *out = f32::from_bits(u32::from(x) << 16));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::numbers;
    use half::bf16;

    #[test]
    fn rounds_as_half_does_and_comes_back() {
        let mut x = numbers(3, 1000 + 7);
        x[..6].copy_from_slice(&[f32::NAN, f32::INFINITY, -0.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::MAX]);
        for isa in Isa::available() {
            let (mut narrowed, mut back) = (vec![0; x.len()], vec![0.0; x.len()]);
            narrow_on(isa, &x, &mut narrowed);
            widen_on(isa, &narrowed, &mut back);
            assert!(back[0].is_nan());
            for (i, &x) in x.iter().enumerate().skip(1) {
                assert_eq!((narrowed[i], back[i]), (bf16::from_f32(x).to_bits(), bf16::from_f32(x).to_f32()), "{x}");
            }
        }
    }
}
