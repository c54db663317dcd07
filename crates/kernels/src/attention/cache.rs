//! [`LayerCache`]: the keys and values of one sequence in one layer, in the blocks that attention reads.
//!
//! A block holds [`KEY_BLOCK`] positions. For each key head: the keys transposed `[head_dim, KEY_BLOCK]`, then the values
//! `[KEY_BLOCK, head_dim padded]`. Nothing is copied when a token attends; what is held in bf16 is widened in registers.
//!
//! Blocks are shared: the clone of a cache holds the same ones, and copies a block when it writes to it. So sequences that
//! begin alike hold what they have in common once.

use super::AttentionShape;
use super::forward::Keys;
use super::pack::{KEY_BLOCK, padded};
use crate::memory::Buffer;
use half::bf16;
use std::sync::Arc;

/// What keys and values are held in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheFormat {
    /// f32: attention over the cache gives the bits of attention without one.
    #[default]
    F32,
    /// bf16, rounded to nearest, ties to even: half the memory and half the reading.
    Bf16,
}

impl CacheFormat {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Keys and values of one sequence in one layer; grows with the sequence. A clone shares the blocks.
#[derive(Clone, Debug)]
pub struct LayerCache {
    n_kv_heads: usize,
    head_dim: usize,
    positions: usize,
    blocks: Blocks,
}

#[derive(Clone, Debug)]
enum Blocks {
    F32(Vec<Arc<Buffer<f32>>>),
    Bf16(Vec<Arc<Buffer<u16>>>),
}

impl LayerCache {
    /// Positions in a block: what a clone shares with its origin while both go on is a multiple of it.
    pub const BLOCK: usize = KEY_BLOCK;

    /// An empty cache.
    pub fn new(n_kv_heads: usize, head_dim: usize, format: CacheFormat) -> Self {
        let blocks = match format {
            CacheFormat::F32 => Blocks::F32(Vec::new()),
            CacheFormat::Bf16 => Blocks::Bf16(Vec::new()),
        };
        Self { n_kv_heads, head_dim, positions: 0, blocks }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.positions
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.positions == 0
    }

    /// Adds positions.
    ///
    /// # Shapes
    /// keys, values `[positions, nkv * hd]`.
    pub fn push(&mut self, keys: &[f32], values: &[f32]) {
        let layout = self.layout();
        let width = self.n_kv_heads * self.head_dim;
        assert_eq!(keys.len(), values.len(), "keys and values");
        assert!(keys.len().is_multiple_of(width), "rows of {width} numbers");
        let rows = keys.chunks_exact(width).zip(values.chunks_exact(width));
        for (position, (keys, values)) in (self.positions..).zip(rows) {
            let (block, place) = (position / KEY_BLOCK, position % KEY_BLOCK);
            match &mut self.blocks {
                Blocks::F32(blocks) => layout.write(blocks, block, place, [keys, values], |x| x),
                Blocks::Bf16(blocks) => {
                    layout.write(blocks, block, place, [keys, values], |x| bf16::from_f32(x).to_bits())
                }
            }
        }
        self.positions += keys.len() / width;
    }

    /// Forgets all but the first `positions`.
    pub fn truncate(&mut self, positions: usize) {
        self.positions = self.positions.min(positions);
        let blocks = self.positions.div_ceil(KEY_BLOCK);
        match &mut self.blocks {
            Blocks::F32(held) => held.truncate(blocks),
            Blocks::Bf16(held) => held.truncate(blocks),
        }
    }

    pub(super) fn check(&self, shape: &AttentionShape) {
        assert_eq!((self.n_kv_heads, self.head_dim), (shape.n_kv_heads, shape.head_dim), "heads of the cache");
    }

    /// The keys and values of a head in a block; the next block of the head is on its way then.
    #[inline(always)]
    pub(super) fn block(&self, block: usize, head: usize) -> BlockOf<'_> {
        match &self.blocks {
            Blocks::F32(blocks) => BlockOf::F32(self.layout().read(blocks, block, head)),
            Blocks::Bf16(blocks) => BlockOf::Bf16(self.layout().read(blocks, block, head)),
        }
    }

    fn layout(&self) -> Layout {
        let (keys, values) = (self.head_dim * KEY_BLOCK, KEY_BLOCK * padded(self.head_dim));
        Layout { heads: self.n_kv_heads, head_dim: self.head_dim, keys, head: keys + values }
    }
}

/// One head's keys and values in a block.
pub(super) enum BlockOf<'a> {
    F32(Keys<'a, f32>),
    Bf16(Keys<'a, u16>),
}

/// Has the processor bring memory into its second cache while it computes on something else.
#[inline(always)]
fn fetch<T>(memory: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in memory.chunks((64 / size_of::<T>()).max(1)) {
        // SAFETY: a prefetch reads nothing that the program sees.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = memory;
}

/// Where things are in a block.
struct Layout {
    heads: usize,
    head_dim: usize,
    /// Numbers of a head's keys.
    keys: usize,
    /// Numbers of a head's keys and values.
    head: usize,
}

impl Layout {
    #[inline(always)]
    fn read<'a, T: bytemuck::Pod>(&self, blocks: &'a [Arc<Buffer<T>>], block: usize, head: usize) -> Keys<'a, T> {
        let part = head * self.head..(head + 1) * self.head;
        if let Some(next) = blocks.get(block + 1) {
            fetch(&next[part.clone()]);
        }
        let (transposed, values) = blocks[block][part].split_at(self.keys);
        Keys { start: block * KEY_BLOCK, transposed, values }
    }

    fn write<T: bytemuck::Pod>(
        &self,
        blocks: &mut Vec<Arc<Buffer<T>>>,
        block: usize,
        place: usize,
        [keys, values]: [&[f32]; 2],
        narrow: impl Fn(f32) -> T,
    ) {
        if blocks.len() == block {
            // Zeros: keys that are not there yet are computed with, though nothing comes of it.
            blocks.push(Arc::new(Buffer::zeroed(self.heads * self.head)));
        }
        let width = padded(self.head_dim);
        let heads = keys.chunks_exact(self.head_dim).zip(values.chunks_exact(self.head_dim));
        let block = Arc::make_mut(&mut blocks[block]);
        for (target, (keys, values)) in block.chunks_exact_mut(self.head).zip(heads) {
            let (key_block, value_block) = target.split_at_mut(self.keys);
            for (column, &key) in key_block.chunks_exact_mut(KEY_BLOCK).zip(keys) {
                column[place] = narrow(key);
            }
            for (target, &value) in value_block[place * width..].iter_mut().zip(values) {
                *target = narrow(value);
            }
        }
    }
}
