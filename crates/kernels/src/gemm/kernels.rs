//! What an instruction set brings to the products: two packers and a kernel, behind one table.

use std::ops::Range;

use super::packed::{BLOCK_WORDS, LANES};
use super::{Mat, Precision, portable};
#[cfg(target_arch = "x86_64")]
use super::{amx, avx2, avx512};
use crate::isa::Isa;
use crate::narrow::Numbers;

/// The functions of one instruction set and precision, and the block of rows that its kernel takes.
pub(super) struct Kernels {
    /// Rows of a block of the left operand.
    pub(super) block_rows: usize,
    /// A block is padded with zero rows to a multiple of this.
    pub(super) row_multiple: usize,
    /// Along how much of K, in k blocks, a block of rows goes before the next has its turn.
    pub(super) k_blocks: usize,
    pub(super) precision: Precision,
    /// Whether the kernel reads rows where they stand, if their elements are words already.
    pub(super) takes_unpacked: bool,
    pub(super) pack_rows: PackRowsFn,
    pub(super) pack_panels: PackPanelsFn,
    pub(super) multiply: MultiplyFn,
}

/// Packs rows, given the rows of a block, all rows padded, and where the words go.
///
/// # Safety
/// The instruction set is there, and the words are writable.
pub(super) type PackRowsFn = unsafe fn(&Lines, usize, usize, *mut u32);
/// Packs columns, given the words from a panel to the next, whether to write past the cache, and where the words go.
///
/// # Safety
/// The instruction set is there, and the words are writable and 64-byte aligned.
pub(super) type PackPanelsFn = unsafe fn(&Lines, usize, bool, *mut u32);
/// Multiplies a block of rows with panels.
///
/// # Safety
/// The instruction set is there, and the pointers of the [`BlockProduct`] hold what it says.
pub(super) type MultiplyFn = unsafe fn(&BlockProduct);

/// Rows of the left operand, or columns of the right one, to be packed along K.
#[derive(Clone, Copy)]
pub(super) struct Lines<'a> {
    pub(super) data: Numbers<'a>,
    pub(super) count: usize,
    /// Elements of a line.
    pub(super) k: usize,
    /// From a line to the next.
    pub(super) line_stride: usize,
    /// From an element of a line to the next.
    pub(super) k_stride: usize,
}

impl<'a> Lines<'a> {
    pub(super) fn rows(a: Mat<'a>) -> Self {
        let lines = Self { data: a.data, count: a.rows, k: a.cols, line_stride: a.row_stride, k_stride: a.col_stride };
        let last = |count: usize, stride: usize| count.saturating_sub(1) * stride;
        let needed = last(lines.count, lines.line_stride) + last(lines.k, lines.k_stride) + 1;
        assert!(lines.count == 0 || lines.k == 0 || needed <= lines.data.len(), "a view that leaves its slice");
        assert!(lines.line_stride == 1 || lines.k_stride == 1 || lines.count <= 1 || lines.k <= 1);
        lines
    }

    pub(super) fn columns(b: Mat<'a>) -> Self {
        Self::rows(b.t())
    }

    /// The words of the lines where they stand, and how many from a line to the next, if they are whole k blocks of
    /// elements as products in `precision` take them.
    pub(super) fn words(&self, precision: Precision) -> Option<(*const u32, usize)> {
        let (data, per_word) = match (self.data, precision) {
            (Numbers::F32(data), Precision::F32) => (data.as_ptr().cast::<u32>(), 1),
            (Numbers::Bf16(data), Precision::Bf16) => (data.as_ptr().cast::<u32>(), 2),
            _ => return None,
        };
        let (runs, whole) = (self.k_stride == 1, self.k.is_multiple_of(precision.block_k()));
        let in_words = self.line_stride.is_multiple_of(per_word) && data.is_aligned();
        (runs && whole && in_words).then_some((data, self.line_stride / per_word))
    }

    /// Where element `k` of line `line` stands or would stand: for prefetching.
    pub(super) fn address(&self, line: usize, k: usize) -> *const i8 {
        let at = line * self.line_stride + k * self.k_stride;
        match self.data {
            Numbers::F32(data) => data.as_ptr().wrapping_add(at).cast(),
            Numbers::Bf16(data) => data.as_ptr().wrapping_add(at).cast(),
        }
    }

