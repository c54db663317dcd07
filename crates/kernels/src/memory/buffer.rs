//! A slice on the heap that starts on a cache line and whose memory goes back to the process-wide pool.

use std::fmt;
use std::marker::PhantomData;
use std::num::NonZero;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytemuck::Pod;

use super::pool::{ALIGNMENT, Block};
use crate::parallel::for_each_chunk;

/// Bytes that one thread copies or clears at once, and no more than these alone: one thread does not fill the memory bus.
const PART_BYTES: usize = 1 << 18;

/// `to = from`, by all threads where it is much.
///
/// # Panics
/// When the lengths differ.
pub fn copy<T: Pod>(from: &[T], to: &mut [T]) {
    assert_eq!(from.len(), to.len(), "values to copy");
    let from: &[u8] = bytemuck::cast_slice(from);
    for_each_chunk(bytemuck::cast_slice_mut(to), PART_BYTES, 2 * PART_BYTES, |first, to: &mut [u8]| {
        to.copy_from_slice(&from[first..first + to.len()]);
    });
}

/// Fills with zeros, by all threads where it is much.
pub fn clear<T: Pod>(to: &mut [T]) {
    for_each_chunk(bytemuck::cast_slice_mut(to), PART_BYTES, 2 * PART_BYTES, |_, to: &mut [u8]| to.fill(0));
}

/// A fixed number of plain values, 64-byte aligned, also when there are none.
pub struct Buffer<T: Pod> {
    /// None when the buffer has no bytes.
    block: Option<Block>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        let (mut buffer, fresh) = Self::take(len);
        if !fresh {
            clear(&mut buffer);
        }
        buffer
    }

    /// `len` values left by whoever had the memory before: for those who write each one before they read it.
    pub fn scratch(len: usize) -> Self {
        Self::take(len).0
    }

    /// A copy of `values`.
    pub fn from_slice(values: &[T]) -> Self {
        let mut buffer = Self::scratch(values.len());
        copy(values, &mut buffer);
        buffer
    }

    fn take(len: usize) -> (Self, bool) {
        const { assert!(align_of::<T>() <= ALIGNMENT) };
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer larger than the address space");
        let (block, fresh) = match bytes {
            0 => (None, true),
            _ => {
                let (block, fresh) = Block::take(bytes);
                (Some(block), fresh)
            }
        };
        (Self { block, len, element: PhantomData }, fresh)
    }

    fn start(&self) -> NonNull<T> {
        const NOWHERE: NonZero<usize> = NonZero::new(ALIGNMENT).unwrap();
        self.block.as_ref().map_or(NonNull::without_provenance(NOWHERE), |block| block.start().cast())
    }
}

impl<T: Pod> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            block.give_back();
        }
    }
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the block has room for `len` values, is aligned, initialised, and any bytes are a valid `T: Pod`.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; the block belongs to this buffer alone.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.len) }
    }
}

impl<T: Pod> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        Self::from_slice(self)
    }
}

impl<T: Pod> Default for Buffer<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: Pod> FromIterator<T> for Buffer<T> {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        Self::from_slice(&values.into_iter().collect::<Vec<T>>())
    }
}

impl<T: Pod> From<Vec<T>> for Buffer<T> {
    fn from(values: Vec<T>) -> Self {
        Self::from_slice(&values)
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl<T: Pod + PartialEq> PartialEq for Buffer<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_independent() {
        for len in [0, 1, 15, 1000, 600_000] {
            let mut first = Buffer::<f32>::zeroed(len);
            assert_eq!(first.as_ptr() as usize % ALIGNMENT, 0);
            first.fill(3.0);
            let second = Buffer::<f32>::zeroed(len);
            assert!(first.iter().all(|&v| v == 3.0) && second.iter().all(|&v| v == 0.0));
            let copy = first.clone();
            drop(first);
            let third = Buffer::<f32>::zeroed(len);
            assert!(third.iter().all(|&v| v == 0.0) && copy.iter().all(|&v| v == 3.0));
        }
    }

    #[test]
    fn buffers_are_made_from_what_there_is() {
        let collected: Buffer<u32> = (0..100).collect();
        assert_eq!(collected, Buffer::from((0..100).collect::<Vec<u32>>()));
        assert_eq!(collected[99], 99);
        assert!(Buffer::<u8>::default().is_empty());
    }

    #[test]
    fn freed_memory_is_used_again() {
        // A size that no other test of this crate asks for.
        let first = Buffer::<u8>::scratch(77_777_777);
        let address = first.as_ptr();
        drop(first);
        assert_eq!(Buffer::<u8>::scratch(77_777_700).as_ptr(), address);
    }
}
