//! Matrix products: f32 in and out, with operands in f32 or rounded to bf16, always summed in f32.
//!
//! Legend: `m` rows, `n` columns, `k` the length of the sums; `groups` experts, whose rows follow each other.
//!
//! The right operand is packed into panels ([`Packed`]) and the left one into blocks of rows as it is used; a kernel
//! of the instruction set multiplies a block of rows with some panels (`kernels`); `driver` cuts the whole for
//! threads and caches. An element of the result is one sum along K in an order that depends on K, the precision and
//! the instruction set alone: never on the other rows, the groups, or the threads.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_pack;
mod driver;
mod grouped;
mod kernels;
mod mat;
mod packed;
mod portable;
#[cfg(test)]
mod tests;

pub use grouped::{grouped_matmul, grouped_matmul_weight_gradient};
pub use mat::Mat;
pub use packed::Packed;

/// How the operands of a product are held. Sums are f32 in both.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Precision {
    /// As they are.
    F32,
    /// Rounded to the nearest bf16, ties to even. The vector instructions take denormals for zero.
    Bf16,
}

impl Precision {
    /// Elements along K of a k block.
    fn block_k(self) -> usize {
        match self {
            Self::F32 => packed::LANES,
            Self::Bf16 => 2 * packed::LANES,
        }
    }

    /// Rounds numbers as a product of this precision rounds its operands; denormals stay.
    pub fn round(self, values: &mut [f32]) {
        if self == Self::Bf16 {
            values.iter_mut().for_each(|value| *value = f32::from_bits(portable::round(*value) & 0xffff_0000));
        }
    }

    fn k_blocks(self, k: usize) -> usize {
        k.div_ceil(self.block_k())
    }
}

/// The bits of the nearest bf16, ties to even.
#[inline(always)]
pub(crate) fn bf16_of(value: f32) -> u16 {
    (portable::round(value) >> 16) as u16
}

/// What becomes of the result's old content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Beta {
    /// It is replaced.
    Overwrite,
    /// It is added to.
    Accumulate,
}

/// `c = [c +] a b`. Packs `b` for this one call: keep a [`Packed`] for what is used more than once.
///
/// # Shapes
/// `a` `[m, k]`, `b` `[k, n]`, `c` `[m, n]`.
pub fn matmul(precision: Precision, a: Mat, b: Mat, c: &mut [f32], beta: Beta) {
    matmul_packed(a, &Packed::pack(precision, b), c, beta);
}

/// `c = [c +] a b`.
///
/// # Shapes
/// `a` `[m, k]`, `b` `[k, n]`, `c` `[m, n]`.
pub fn matmul_packed(a: Mat, b: &Packed, c: &mut [f32], beta: Beta) {
    assert_eq!(c.len(), a.rows * b.n(), "the result of {} rows and {} columns", a.rows, b.n());
    driver::run(&[driver::Job { a, b, first: 0 }], c, beta);
}
