//! Rows of one expert that go through its whole network while they are in the cache, one thread to a chunk.
//!
//! A layer's inner activations are many times the caches: written by one pass over all rows and read by the next, they cost
//! as much time as a tenth of the products. Cut into chunks, most of them are read where they were written.

use moebius_kernels::parallel::{alone, for_each_chunk};
use std::ops::Range;

/// Rows of a chunk at most. A multiple of what the kernels take at once; at usual widths its activations fit the second
/// cache.
pub(super) const ROWS: usize = 96;

/// Rows of one expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) expert: usize,
    pub(super) rows: Range<usize>,
}

/// All rows, cut into chunks in their order: an expert's rows into parts that are about equal.
pub(super) fn cut(offsets: &[usize]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (expert, bounds) in offsets.windows(2).enumerate() {
        let parts = (bounds[1] - bounds[0]).div_ceil(ROWS);
        let step = (bounds[1] - bounds[0]).div_ceil(parts.max(1)).next_multiple_of(ROWS / 8);
        let starts = (bounds[0]..bounds[1]).step_by(step.max(1));
        chunks.extend(starts.map(|start| Chunk { expert, rows: start..bounds[1].min(start + step) }));
    }
    chunks
}

/// The rows of each chunk in a matrix of `width` columns.
pub(super) fn split<'m, T>(chunks: &[Chunk], mut matrix: &'m mut [T], width: usize) -> Vec<&'m mut [T]> {
    let mut take = |chunk: &Chunk| {
        let (rows, rest) = std::mem::take(&mut matrix).split_at_mut(chunk.rows.len() * width);
        matrix = rest;
        rows
    };
    chunks.iter().map(&mut take).collect()
}

/// Runs `body` on every task, several at once, each on one thread.
pub(super) fn for_each<T: Send>(mut tasks: Vec<T>, body: impl Fn(&mut T) + Sync) {
    for_each_chunk(&mut tasks, 1, 1, |_, tasks| tasks.iter_mut().for_each(|task| alone(|| body(task))));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_all_rows_in_order() {
        for offsets in [&[0, 0, 5, 5, 300, 301][..], &[0, 96, 192, 289], &[0]] {
            let chunks = cut(offsets);
            let mut next = 0;
            for Chunk { expert, rows } in &chunks {
                assert_eq!(rows.start, next);
                assert!(!rows.is_empty() && rows.len() <= ROWS, "{rows:?}");
                assert!(offsets[*expert] <= rows.start && rows.end <= offsets[expert + 1], "{rows:?} of {expert}");
                next = rows.end;
            }
            assert_eq!(next, *offsets.last().unwrap());
            let mut matrix: Vec<f32> = (0..2 * next).map(|i| i as f32).collect();
            for (chunk, rows) in chunks.iter().zip(split(&chunks, &mut matrix, 2)) {
                assert_eq!((rows.len(), rows[0]), (2 * chunk.rows.len(), 2.0 * chunk.rows.start as f32));
            }
        }
    }
}
