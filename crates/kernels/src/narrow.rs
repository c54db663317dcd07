//! Numbers kept as bf16, for what is read again much later: half the memory and half the traffic.

use crate::gemm::bf16_of;
use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::{Kernel, LANES, Simd, dispatch};
use crate::tasks::for_each_block_of;

/// Numbers of a task.
const BLOCK: usize = 1 << 14;

/// `out = x`, rounded to the nearest bf16, ties to even; a NaN stays one.
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

    /// The compiler makes vectors of this loop on each instruction set.
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        self.out.iter_mut().zip(self.x).for_each(|(out, &x)| *out = bf16_of(x));
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
