//! The right operand of a product, laid out once as the kernels read it.
//!
//! Layout, in 32-bit words (an f32, or two bf16 that follow each other along K, the first in the low half):
//! `[panels of 16 columns][k blocks][16 words along K][16 columns]`. A k block of a panel is 1024 bytes: sixteen
//! 512-bit registers, or one AMX tile. What is missing at the right and at the end of K is zero.

use super::kernels::{Kernels, Lines, pieces};
use super::{Mat, Precision};
use crate::isa::Isa;
use crate::memory::{Buffer, SharedBytes};
use crate::parallel::{self, DisjointMut};
use std::ops::Range;

/// Columns of a panel; words of a k block; lanes of a 512-bit register.
pub(super) const LANES: usize = 16;
/// Words of a k block of a panel.
pub(super) const BLOCK_WORDS: usize = LANES * LANES;
/// Packing fewer elements than this is not worth waking other threads.
const SERIAL_ELEMENTS: usize = 1 << 16;
/// Elements of a packing task, about: a share of a small operand for every thread.
const TASK_ELEMENTS: usize = 1 << 15;
/// Panels of a packing task at most, when rows of the source run across panels: a kilobyte of each row.
const PANELS_PER_TASK: usize = 16;
/// Packing more bytes than this writes past the cache, which would not hold them until they are used.
const STREAM_BYTES: usize = 1 << 22;

/// An operand `[k, n]` packed into panels of 16 columns.
#[derive(Clone, Debug)]
pub struct Packed {
    /// The panels' words; operands that were packed together share a block of memory.
    words: SharedBytes,
    k: usize,
    n: usize,
    precision: Precision,
}

/// Some panels of an operand, along some of K.
struct Task {
    operand: usize,
    panels: Range<usize>,
    k_blocks: Range<usize>,
}

impl Packed {
    /// An operand that was packed before, as in a file.
    ///
    /// # Errors
    /// The number of bytes wanted, if there are others, or they do not start on a border of 64.
    pub fn from_packed(precision: Precision, k: usize, n: usize, bytes: SharedBytes) -> Result<Self, Option<usize>> {
        let wanted = Self::packed_bytes(precision, k, n);
        if wanted != Some(bytes.len()) || !bytes.as_ptr().addr().is_multiple_of(64) {
            return Err(wanted);
        }
        Ok(Self { words: bytes, k, n, precision })
    }

    /// Bytes of a packed operand `[k, n]`, if they can be counted.
    pub fn packed_bytes(precision: Precision, k: usize, n: usize) -> Option<usize> {
        n.div_ceil(LANES).checked_mul(precision.k_blocks(k))?.checked_mul(4 * BLOCK_WORDS)
    }

    /// Packs `b` `[k, n]`. A weight `[out, in]` used as `y = x Wᵀ` is packed as `Mat::new(w, out, in).t()`.
    pub fn pack(precision: Precision, b: Mat) -> Self {
        Self::pack_many(precision, &[b]).pop().expect("one operand in, one out")
    }

