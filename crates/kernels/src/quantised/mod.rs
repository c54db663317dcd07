//! Products with weights in block formats: 2 to 8 bits a weight, a scale for each 16 or 32.
//!
//! `y = x Wᵀ` takes each row of x in blocks of 32 along K, quantised to signed bytes with one f32 scale a block. The
//! products of a block's codes are added as integers, which is exact; then, block after block in the order of K,
//! `y = fma(integer sum, weight's scale * activation's scale, y)`. No number of rows, cut into tasks or instruction set
//! changes a bit of this: the results are the same on all of them.
//!
//! # Letters
//! m rows, n outputs, k length of the sums.

mod activations;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod codes;
mod driver;
mod layout;
mod matrix;
mod portable;
mod published;
mod scales;
#[cfg(test)]
mod tests;

pub use matrix::{PACKED_FORMATS, QuantisedMatrix, packed_bytes};

use crate::isa::Isa;
use activations::Activations;
use driver::Job;

/// `y = x Wᵀ`.
///
/// # Shapes
/// x `[m, k]`, W `[n, k]`, y `[m, n]`.
pub fn quantised_matmul(x: &[f32], weight: &QuantisedMatrix, y: &mut [f32]) {
    let rows = x.len().checked_div(weight.k()).unwrap_or(0);
    grouped_quantised_matmul(x, None, &[0, rows], std::slice::from_ref(weight), y);
}

/// `y[i] = W[g] x[i]` for the rows `i` of each group `g`; with `source`, `y[i] = W[g] x[source[i]]`. Rows outside all
/// groups are left alone.
///
/// # Shapes
/// x `[tokens, k]`, source `[rows]` below `tokens`, offsets `[groups + 1]`, weights `[groups]` of `[n, k]` in one
/// format, y `[rows, n]`.
///
/// # Panics
/// If the shapes contradict each other.
pub fn grouped_quantised_matmul(
    x: &[f32],
    source: Option<&[u32]>,
    offsets: &[usize],
    weights: &[QuantisedMatrix],
    y: &mut [f32],
) {
    assert_eq!(offsets.len(), weights.len() + 1, "one more offset than groups");
    let Some(first) = weights.first() else { return };
    let (format, n, k) = (first.format(), first.n(), first.k());
    let shape = |weight: &QuantisedMatrix| (weight.format(), weight.n(), weight.k());
    assert!(weights.iter().all(|weight| shape(weight) == (format, n, k)), "groups have one format and shape");
    assert!(offsets.is_sorted() && offsets[weights.len()] * n <= y.len(), "groups lie inside the result");
    if k == 0 {
        y[offsets[0] * n..offsets[weights.len()] * n].fill(0.0);
        return;
    }
    assert!(x.len().is_multiple_of(k), "rows of {k} numbers");
    let (bias, halves) = first.bias();
    let activations = Activations::quantise(x, k, first.blocks(), bias, halves);
    let rows = offsets[0]..offsets[weights.len()];
    match source {
        Some(source) => assert!(source[rows].iter().all(|&row| (row as usize) < activations.rows())),
        None => assert!(rows.end <= activations.rows()),
    }
    let jobs: Vec<Job> = (weights.iter().zip(offsets.windows(2)))
        .filter(|(_, rows)| rows[1] > rows[0])
        .map(|(matrix, rows)| Job { matrix, rows: rows[0]..rows[1] })
        .collect();
    let kernel = first.kernel(Isa::current());
    run(kernel, &jobs, &activations, source, y);
}

fn run(kernel: driver::Kernel, jobs: &[Job], activations: &Activations, source: Option<&[u32]>, y: &mut [f32]) {
    match source {
        Some(source) => driver::run(kernel, jobs, activations, &|row| source[row] as usize, y),
        None => driver::run(kernel, jobs, activations, &|row| row, y),
    }
}