    /// Copies elements that follow each other in memory, from element `k` of line `line` on.
    #[inline(always)]
    pub(super) fn copy_run(&self, line: usize, k: usize, out: &mut [f32]) {
        let at = line * self.line_stride + k * self.k_stride;
        match self.data {
            Numbers::F32(data) => out.copy_from_slice(&data[at..at + out.len()]),
            Numbers::Bf16(data) => {
                let run = &data[at..at + out.len()];
                out.iter_mut().zip(run).for_each(|(out, &bits)| *out = f32::from_bits(u32::from(bits) << 16));
            }
        }
    }
}

/// A block of rows times some panels, along some of K: `c = [c +] a b`.
pub(super) struct BlockProduct {
    /// `[k blocks][rows, padded][16 words]`; or `[rows][k blocks][16 words]`, where the kernel takes that.
    pub(super) a: *const u32,
    /// Words from a row of A to the next, if they are not packed.
    pub(super) unpacked_stride: Option<usize>,
    pub(super) rows: usize,
    pub(super) k_blocks: usize,
    /// The first panel at the first k block; `[k blocks][16 words][16 columns]`.
    pub(super) b: *const u32,
    /// Words from a panel to the next.
    pub(super) panel_stride: usize,
    /// Columns of the result; the last panel may be used in part.
    pub(super) columns: usize,
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Start from what `c` holds instead of zero.
    pub(super) accumulate: bool,
}

impl Kernels {
    /// The table for `isa`, which the machine must have.
    pub(super) fn of(isa: Isa, precision: Precision) -> &'static Self {
        assert!(isa <= Isa::best());
        match (isa, precision) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Amx, Precision::F32) => &avx512::F32,
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, Precision::Bf16) => &avx512::BF16,
            #[cfg(target_arch = "x86_64")]
            (Isa::Amx, Precision::Bf16) => &amx::BF16,
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, Precision::F32) => &avx2::F32,
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, Precision::Bf16) => &avx2::BF16,
            (_, Precision::F32) => &portable::F32,
            (_, Precision::Bf16) => &portable::BF16,
        }
    }

    /// The rows that `rows` rows take when packed.
    pub(super) fn padded_rows(&self, rows: usize) -> usize {
        rows.next_multiple_of(self.row_multiple)
    }

    /// Packs rows as blocks `[k blocks][rows of the block][16 words]`, the last block padded.
    pub(super) fn pack_rows(&self, rows: &Lines, words: &mut [u32]) {
        self.check_numbers(rows);
        let padded = self.padded_rows(rows.count);
        assert!(words.len() >= self.precision.k_blocks(rows.k) * padded * LANES);
        // SAFETY: `of` gave this table, so the instruction set is there; `Lines` checked what is read, and the
        // assertion what is written.
        unsafe { (self.pack_rows)(rows, self.block_rows, padded, words.as_mut_ptr()) }
    }

    /// Packs columns as panels `[panels][k blocks][16 words][16 columns]`, `panel_words` apart, from `words` on.
    ///
    /// With `stream` they are written past the cache, which is faster when they would not stay in it.
    ///
    /// # Safety
    /// The words of these panels' k blocks are writable, and nobody else uses them.
    pub(super) unsafe fn pack_panels(&self, columns: &Lines, panel_words: usize, stream: bool, words: *mut u32) {
        self.check_numbers(columns);
        assert!(columns.count <= LANES || self.precision.k_blocks(columns.k) * BLOCK_WORDS <= panel_words);
        assert!(words.addr().is_multiple_of(64), "panels are aligned");
        // SAFETY: `of` gave this table, so the instruction set is there; `Lines` checked what is read, and the caller
        // promises what is written.
        unsafe { (self.pack_panels)(columns, panel_words, stream, words) }
    }

    fn check_numbers(&self, lines: &Lines) {
        let are_rounded = matches!(lines.data, Numbers::Bf16(_));
        assert!(self.precision == Precision::Bf16 || !are_rounded, "rounded operands of a product in f32");
    }

    /// The product of a packed block of rows, along `k_blocks` of K, with some columns of `b`.
    ///
    /// # Safety
    /// `c` is writable (and readable) at `rows` rows of `columns` columns, `c_stride` apart, and nobody else uses it.
    pub(super) unsafe fn multiply(&self, product: &BlockProduct) {
        // SAFETY: the table proves the instruction set; the caller promises the rest.
        unsafe { (self.multiply)(product) }
    }
}

/// A range cut into pieces of `step`, the last one shorter.
pub(super) fn pieces(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(step.max(1)).map(move |start| start..end.min(start + step))
}
