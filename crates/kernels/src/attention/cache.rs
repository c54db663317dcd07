//! [`LayerCache`]: the keys and values of one sequence in one layer, in the blocks that attention reads.
//!
//! A block holds [`KEY_BLOCK`] positions. For each key head: the keys transposed `[head_dim, KEY_BLOCK]`, then the values
//! `[KEY_BLOCK, head_dim padded]`. Nothing is copied when a token attends; what is held in bf16 or bytes is widened in
//! registers, and the scales of bytes multiply scores and weights, not keys and values.
//!
//! Blocks are shared: the clone of a cache holds the same ones, and copies a block when it writes to it. So sequences that
//! begin alike hold what they have in common once.

use super::AttentionShape;
use super::forward::{Keys, Scales};
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
    /// Signed bytes with one f32 scale for each head's key and one for its value: half of bf16's memory again. A number is
    /// off by at most 1/254 of the largest beside it.
    Q8,
}

impl CacheFormat {
    /// Bytes of one head's key or value of `head_dim` numbers.
    pub fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => 4 * head_dim,
            Self::Bf16 => 2 * head_dim,
            Self::Q8 => head_dim + size_of::<f32>(),
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
    /// Codes, and of each block the scales `[n_kv_heads, 2 (key, value), KEY_BLOCK]`.
    Q8(Vec<Arc<Buffer<i8>>>, Vec<Arc<Buffer<f32>>>),
}

impl LayerCache {
    /// Positions in a block: what a clone shares with its origin while both go on is a multiple of it.
    pub const BLOCK: usize = KEY_BLOCK;

    /// An empty cache.
    pub fn new(n_kv_heads: usize, head_dim: usize, format: CacheFormat) -> Self {
        let blocks = match format {
            CacheFormat::F32 => Blocks::F32(Vec::new()),
            CacheFormat::Bf16 => Blocks::Bf16(Vec::new()),
            CacheFormat::Q8 => Blocks::Q8(Vec::new(), Vec::new()),
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
                Blocks::Q8(codes, scales) => {
                    if scales.len() == block {
                        scales.push(Arc::new(Buffer::zeroed(2 * self.n_kv_heads * KEY_BLOCK)));
                    }
                    let scales = Arc::make_mut(&mut scales[block]);
                    let [keys, values] = [(keys, 0), (values, 1)].map(|(row, which)| {
                        let mut row = row.to_vec();
                        for (head, part) in row.chunks_exact_mut(self.head_dim).enumerate() {
                            scales[(2 * head + which) * KEY_BLOCK + place] = divide_by_scale(part);
                        }
                        row
                    });
                    // A conversion keeps what is in range and makes zero of what is no number; the scale says that then.
                    layout.write(codes, block, place, [&keys, &values], |x| x.round_ties_even() as i8);
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
            Blocks::Q8(codes, scales) => {
                codes.truncate(blocks);
                scales.truncate(blocks);
            }
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
            Blocks::Q8(codes, scales) => {
                let (scales, _) = scales[block].as_chunks::<KEY_BLOCK>();
                BlockOf::Q8(self.layout().read(codes, block, head), [&scales[2 * head], &scales[2 * head + 1]])
            }
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
    Q8(Keys<'a, i8>, Scales<'a>),
}

/// Divides numbers by the scale with which they fit into -127..=127; returns it, NaN if they hold something infinite or no
/// number.
fn divide_by_scale(row: &mut [f32]) -> f32 {
    let largest = row.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    if !row.iter().all(|x| x.is_finite()) {
        return f32::NAN;
    }
    let scale = largest / 127.0;
    if scale > 0.0 {
        row.iter_mut().for_each(|x| *x /= scale);
    }
    scale
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
