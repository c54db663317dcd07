//! Loops over rayon's current pool whose results do not depend on how many threads there are.
//!
//! Each body owns its index: it writes only what belongs to that index, and no two share a sum. Which thread takes
//! which index is left to chance; the bits are not.

mod team;

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::isa;

pub use team::with_team;

thread_local! {
    /// Whether this thread is inside [`alone`].
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// How many threads a loop has: those of the current pool, or one inside [`alone`].
pub fn threads() -> usize {
    if ALONE.get() { 1 } else { rayon::current_num_threads() }
}

/// Runs `body`, whose loops stay on this thread: for the body of a loop that keeps all threads busy itself, and is more than
/// one simple pass.
pub fn alone<R>(body: impl FnOnce() -> R) -> R {
    /// Also when the body panics.
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            ALONE.set(self.0);
        }
    }
    let _restore = Restore(ALONE.replace(true));
    body()
}

/// Calls `body(index)` for each index below `count`, in parallel when there are more than `serial_count`.
///
/// Indices are handed out one by one in rising order: put the longest work first.
pub fn for_each_index(count: usize, serial_count: usize, body: impl Fn(usize) + Sync) {
    let workers = threads().min(count);
    if count <= serial_count || workers <= 1 {
        (0..count).for_each(body);
        return;
    }
    let next = AtomicUsize::new(0);
    let forced = isa::forced();
    let work = || {
        isa::with_forced(forced, || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    break;
                }
                body(index);
            }
        });
    };
    if team::share(&work) {
        return;
    }
    rayon::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(|_| work());
        }
        work();
    });
}

/// Calls `body(first, chunk)` for each chunk of `chunk_len` elements (the last may be shorter), `first` being the
/// place of its first element; in parallel when there are more than `serial_len` elements.
pub fn for_each_chunk<T: Send>(
    data: &mut [T],
    chunk_len: usize,
    serial_len: usize,
    body: impl Fn(usize, &mut [T]) + Sync,
) {
    let chunk_len = chunk_len.max(1);
    let len = data.len();
    let serial_count = if len <= serial_len { usize::MAX } else { 1 };
    let parts = DisjointMut::new(data);
    for_each_index(len.div_ceil(chunk_len), serial_count, |index| {
        let range = index * chunk_len..len.min((index + 1) * chunk_len);
        // SAFETY: chunks of different indices do not overlap, and each index is handed out once.
        body(range.start, unsafe { parts.range(range) });
    });
}

/// Calls `body(first_row, rows)` for blocks of `block_rows` rows of a matrix of `width` columns; in parallel when it
/// has more than `serial_len` elements.
pub fn rows_mut<T: Send>(
    data: &mut [T],
    width: usize,
    block_rows: usize,
    serial_len: usize,
    body: impl Fn(usize, &mut [T]) + Sync,
) {
    let width = width.max(1);
    for_each_chunk(data, width * block_rows.max(1), serial_len, |first, rows| body(first / width, rows));
}

/// A slice that several threads write in parts which do not overlap.
pub struct DisjointMut<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` whose parts go to different threads; `range` asks its callers to keep them apart.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}
// SAFETY: as a `&mut [T]`.
unsafe impl<T: Send> Send for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    /// Takes the slice to be parted.
    pub fn new(data: &'a mut [T]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), owner: PhantomData }
    }

    /// How many elements the whole slice has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the whole slice is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// While the result lives, no other part that overlaps `range` may be used.
    ///
    /// # Panics
    /// When `range` leaves the slice.
    #[allow(clippy::mut_from_ref)] // what the type is for
    pub unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: inside the slice by the assertion; alone by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// The address of element `index`, for kernels that write strided parts.
    ///
    /// # Panics
    /// When `index` is past the end.
    pub(crate) fn at(&self, index: usize) -> *mut T {
        assert!(index <= self.len, "{index} of {}", self.len);
        // SAFETY: inside the slice, or one past its end.
        unsafe { self.start.add(index) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, with_isa};

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn each_index_is_visited_once() {
        for threads in 1..4 {
            for count in [0, 1, 2, 7, 100] {
                let visits: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                pool(threads).install(|| {
                    for_each_index(count, 0, |index| {
                        visits[index].fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(visits.iter().all(|v| v.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn chunks_and_rows_know_their_place() {
        for serial_len in [0, 1000] {
            let mut data = vec![0; 103];
            for_each_chunk(&mut data, 10, serial_len, |first, chunk| {
                chunk.iter_mut().enumerate().for_each(|(i, v)| *v = first + i);
            });
            assert!(data.iter().enumerate().all(|(i, &v)| i == v));
            let mut data = vec![0; 5 * 7];
            rows_mut(&mut data, 5, 3, serial_len, |first_row, rows| {
                rows.chunks_exact_mut(5).enumerate().for_each(|(i, row)| row.fill(first_row + i));
            });
            assert!(data.chunks_exact(5).enumerate().all(|(i, row)| row.iter().all(|&v| v == i)));
        }
    }

    #[test]
    fn helpers_obey_the_forced_instruction_set() {
        pool(2).install(|| {
            with_isa(Isa::Portable, || for_each_index(64, 0, |_| assert_eq!(Isa::current(), Isa::Portable)));
        });
    }
}
