//! Blocks of rows as tasks: what the row-wise kernels need beyond [`crate::parallel`].
//!
//! Blocks have fixed sizes, so what a task does never depends on how many threads there are.

use crate::parallel::{DisjointMut, for_each_index};
use std::ops::Range;

/// Cycles (roughly: a cheap operation on one number costs one) below which everything runs on one thread, because
/// waking another takes longer.
const SERIAL_CYCLES: usize = 1 << 15;

/// Runs `task(0..tasks)`, in parallel unless there is little work.
pub(crate) fn for_each_task(tasks: usize, cycles: usize, task: impl Fn(usize) + Sync) {
    for_each_index(tasks, if cycles < SERIAL_CYCLES { usize::MAX } else { 1 }, task);
}

/// Runs `task` on blocks of about `1 << 14` cycles of `items` items that cost `cycles_each`.
pub(crate) fn for_each_block(items: usize, cycles_each: usize, task: impl Fn(Range<usize>) + Sync) {
    // Cheap items, as single numbers, by whole registers; of wide rows each thread has some even if there are few.
    let step = match (1 << 14) / cycles_each.max(1) {
        few @ ..16 => few.max(1),
        many => many.next_multiple_of(16),
    };
    for_each_block_of(step, items, cycles_each, task);
}

/// Runs `task` on blocks of `step` of `items` items that cost `cycles_each`.
pub(crate) fn for_each_block_of(step: usize, items: usize, cycles_each: usize, task: impl Fn(Range<usize>) + Sync) {
    for_each_task(items.div_ceil(step), items * cycles_each, |i| task(i * step..items.min((i + 1) * step)));
}

/// The rows `rows` of a matrix of `width` columns.
#[inline(always)]
pub(crate) fn rows<'a, T>(data: &'a [T], rows: &Range<usize>, width: usize) -> &'a [T] {
    &data[rows.start * width..rows.end * width]
}

/// The rows `rows` of a matrix of `width` columns that several tasks write.
///
/// # Safety
/// While the answer lives, nobody else may hold these rows.
#[inline(always)]
#[allow(clippy::mut_from_ref)] // as DisjointMut::range
pub(crate) unsafe fn rows_mut<'a, T>(data: &'a DisjointMut<'_, T>, rows: &Range<usize>, width: usize) -> &'a mut [T] {
    // SAFETY: the caller's promise.
    unsafe { data.range(rows.start * width..rows.end * width) }
}
