//! Matrices that a bank makes for itself, in f32, or in bf16 where nothing but products reads them.

use super::chunks::{self, Chunk};
use moebius_kernels::gemm::{Mat, Precision};
use moebius_kernels::memory::Buffer;
use moebius_kernels::narrow::{Numbers, NumbersMut, narrow, widen};
use moebius_kernels::select;
use std::ops::Range;

/// A matrix of its own.
///
/// Products in bf16 round their operands; what is written for them alone is rounded when written, to the same bits, with
/// half the memory and half the traffic. Gates and ups, the most that a layer keeps for the backward pass, are kept as
/// bf16 too: slopes are those of the rounded numbers, while the forward pass goes on with what was not rounded.
#[derive(Debug)]
pub(super) enum Stored {
    /// Nobody will read it.
    Nothing,
    F32(Buffer<f32>),
    Bf16(Buffer<u16>),
}

/// A matrix to gather rows from.
pub(super) enum Source<'m> {
    F32(&'m [f32]),
    Bf16(Buffer<u16>),
}

impl Stored {
    /// Room for `len` numbers for products in `precision`, if there `is_needed`.
    pub(super) fn scratch(is_needed: bool, precision: Precision, len: usize) -> Self {
        match precision {
            _ if !is_needed => Self::Nothing,
            Precision::F32 => Self::F32(Buffer::scratch(len)),
            Precision::Bf16 => Self::Bf16(Buffer::scratch(len)),
        }
    }

    /// The rows of each chunk, of `width` numbers, to be written.
    pub(super) fn split(&mut self, chunks: &[Chunk], width: usize) -> Vec<Option<NumbersMut<'_>>> {
        match self {
            Self::Nothing => chunks.iter().map(|_| None).collect(),
            Self::F32(all) => chunks::split(chunks, all, width).into_iter().map(NumbersMut::F32).map(Some).collect(),
            Self::Bf16(all) => chunks::split(chunks, all, width).into_iter().map(NumbersMut::Bf16).map(Some).collect(),
        }
    }

    /// All of it, to be written, if somebody will read it.
    pub(super) fn all(&mut self) -> Option<NumbersMut<'_>> {
        match self {
            Self::Nothing => None,
            Self::F32(all) => Some(NumbersMut::F32(all)),
            Self::Bf16(all) => Some(NumbersMut::Bf16(all)),
        }
    }

    /// As the operand of a product, rows of `width` numbers.
    pub(super) fn matrix(&self, width: usize) -> Mat<'_> {
        matrix(self.numbers(), width)
    }

    /// All of it, to be read.
    pub(super) fn numbers(&self) -> Numbers<'_> {
        match self {
            Self::Nothing => unreachable!("rows that nobody reads"),
            Self::F32(all) => Numbers::F32(all),
            Self::Bf16(all) => Numbers::Bf16(all),
        }
    }

    /// Runs `read` on some of the numbers.
    pub(super) fn read<T>(&self, range: Range<usize>, read: impl FnOnce(&[f32]) -> T) -> T {
        match self {
            Self::Nothing => unreachable!("rows that nobody reads"),
            Self::F32(all) => read(&all[range]),
            Self::Bf16(all) => {
                let mut wide = Buffer::scratch(range.len());
                widen(&all[range], &mut wide);
                read(&wide)
            }
        }
    }
}

/// The operand of a product, rows of `width` numbers.
pub(super) fn matrix(numbers: Numbers<'_>, width: usize) -> Mat<'_> {
    Mat::of(numbers, numbers.len() / width.max(1), width)
}

impl<'m> Source<'m> {
    /// A matrix of which products in `precision` will read rows.
    pub(super) fn new(precision: Precision, matrix: &'m [f32]) -> Self {
        match precision {
            Precision::F32 => Self::F32(matrix),
            Precision::Bf16 => {
                let mut rounded = Buffer::scratch(matrix.len());
                narrow(matrix, &mut rounded);
                Self::Bf16(rounded)
            }
        }
    }

    /// Some of its rows, of `width` numbers.
    pub(super) fn gather(&self, width: usize, rows: &[u32]) -> Stored {
        let precision = if matches!(self, Self::F32(_)) { Precision::F32 } else { Precision::Bf16 };
        let mut out = Stored::scratch(true, precision, rows.len() * width);
        out.all().iter_mut().for_each(|out| self.gather_into(width, rows, out));
        out
    }

    /// As [`Source::gather`], into room of the same kind.
    pub(super) fn gather_into(&self, width: usize, rows: &[u32], out: &mut NumbersMut<'_>) {
        match (self, out) {
            (Self::F32(matrix), NumbersMut::F32(out)) => select::gather_rows(matrix, width, rows, out),
            (Self::Bf16(matrix), NumbersMut::Bf16(out)) => select::gather_rows(matrix, width, rows, out),
            _ => unreachable!("rows of one kind, room of another"),
        }
    }
}
