//! Products of groups of rows, each with its own right operand: the experts of a layer.

use super::driver::{self, Job};
use super::{Beta, Mat, Packed, Precision};

/// `c[rows of g] = [c +] a[rows of g] b[g]` for each group `g`; rows outside all groups are left alone.
///
/// # Shapes
/// `a` `[rows, k]`, `offsets` `[groups + 1]`, `b` `[groups]` of `[k, n]`, `c` `[rows, n]`.
pub fn grouped_matmul(a: Mat, offsets: &[usize], b: &[Packed], c: &mut [f32], beta: Beta) {
    assert_eq!(offsets.len(), b.len() + 1, "one more offset than groups");
    let Some(n) = b.first().map(Packed::n) else { return };
    assert_eq!(c.len(), a.rows * n, "the result of {} rows and {n} columns", a.rows);
    let jobs: Vec<Job> = (b.iter().zip(offsets.windows(2)))
        .filter(|(_, rows)| rows[1] > rows[0])
        .map(|(b, rows)| {
            assert_eq!(b.n(), n, "groups have one width");
            Job { a: a.row_range(rows[0]..rows[1]), b, first: rows[0] * n }
        })
        .collect();
    check_offsets(offsets, a.rows);
    driver::run(&jobs, c, beta);
}

/// `dw[g] = [dw[g] +] dyᵀ x` over the rows of each group `g`. Without rows a group's gradient is zero: nothing is added,
/// or zeros are written.
///
/// # Shapes
/// `dy` `[rows, n]`, `x` `[rows, k]`, `offsets` `[groups + 1]`, `dw` `[groups, n, k]`.
pub fn grouped_matmul_weight_gradient(
    precision: Precision,
    dy: Mat,
    x: Mat,
    offsets: &[usize],
    dw: &mut [f32],
    beta: Beta,
) {
    let groups = offsets.len().saturating_sub(1);
    assert_eq!(dy.rows, x.rows, "rows of dy and x");
    assert_eq!(dw.len(), groups * dy.cols * x.cols, "gradients of {groups} groups");
    check_offsets(offsets, x.rows);
    let wanted: Vec<usize> = (0..groups).filter(|&g| beta == Beta::Overwrite || offsets[g + 1] > offsets[g]).collect();
    let rows = |g: usize| offsets[g]..offsets[g + 1];
    let operands: Vec<Mat> = wanted.iter().map(|&g| x.row_range(rows(g))).collect();
    let packed = Packed::pack_many(precision, &operands);
    let jobs: Vec<Job> = (wanted.iter().zip(&packed))
        .map(|(&g, b)| Job { a: dy.row_range(rows(g)).t(), b, first: g * dy.cols * x.cols })
        .collect();
    driver::run(&jobs, dw, beta);
}

fn check_offsets(offsets: &[usize], rows: usize) {
    assert!(offsets.is_sorted(), "offsets of groups rise");
    assert!(offsets.last().is_none_or(|&end| end <= rows), "groups end at {:?} of {rows} rows", offsets.last());
}
