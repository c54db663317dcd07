//! A view of a matrix of f32 or bf16, as the products take their operands.

use std::ops::Range;

use crate::narrow::Numbers;

/// A matrix in a slice: element `(row, column)` stands at `row * row_stride + column * col_stride`; one stride is 1.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    pub(super) data: Numbers<'a>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A whole row-major matrix.
    ///
    /// # Shapes
    /// `data` `[rows, cols]`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::of(Numbers::F32(data), rows, cols)
    }

    /// A whole row-major matrix; of bf16 for products whose operands are rounded to them.
    ///
    /// # Shapes
    /// `data` `[rows, cols]`.
    pub fn of(data: Numbers<'a>, rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a matrix of {rows} rows and {cols} columns");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// A part of a row-major matrix: `rows` rows of `cols` columns, `row_stride` elements apart, from `data[0]` on.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let end = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
        assert!(cols <= row_stride || rows <= 1, "rows of {cols} columns overlap at stride {row_stride}");
        assert!(end <= data.len(), "{rows} rows of {cols} columns, {row_stride} apart, in {} elements", data.len());
        Self { data: Numbers::F32(data), rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed view.
    #[must_use]
    pub fn t(self) -> Self {
        let Self { data, rows, cols, row_stride, col_stride } = self;
        Self { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Element `(row, column)`.
    pub fn at(&self, row: usize, column: usize) -> f32 {
        assert!(row < self.rows && column < self.cols);
        let at = row * self.row_stride + column * self.col_stride;
        match self.data {
            Numbers::F32(data) => data[at],
            Numbers::Bf16(data) => f32::from_bits(u32::from(data[at]) << 16),
        }
    }

    /// The view of some of the rows.
    #[must_use]
    pub fn row_range(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        Self { data: from(self.data, rows.start * self.row_stride), rows: rows.len(), ..self }
    }

    /// The view of some of the columns.
    #[must_use]
    pub fn col_range(self, cols: Range<usize>) -> Self {
        self.t().row_range(cols).t()
    }
}

/// What stands from `start` on, or nothing if that is behind the end.
fn from(numbers: Numbers, start: usize) -> Numbers {
    numbers.part(start.min(numbers.len())..numbers.len())
}