    /// Packs several operands, as those of all experts, in one parallel pass.
    ///
    /// They get one block of memory: how much a step takes for the rows of all experts hardly changes, how much for one
    /// expert's does.
    pub fn pack_many(precision: Precision, operands: &[Mat]) -> Vec<Self> {
        let kernels = Kernels::of(Isa::current(), precision);
        let mut starts = vec![0];
        for b in operands {
            let bytes = Self::packed_bytes(precision, b.rows, b.cols).expect("an operand larger than memory");
            starts.push(starts[starts.len() - 1] + bytes);
        }
        let packed_bytes = starts[operands.len()];
        let mut memory = Buffer::<u8>::scratch(packed_bytes);
        let tasks: Vec<Task> = operands.iter().enumerate().flat_map(|(i, b)| cut(precision, i, b)).collect();
        let elements: usize = operands.iter().map(|b| b.rows * b.cols).sum();
        let stream = packed_bytes > STREAM_BYTES;
        let serial_count = if elements < SERIAL_ELEMENTS { usize::MAX } else { 1 };
        let words = DisjointMut::new(bytemuck::cast_slice_mut::<u8, u32>(&mut memory));
        parallel::for_each_index(tasks.len(), serial_count, |task| {
            let Task { operand, panels, k_blocks } = &tasks[task];
            let (b, block_k) = (operands[*operand], precision.block_k());
            let columns = panels.start * LANES..b.cols.min(panels.end * LANES);
            let k = k_blocks.start * block_k..b.rows.min(k_blocks.end * block_k);
            let panel_words = precision.k_blocks(b.rows) * BLOCK_WORDS;
            let first = starts[*operand] / 4 + panels.start * panel_words + k_blocks.start * BLOCK_WORDS;
            let columns = Lines::columns(b.row_range(k).col_range(columns));
            // SAFETY: the operand has room for these panels and k blocks, and tasks take different ones.
            unsafe { kernels.pack_panels(&columns, panel_words, stream, words.at(first)) };
        });
        let memory = SharedBytes::from(memory);
        (operands.iter().zip(starts.windows(2)))
            .map(|(b, bytes)| {
                let words = memory.part(bytes[0]..bytes[1]).expect("a part of the whole");
                Self { words, k: b.rows, n: b.cols, precision }
            })
            .collect()
    }

    /// The length of the sums.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The number of columns.
    pub fn n(&self) -> usize {
        self.n
    }

    /// How the elements are held.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The memory it takes.
    pub fn bytes(&self) -> usize {
        self.words.len()
    }

    /// Column `column`, unpacked, into `out` `[k]`: a row of the weight that was packed.
    ///
    /// # Panics
    /// If there is no such column, or `out` has another length.
    pub fn column(&self, column: usize, out: &mut [f32]) {
        assert!(column < self.n && out.len() == self.k, "column {column} of {} into {} numbers", self.n, out.len());
        let panel = &self.words()[column / LANES * self.panel_words()..];
        let word = |index: usize| panel[index * LANES + column % LANES];
        match self.precision {
            Precision::F32 => {
                out.iter_mut().enumerate().for_each(|(k, out)| *out = f32::from_bits(word(k)));
            }
            Precision::Bf16 => {
                for (k, out) in out.iter_mut().enumerate() {
                    // The first of a pair is in the low half; a bf16 is the high half of an f32.
                    *out = f32::from_bits(if k % 2 == 0 { word(k / 2) << 16 } else { word(k / 2) & 0xffff_0000 });
                }
            }
        }
    }

    /// The panels as bytes, to be saved, in the order of a little-endian machine.
    pub fn content(&self) -> &[u8] {
        &self.words
    }

    /// The panels' words.
    pub(super) fn words(&self) -> &[u32] {
        bytemuck::cast_slice(&self.words)
    }

    pub(super) fn panels(&self) -> usize {
        self.n.div_ceil(LANES)
    }

    pub(super) fn k_blocks(&self) -> usize {
        self.precision.k_blocks(self.k)
    }

    /// Words from one panel to the next.
    pub(super) fn panel_words(&self) -> usize {
        self.k_blocks() * BLOCK_WORDS
    }
}

/// Cuts the packing of an operand into tasks that read runs of its source.
fn cut(precision: Precision, operand: usize, b: &Mat) -> Vec<Task> {
    let (panels, k_blocks) = (b.cols.div_ceil(LANES), precision.k_blocks(b.rows));
    let (panel_step, k_step) = if b.row_stride == 1 {
        ((TASK_ELEMENTS / (LANES * b.rows.max(1))).clamp(1, PANELS_PER_TASK), k_blocks)
    } else {
        let panel_step = panels.clamp(1, PANELS_PER_TASK);
        (panel_step, TASK_ELEMENTS / (panel_step * LANES * precision.block_k()))
    };
    pieces(0..panels, panel_step)
        .flat_map(|panels| {
            pieces(0..k_blocks, k_step).map(move |k_blocks| Task { operand, panels: panels.clone(), k_blocks })
        })
        .collect()
}
