//! Nearly orthogonal updates: the Newton-Schulz iteration of Muon (Jordan et al. 2024, "Muon: An optimizer for hidden
//! layers in neural networks").
//!
//! Legend: `r` rows, `c` columns of a matrix.

use crate::gemm::{Beta, Mat, Precision, matmul};
use crate::memory::Buffer;
use crate::momentum::descend;
use crate::select::{scale, sum_squares};

/// Jordan's quintic: it lifts small singular values fast and leaves all of them between about 0.7 and 1.2.
const QUINTIC: [f32; 3] = [3.4445, -4.775, 2.0315];
/// Iterations, as published.
const ITERATIONS: usize = 5;
/// Added to a norm before it divides; a matrix of zeros stays one.
const TINY: f64 = 1e-7;

/// Replaces each matrix `U S Vᵀ` by about `U Vᵀ`: singular values from 0.7 to 1.2, the same singular vectors.
///
/// # Shapes
/// `matrices` `[n, r, c]`.
///
/// # Panics
/// If the slice is not a whole number of matrices.
pub fn orthogonalise(precision: Precision, matrices: &mut [f32], rows: usize, cols: usize) {
    let size = (rows * cols).max(1);
    assert!(matrices.len().is_multiple_of(size), "{} numbers in matrices of {rows} x {cols}", matrices.len());
    let short = rows.min(cols);
    let mut gram = Buffer::scratch(short * short);
    let mut square = Buffer::scratch(short * short);
    let mut product = Buffer::scratch(size);
    for matrix in matrices.chunks_exact_mut(size) {
        let norm = sum_squares(matrix).sqrt() + TINY;
        scale(matrix, (1.0 / norm) as f32);
        for _ in 0..ITERATIONS {
            iterate(precision, matrix, [rows, cols], [&mut gram, &mut square, &mut product]);
        }
    }
}

/// `X = a X + (b A + c A²) X` with `A = X Xᵀ`; of a matrix with more rows than columns the same, from the right.
fn iterate(precision: Precision, x: &mut [f32], [rows, cols]: [usize; 2], [gram, square, product]: [&mut [f32]; 3]) {
    let [a, b, c] = QUINTIC;
    let short = rows.min(cols);
    let x_mat = Mat::new(x, rows, cols);
    if rows <= cols {
        matmul(precision, x_mat, x_mat.t(), gram, Beta::Overwrite);
    } else {
        matmul(precision, x_mat.t(), x_mat, gram, Beta::Overwrite);
    }
    let gram_mat = Mat::new(gram, short, short);
    matmul(precision, gram_mat, gram_mat, square, Beta::Overwrite);
    // square = b gram + c square
    descend(square, gram, c, -b);
    let polynomial = Mat::new(square, short, short);
    if rows <= cols {
        matmul(precision, polynomial, x_mat, product, Beta::Overwrite);
    } else {
        matmul(precision, x_mat, polynomial, product, Beta::Overwrite);
    }
    descend(x, product, a, -1.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bits, numbers};

    /// The quintic on one singular value.
    fn lifted(mut s: f64) -> f64 {
        let [a, b, c] = QUINTIC.map(f64::from);
        for _ in 0..ITERATIONS {
            s = a * s + b * s.powi(3) + c * s.powi(5);
        }
        s
    }

    /// A diagonal matrix keeps its shape, and each entry goes the way of the scalar iteration.
    #[test]
    fn diagonal_matrices_follow_the_scalar_iteration() {
        let entries = [3.0f32, 2.0, 1.0, 0.5, 0.1];
        let norm = entries.iter().map(|s| f64::from(s * s)).sum::<f64>().sqrt();
        for (rows, cols) in [(5, 5), (5, 9), (9, 5)] {
            let mut matrix = vec![0.0; rows * cols];
            entries.iter().enumerate().for_each(|(at, &entry)| matrix[at * cols + at] = entry);
            orthogonalise(Precision::F32, &mut matrix, rows, cols);
            for row in 0..rows {
                for col in 0..cols {
                    let wanted = if row == col && row < 5 { lifted(f64::from(entries[row]) / norm) } else { 0.0 };
                    let found = f64::from(matrix[row * cols + col]);
                    assert!((found - wanted).abs() < 1e-4, "{rows} x {cols} at {row}, {col}: {found} for {wanted}");
                }
            }
        }
    }

    /// `X Xᵀ` of the result is close to the identity; the matrix of zeros beside it stays one.
    #[test]
    fn results_are_nearly_orthogonal_in_both_precisions() {
        for precision in [Precision::F32, Precision::Bf16] {
            for (rows, cols) in [(24, 40), (40, 24)] {
                let mut matrices = [numbers(7, rows * cols), vec![0.0; rows * cols]].concat();
                orthogonalise(precision, &mut matrices, rows, cols);
                let (x, zeros) = matrices.split_at(rows * cols);
                assert!(zeros.iter().all(|&zero| zero == 0.0));
                let mat = Mat::new(x, rows, cols);
                let mut gram = vec![0.0; 24 * 24];
                let (left, right) = if rows < cols { (mat, mat.t()) } else { (mat.t(), mat) };
                matmul(Precision::F32, left, right, &mut gram, Beta::Overwrite);
                for row in 0..24 {
                    assert!((0.4..1.6).contains(&gram[row * 25]), "{precision:?}: {}", gram[row * 25]);
                }
                let trace: f32 = (0..24).map(|row| gram[row * 25]).sum();
                assert!((0.7..1.3).contains(&(trace / 24.0)), "{precision:?}: mean {}", trace / 24.0);
            }
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut matrix = numbers(3, 200 * 300);
            pool.install(|| orthogonalise(Precision::Bf16, &mut matrix, 200, 300));
            bits(&matrix)
        };
        assert!(with(1) == with(2) && with(1) == with(3));
    }
}
