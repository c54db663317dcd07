//! Vector arithmetic that the tape needs between the real operations.

use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::{for_each_block_of, for_each_task};

/// Numbers of a task.
const BLOCK: usize = 1 << 14;

/// `a += b`.
pub fn add_assign(a: &mut [f32], b: &[f32]) {
    scaled_add(a, 1.0, b);
}

/// `a += factor * b`, rounded once.
pub fn scaled_add(a: &mut [f32], factor: f32, b: &[f32]) {
    scaled_add_on(Isa::current(), a, factor, b);
}

fn scaled_add_on(isa: Isa, a: &mut [f32], factor: f32, b: &[f32]) {
    assert_eq!(a.len(), b.len());
    let len = a.len();
    let a = DisjointMut::new(a);
    for_each_block_of(BLOCK, len, 1, |block| {
        // SAFETY: blocks are disjoint.
        dispatch(isa, ScaledAdd { a: unsafe { a.range(block.clone()) }, factor, b: &b[block] });
    });
}

/// `a += factor * b` on one thread.
pub(super) struct ScaledAdd<'a> {
    pub(super) a: &'a mut [f32],
    pub(super) factor: f32,
    pub(super) b: &'a [f32],
}

impl Kernel for ScaledAdd<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let factor = Lanes::splat(simd, self.factor);
        for (a, b) in self.a.chunks_mut(LANES).zip(self.b.chunks(LANES)) {
            Lanes::load_any(simd, b, 0.0).fma(factor, Lanes::load_any(simd, a, 0.0)).store_any(a);
        }
    }
}

/// `x *= factor`.
pub fn scale(x: &mut [f32], factor: f32) {
    let len = x.len();
    let x = DisjointMut::new(x);
    for_each_block_of(BLOCK, len, 1, |block| {
        // SAFETY: blocks are disjoint.
        unsafe { x.range(block) }.iter_mut().for_each(|x| *x *= factor);
    });
}

/// `Σ x²` in f64: sums of fixed blocks, added in order, so that neither threads nor the instruction set matter.
pub fn sum_squares(x: &[f32]) -> f64 {
    sum_squares_on(Isa::current(), x)
}

fn sum_squares_on(isa: Isa, x: &[f32]) -> f64 {
    let mut sums = vec![0.0; x.len().div_ceil(BLOCK)];
    {
        let sums = DisjointMut::new(&mut sums);
        for_each_task(x.len().div_ceil(BLOCK), x.len(), |block| {
            let x = &x[block * BLOCK..x.len().min((block + 1) * BLOCK)];
            // SAFETY: each block has its own sum.
            let sum = unsafe { sums.range(block..block + 1) };
            sum[0] = dispatch(isa, SumSquares(x));
        });
    }
    sums.iter().sum()
}

struct SumSquares<'a>(&'a [f32]);

impl Kernel for SumSquares<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) -> f64 {
        // Products of two f32 are exact in f64. The compiler makes vectors of this loop on each instruction set.
        let mut sums = [0.0f64; 2 * LANES];
        let (whole, rest) = self.0.as_chunks::<{ 2 * LANES }>();
        for chunk in whole {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        for (sum, &x) in sums.iter_mut().zip(rest) {
            *sum += f64::from(x) * f64::from(x);
        }
        sums.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, numbers};

    #[test]
    fn sums_and_multiples() {
        for len in [0, 1, 15, 31, 33, 1000, 3 * BLOCK + 7] {
            let (a, b) = (&numbers(1, len + 1)[1..], &numbers(2, len + 1)[1..]);
            let wanted = |f: fn(f32, f32) -> f32| a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect::<Vec<f32>>();
            let squares: f64 = a.iter().map(|&a| f64::from(a) * f64::from(a)).sum();
            let reference =
                [wanted(|a, b| a + 0.3 * b), wanted(|a, b| a + b), wanted(|a, _| 0.3 * a), vec![squares as f32]];
            check(&reference, 3e-7, |isa| {
                let (mut scaled_sum, mut sum, mut multiple) = (a.to_vec(), a.to_vec(), a.to_vec());
                scaled_add_on(isa, &mut scaled_sum, 0.3, b);
                add_assign(&mut sum, b);
                scale(&mut multiple, 0.3);
                vec![scaled_sum, sum, multiple, vec![sum_squares_on(isa, a) as f32]]
            });
            let bits: Vec<u64> = Isa::available().iter().map(|&isa| sum_squares_on(isa, a).to_bits()).collect();
            assert!(bits.iter().all(|&b| b == bits[0]));
        }
    }
}
