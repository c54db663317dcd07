//! [`LatentCache`]: what multi-head latent attention remembers of one sequence in one layer (DeepSeek-AI 2024,
//! "DeepSeek-V2", section 2.1): one row a position, which all heads read as key and, its first features, as value.
//!
//! Blocks of [`KEY_BLOCK`] rows are shared: the clone of a cache holds the same ones, and copies one when it writes to it.

use super::pack::{HeadRows, KEY_BLOCK, copy_rows, transpose_rows};
use super::{AttentionShape, CacheFormat};
use crate::memory::Buffer;
use crate::simd::Simd;
use half::bf16;
use std::sync::Arc;

/// Latents of one sequence in one layer; grows with the sequence. A clone shares the blocks.
#[derive(Clone, Debug)]
pub struct LatentCache {
    width: usize,
    positions: usize,
    blocks: Blocks,
}

/// Blocks `[KEY_BLOCK, width]`.
#[derive(Clone, Debug)]
enum Blocks {
    F32(Vec<Arc<Buffer<f32>>>),
    Bf16(Vec<Arc<Buffer<u16>>>),
}

impl LatentCache {
    /// An empty cache of rows of `width` numbers. Latents are small as they are: in place of bytes they are held in bf16.
    pub fn new(width: usize, format: CacheFormat) -> Self {
        let blocks = match format {
            CacheFormat::F32 => Blocks::F32(Vec::new()),
            CacheFormat::Bf16 | CacheFormat::Q8 => Blocks::Bf16(Vec::new()),
        };
        Self { width, positions: 0, blocks }
    }

    /// Bytes of a row.
    pub fn row_bytes(width: usize, format: CacheFormat) -> usize {
        match format {
            CacheFormat::F32 => CacheFormat::F32.row_bytes(width),
            CacheFormat::Bf16 | CacheFormat::Q8 => CacheFormat::Bf16.row_bytes(width),
        }
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
    /// latents `[positions, width]`.
    pub fn push(&mut self, latents: &[f32]) {
        assert!(latents.len().is_multiple_of(self.width), "rows of {} numbers", self.width);
        for (position, latent) in (self.positions..).zip(latents.chunks_exact(self.width)) {
            match &mut self.blocks {
                Blocks::F32(blocks) => write(blocks, position, latent, |x| x),
                Blocks::Bf16(blocks) => write(blocks, position, latent, |x| bf16::from_f32(x).to_bits()),
            }
        }
        self.positions += latents.len() / self.width;
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
        assert_eq!((shape.n_kv_heads, shape.head_dim), (1, self.width), "width of the latents");
        assert!(shape.value_dim <= shape.head_dim, "values are the first features of the latents");
    }

    /// Lays out a block's first rows, up to position `end`, as attention reads them: keys transposed, and values.
    #[inline(always)]
    pub(super) fn unfold<S: Simd>(
        &self,
        simd: S,
        (block, end): (usize, usize),
        value_dim: usize,
        keys: &mut [f32],
        values: &mut [f32],
    ) {
        let width = self.width;
        let present = 0..(end - block * KEY_BLOCK).min(KEY_BLOCK);
        let widened: Buffer<f32>;
        let data = match &self.blocks {
            Blocks::F32(blocks) => &blocks[block][..],
            Blocks::Bf16(blocks) => {
                let rows = &blocks[block][..present.end * width];
                widened = rows.iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect();
                &widened
            }
        };
        transpose_rows(HeadRows { data, width, offset: 0, head_dim: width }, present.clone(), keys);
        copy_rows(simd, HeadRows { data, width, offset: 0, head_dim: value_dim }, present, values);
    }
}

fn write<T: bytemuck::Pod>(blocks: &mut Vec<Arc<Buffer<T>>>, position: usize, row: &[f32], narrow: impl Fn(f32) -> T) {
    let (block, place) = (position / KEY_BLOCK, position % KEY_BLOCK);
    if blocks.len() == block {
        blocks.push(Arc::new(Buffer::zeroed(KEY_BLOCK * row.len())));
    }
    let block = Arc::make_mut(&mut blocks[block]);
    block[place * row.len()..(place + 1) * row.len()].iter_mut().zip(row).for_each(|(to, &x)| *to = narrow(x));
}
