//! Stored of numbers, in f32, or in bf16 where nothing but products reads them.

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

/// Some rows of [`Stored`], to be written.
pub(super) enum StoredMut<'m> {
    Nothing,
    F32(&'m mut [f32]),
    Bf16(&'m mut [u16]),
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

    /// The rows of each chunk, of `width` numbers.
    pub(super) fn split(&mut self, chunks: &[Chunk], width: usize) -> Vec<StoredMut<'_>> {
        match self {
            Self::Nothing => chunks.iter().map(|_| StoredMut::Nothing).collect(),
            Self::F32(all) => chunks::split(chunks, all, width).into_iter().map(StoredMut::F32).collect(),
            Self::Bf16(all) => chunks::split(chunks, all, width).into_iter().map(StoredMut::Bf16).collect(),
        }
    }

    /// All of it, to be written.
    pub(super) fn all(&mut self) -> StoredMut<'_> {
        match self {
            Self::Nothing => StoredMut::Nothing,
            Self::F32(all) => StoredMut::F32(all),
            Self::Bf16(all) => StoredMut::Bf16(all),
        }
    }

    /// As the operand of a product, rows of `width` numbers.
    pub(super) fn matrix(&self, width: usize) -> Mat<'_> {
        let all = self.numbers();
        Mat::of(all, all.len() / width.max(1), width)
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

impl StoredMut<'_> {
    /// Runs `make` on room for `len` numbers, and keeps what it leaves there.
    pub(super) fn write<T>(&mut self, len: usize, make: impl FnOnce(&mut [f32]) -> T) -> T {
        if let Self::F32(rows) = self {
            return make(rows);
        }
        let mut wide = Buffer::scratch(len);
        let made = make(&mut wide);
        if let Self::Bf16(rows) = self {
            narrow(&wide, rows);
        }
        made
    }

    /// As the operand of a product, rows of `width` numbers.
    pub(super) fn matrix(&self, width: usize) -> Mat<'_> {
        let rows = match self {
            Self::Nothing => unreachable!("rows that nobody reads"),
            Self::F32(rows) => Numbers::F32(rows),
            Self::Bf16(rows) => Numbers::Bf16(rows),
        };
        Mat::of(rows, rows.len() / width.max(1), width)
    }

    /// The room itself.
    pub(super) fn room(&mut self) -> NumbersMut<'_> {
        match self {
            Self::Nothing => unreachable!("rows that nobody reads"),
            Self::F32(rows) => NumbersMut::F32(rows),
            Self::Bf16(rows) => NumbersMut::Bf16(rows),
        }
    }
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
        self.gather_into(width, rows, &mut out.all());
        out
    }

    /// As [`Source::gather`], into room of the same kind.
    pub(super) fn gather_into(&self, width: usize, rows: &[u32], out: &mut StoredMut<'_>) {
        match (self, out) {
            (Self::F32(matrix), StoredMut::F32(out)) => select::gather_rows(matrix, width, rows, out),
            (Self::Bf16(matrix), StoredMut::Bf16(out)) => select::gather_rows(matrix, width, rows, out),
            _ => unreachable!("rows of one kind, room of another"),
        }
    }
}
