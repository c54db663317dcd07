//! The largest numbers of a row.

use crate::parallel::DisjointMut;
use crate::tasks::{for_each_block, rows_mut};

/// The `k` largest numbers of a row with their places, largest first, ties to the lower index.
///
/// NaN ranks below every number, `-inf` included (ties among NaN again to the lower index), so a result is always
/// `k` distinct places.
///
/// # Shapes
/// `row` `[n]` with `n >= k`, `index`, `value` `[k]`.
pub fn top_k(row: &[f32], k: usize, index: &mut [u32], value: &mut [f32]) {
    assert!(k <= row.len(), "top {k} of {} numbers", row.len());
    assert_eq!(index.len(), k);
    assert_eq!(value.len(), k);
    if k == 0 {
        return;
    }
    let mut filled = 0;
    for (candidate, &score) in row.iter().enumerate() {
        if filled == k && !ranks_above(score, value[k - 1]) {
            continue;
        }
        let mut place = if filled < k { filled } else { k - 1 };
        filled = (filled + 1).min(k);
        while place > 0 && ranks_above(score, value[place - 1]) {
            value[place] = value[place - 1];
            index[place] = index[place - 1];
            place -= 1;
        }
        value[place] = score;
        index[place] = candidate as u32;
    }
}

/// Whether `a` comes strictly before `b` in descending order with NaN last.
fn ranks_above(a: f32, b: f32) -> bool {
    a > b || (b.is_nan() && !a.is_nan())
}

/// [`top_k`] of each row.
///
/// # Shapes
/// `scores` `[rows, cols]`, `index`, `value` `[rows, k]`.
pub fn top_k_rows(scores: &[f32], cols: usize, k: usize, index: &mut [u32], value: &mut [f32]) {
    assert_eq!(index.len(), value.len());
    assert!(cols > 0 && scores.len().is_multiple_of(cols) && index.len() == scores.len() / cols * k);
    let (index, value) = (DisjointMut::new(index), DisjointMut::new(value));
    for_each_block(scores.len() / cols, 2 * cols + 4 * k, |rows| {
        for row in rows {
            let scores = &scores[row * cols..][..cols];
            // SAFETY: rows are disjoint.
            let (index, value) =
                unsafe { (rows_mut(&index, &(row..row + 1), k), rows_mut(&value, &(row..row + 1), k)) };
            top_k(scores, k, index, value);
        }
    });
}

/// The place of the largest number, the lowest of equals; NaN ranks last. `None` for no numbers.
pub fn argmax(row: &[f32]) -> Option<usize> {
    let mut best = 0;
    for (i, &v) in row.iter().enumerate() {
        if ranks_above(v, row[best]) {
            best = i;
        }
    }
    (!row.is_empty()).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::numbers;

    fn chosen(row: &[f32], k: usize) -> Vec<u32> {
        let (mut index, mut value) = (vec![0; k], vec![0.0; k]);
        top_k(row, k, &mut index, &mut value);
        for (&index, &value) in index.iter().zip(&value) {
            assert_eq!(value.to_bits(), row[index as usize].to_bits());
        }
        index
    }

    #[test]
    fn on_paper() {
        assert_eq!(chosen(&[1.0, 3.0, 2.0], 2), [1, 2]);
        assert_eq!(chosen(&[1.0, 1.0, 1.0], 2), [0, 1]);
        assert_eq!(chosen(&[0.0, 2.0, 1.0, 2.0], 3), [1, 3, 2]);
        assert_eq!(chosen(&[0.0, -0.0], 2), [0, 1]);
        assert_eq!(chosen(&[5.0], 0), [0u32; 0]);
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        assert_eq!(chosen(&[nan, -inf, nan, 1.0, inf], 5), [4, 3, 1, 0, 2]);
        assert_eq!(argmax(&[nan, 1.0, 2.0, 2.0]), Some(2));
        assert_eq!(argmax(&[nan, nan]), Some(0));
        assert_eq!(argmax(&[]), None);
    }

    #[test]
    fn is_a_stable_sort_cut_off() {
        for (rows, cols) in [(1, 1), (5, 8), (40, 33), (2, 500)] {
            // Few distinct values: many ties.
            let scores: Vec<f32> = numbers(1, rows * cols).iter().map(|x| (x * 5.0).round()).collect();
            for k in [0, 1, cols.min(2), cols.min(7), cols] {
                let (mut index, mut value) = (vec![0; rows * k], vec![0.0; rows * k]);
                top_k_rows(&scores, cols, k, &mut index, &mut value);
                for row in 0..rows {
                    let scores = &scores[row * cols..][..cols];
                    let mut sorted: Vec<u32> = (0..cols as u32).collect();
                    sorted.sort_by(|&a, &b| scores[b as usize].partial_cmp(&scores[a as usize]).unwrap());
                    assert_eq!(index[row * k..][..k], sorted[..k]);
                }
            }
        }
    }
}
