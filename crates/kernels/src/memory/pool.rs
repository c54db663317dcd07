//! Freed blocks kept for the next buffer of their size class.
//!
//! A training step asks for the same few hundred megabytes each time; given back and asked again, their page faults
//! cost a third of the step. A block is always initialised: fresh ones come zeroed from the operating system.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Mutex;

/// The alignment of every block: a cache line, a 512-bit register, a row of a tile.
pub(super) const ALIGNMENT: usize = 64;
/// Blocks from this size on are aligned to huge pages, and huge pages are asked for.
const HUGE_PAGE: usize = 2 << 20;
/// Size classes: four to each doubling, from 64 bytes on.
const CLASSES: usize = 4 * 48;
/// Up to here freed memory is always kept; above, as long as it is less than the most that was ever in use: a step
/// that frees all it took finds it again in the next one.
const ALWAYS_KEPT: usize = 256 << 20;

/// Bytes held by the pool of [`Buffer`](super::Buffer)s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStatistics {
    /// In buffers that live.
    pub used: usize,
    /// In freed blocks that wait to be used again.
    pub kept: usize,
    /// The largest `used` there was.
    pub peak_used: usize,
}

struct Pool {
    free: [Vec<Block>; CLASSES],
    statistics: PoolStatistics,
}

static POOL: Mutex<Pool> = Mutex::new(Pool {
    free: [const { Vec::new() }; CLASSES],
    statistics: PoolStatistics { used: 0, kept: 0, peak_used: 0 },
});

/// How much memory the buffers of this process hold.
pub fn statistics() -> PoolStatistics {
    lock().statistics
}

/// Returns all freed blocks to the operating system, as after loading a model.
pub fn release_pool() {
    let mut pool = lock();
    pool.statistics.kept = 0;
    let free = std::mem::replace(&mut pool.free, [const { Vec::new() }; CLASSES]);
    drop(pool);
    free.into_iter().flatten().for_each(Block::deallocate);
}

fn lock() -> std::sync::MutexGuard<'static, Pool> {
    // Nothing in this module panics while holding the lock except by lack of memory, which ends the process.
    POOL.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Initialised memory of a size class, owned.
pub(super) struct Block {
    start: NonNull<u8>,
    class: usize,
}

// SAFETY: a block owns its memory, as a `Box<[u8]>` does.
unsafe impl Send for Block {}
// SAFETY: as above; the block gives out nothing but its address.
unsafe impl Sync for Block {}

impl Block {
    /// A block of at least `bytes` bytes; `true` when it is fresh and therefore all zero.
    pub(super) fn take(bytes: usize) -> (Self, bool) {
        let class = class_of(bytes);
        let mut pool = lock();
        let reused = pool.free[class].pop();
        let statistics = &mut pool.statistics;
        statistics.used += class_size(class);
        statistics.peak_used = statistics.peak_used.max(statistics.used);
        if reused.is_some() {
            statistics.kept -= class_size(class);
        }
        drop(pool);
        match reused {
            Some(block) => (block, false),
            None => (Self::allocate(class), true),
        }
    }

    /// Keeps the block for the next one who asks, or returns it when too much is kept already.
    pub(super) fn give_back(self) {
        let size = class_size(self.class);
        let mut pool = lock();
        pool.statistics.used -= size;
        if pool.statistics.kept + size <= ALWAYS_KEPT.max(pool.statistics.peak_used) {
            pool.statistics.kept += size;
            let class = self.class;
            pool.free[class].push(self);
        } else {
            drop(pool);
            self.deallocate();
        }
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    fn allocate(class: usize) -> Self {
        #[cfg(target_os = "linux")]
        if class_size(class) >= HUGE_PAGE {
            let start = pages::map(class_size(class));
            return Self { start, class };
        }
        let layout = class_layout(class);
        // SAFETY: no class is empty.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, class }
    }

    fn deallocate(self) {
        #[cfg(target_os = "linux")]
        if class_size(self.class) >= HUGE_PAGE {
            // SAFETY: mapped with this very size, and owned by `self`, which ends here.
            unsafe { pages::unmap(self.start, class_size(self.class)) };
            return;
        }
        // SAFETY: allocated with this very layout, and owned by `self`, which ends here.
        unsafe { dealloc(self.start.as_ptr(), class_layout(self.class)) }
    }
}

/// Large blocks straight from the operating system: zero without being touched, in huge pages where it has them.
#[cfg(target_os = "linux")]
mod pages {
    use std::alloc::handle_alloc_error;
    use std::ptr::NonNull;

    use super::{HUGE_PAGE, class_layout, class_of};

    pub(super) fn map(size: usize) -> NonNull<u8> {
        let padded = size + HUGE_PAGE;
        // SAFETY: a new private mapping that touches no memory in use.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                padded,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            handle_alloc_error(class_layout(class_of(size)));
        }
        let before = start.align_offset(HUGE_PAGE);
        let after = padded - before - size;
        // SAFETY: all three ranges lie in the mapping just made; the two cut off are whole pages (or empty), since
        // the size is a multiple of the page; the advice changes no content, and a refusal does no harm.
        unsafe {
            let aligned = start.byte_add(before);
            if before > 0 {
                libc::munmap(start, before);
            }
            if after > 0 {
                libc::munmap(aligned.byte_add(size), after);
            }
            libc::madvise(aligned, size, libc::MADV_HUGEPAGE);
            NonNull::new_unchecked(aligned.cast())
        }
    }

    /// # Safety
    /// `start` came from [`map`] with the same `size`, and is not used afterwards.
    pub(super) unsafe fn unmap(start: NonNull<u8>, size: usize) {
        // SAFETY: the caller's promise.
        unsafe { libc::munmap(start.as_ptr().cast(), size) };
    }
}

/// The smallest class that holds `bytes`.
fn class_of(bytes: usize) -> usize {
    let units = bytes.div_ceil(ALIGNMENT).max(1);
    let doubling = units.ilog2() as usize;
    let base = 1usize << doubling;
    // Quarters of this doubling, rounded up; below 4 units some classes are equal in size, which does no harm.
    let quarters = ((units - base) * 4).div_ceil(base);
    4 * doubling + quarters
}

fn class_size(class: usize) -> usize {
    let base = ALIGNMENT << (class / 4);
    (base + (base / 4) * (class % 4)).next_multiple_of(ALIGNMENT)
}

fn class_layout(class: usize) -> Layout {
    Layout::from_size_align(class_size(class), ALIGNMENT).expect("a buffer larger than the address space")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_what_is_asked_and_waste_a_quarter_at_most() {
        for bytes in (0..5000).chain([1 << 20, (1 << 20) + 1, 123_456_789, 5 << 30]) {
            let size = class_size(class_of(bytes));
            assert!(size >= bytes, "{bytes} in {size}");
            assert!(size <= bytes.max(ALIGNMENT) * 5 / 4 + 2 * ALIGNMENT, "{bytes} in {size}");
        }
    }
}
