//! The right operand of a product, laid out once as the kernels read it.
//!
//! Layout, in 32-bit words (an f32, or two bf16 that follow each other along K, the first in the low half):
//! `[panels of 16 columns][k blocks][16 words along K][16 columns]`. A k block of a panel is 1024 bytes: sixteen
//! 512-bit registers, or one AMX tile. What is missing at the right and at the end of K is zero.

use super::kernels::{Kernels, Lines};
use super::{Mat, Precision};
use crate::isa::Isa;
use crate::memory::{Buffer, SharedBytes};
use crate::parallel::{self, DisjointMut};

/// Columns of a panel; words of a k block; lanes of a 512-bit register.
pub(super) const LANES: usize = 16;
/// Words of a k block of a panel.
pub(super) const BLOCK_WORDS: usize = LANES * LANES;
/// Packing fewer elements than this is not worth waking other threads.
const SERIAL_ELEMENTS: usize = 1 << 16;
/// Panels of a packing task at most, when rows of the source run across panels: a kilobyte of each row.
const PANELS_PER_TASK: usize = 16;

/// Packing more bytes than this writes past the cache, which would not hold them until they are used.
const STREAM_BYTES: usize = 1 << 22;

/// An operand `[k, n]` packed into panels of 16 columns.
#[derive(Clone, Debug)]
pub struct Packed {
    words: Words,
    k: usize,
    n: usize,
    precision: Precision,
}

/// Words of one's own, or bytes of a file that are words.
#[derive(Clone, Debug)]
enum Words {
    Own(Buffer<u32>),
    Shared(SharedBytes),
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
        Ok(Self { words: Words::Shared(bytes), k, n, precision })
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
    pub fn pack_many(precision: Precision, operands: &[Mat]) -> Vec<Self> {
        let kernels = Kernels::of(Isa::current(), precision);
        let mut packed: Vec<Self> = operands.iter().map(|b| Self::unfilled(precision, b.rows, b.cols)).collect();
        let packed_bytes: usize = packed.iter().map(Self::bytes).sum();
        let mut tasks = Vec::new();
        let mut targets = Vec::with_capacity(packed.len());
        for (operand, target) in packed.iter_mut().enumerate() {
            let (panels, panel_words) = (target.panels(), target.panel_words());
            tasks.extend((0..panels).step_by(PANELS_PER_TASK).map(|p| (operand, p..panels.min(p + PANELS_PER_TASK))));
            let Words::Own(words) = &mut target.words else { unreachable!("made above") };
            targets.push((panel_words, DisjointMut::new(words)));
        }
        let elements: usize = operands.iter().map(|b| b.rows * b.cols).sum();
        let stream = packed_bytes > STREAM_BYTES;
        let serial_count = if elements < SERIAL_ELEMENTS { usize::MAX } else { 1 };
        parallel::for_each_index(tasks.len(), serial_count, |task| {
            let (operand, panels) = &tasks[task];
            let (panel_words, target) = &targets[*operand];
            let b = operands[*operand];
            let columns = panels.start * LANES..b.cols.min(panels.end * LANES);
            // SAFETY: tasks take different panels.
            let words = unsafe { target.range(panels.start * panel_words..panels.end * panel_words) };
            kernels.pack_panels(&Lines::columns(b.col_range(columns)), stream, words);
        });
        packed
    }

    fn unfilled(precision: Precision, k: usize, n: usize) -> Self {
        let words = n.div_ceil(LANES) * precision.k_blocks(k) * BLOCK_WORDS;
        Self { words: Words::Own(Buffer::scratch(words)), k, n, precision }
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
        size_of_val::<[u32]>(self.words())
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
        bytemuck::cast_slice(self.words())
    }

    /// The panels' words.
    pub(super) fn words(&self) -> &[u32] {
        match &self.words {
            Words::Own(words) => words,
            Words::Shared(bytes) => bytemuck::cast_slice(bytes),
        }
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
