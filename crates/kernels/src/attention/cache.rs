//! [`LayerCache`]: the keys and values of one sequence in one layer, in the blocks that attention reads.
//!
//! A block holds [`KEY_BLOCK`] positions. For each key head: the keys transposed `[head_dim, KEY_BLOCK]`, then the values
//! `[KEY_BLOCK, head_dim padded]`. Nothing is copied when a token attends; what is held in bf16 is widened block by block.

use super::AttentionShape;
use super::pack::{KEY_BLOCK, padded};
use crate::memory::Buffer;
use crate::simd::{LANES, Lanes, Simd};
use half::bf16;

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

/// Keys and values of one sequence in one layer; grows with the sequence.
#[derive(Clone, Debug)]
pub struct LayerCache {
    n_kv_heads: usize,
    head_dim: usize,
    positions: usize,
    blocks: Blocks,
}

#[derive(Clone, Debug)]
enum Blocks {
    F32(Vec<Buffer<f32>>),
    Bf16(Vec<Buffer<u16>>),
}

impl LayerCache {
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

    /// The transposed keys and the values of a head in a block; `scratch` takes them when they must be widened.
    #[inline(always)]
    pub(super) fn block<'a, S: Simd>(
        &'a self,
        simd: S,
        block: usize,
        head: usize,
        scratch: &'a mut [f32],
    ) -> (&'a [f32], &'a [f32]) {
        let Layout { keys, head: len, .. } = self.layout();
        let part = head * len..(head + 1) * len;
        let both: &[f32] = match &self.blocks {
            Blocks::F32(blocks) => &blocks[block][part],
            Blocks::Bf16(blocks) => {
                let scratch = &mut scratch[..len];
                let narrow = blocks[block][part].as_chunks::<LANES>().0;
                for (wide, narrow) in scratch.as_chunks_mut::<LANES>().0.iter_mut().zip(narrow) {
                    Lanes { simd, value: simd.load_bf16(narrow) }.store(wide);
                }
                scratch
            }
        };
        both.split_at(keys)
    }

    fn layout(&self) -> Layout {
        let (keys, values) = (self.head_dim * KEY_BLOCK, KEY_BLOCK * padded(self.head_dim));
        Layout { heads: self.n_kv_heads, head_dim: self.head_dim, keys, head: keys + values }
    }
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
    fn write<T: bytemuck::Pod>(
        &self,
        blocks: &mut Vec<Buffer<T>>,
        block: usize,
        place: usize,
        [keys, values]: [&[f32]; 2],
        narrow: impl Fn(f32) -> T,
    ) {
        if blocks.len() == block {
            // Zeros: keys that are not there yet are computed with, though nothing comes of it.
            blocks.push(Buffer::zeroed(self.heads * self.head));
        }
        let width = padded(self.head_dim);
        let heads = keys.chunks_exact(self.head_dim).zip(values.chunks_exact(self.head_dim));
        for (target, (keys, values)) in blocks[block].chunks_exact_mut(self.head).zip(heads) {
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
