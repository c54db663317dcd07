//! [`TensorMap`]: where the numbers of our weights stand in a checkpoint's tensors.

use std::borrow::Cow;
use std::ops::Range;

/// Some rows of one of our weights, and where a tensor of the checkpoint holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// The tensor's name in the file.
    pub file_name: String,
    /// Its shape in the file.
    pub file_shape: Vec<usize>,
    /// The name of our weight.
    pub param: String,
    /// The rows of it, counted over all dimensions but the last (a vector is one row).
    pub rows: Range<usize>,
    /// The length of a row.
    pub cols: usize,
    /// Where in the tensor they are.
    pub view: View,
}

/// A place for each number: row `r` (from the first of the rows on) and column `c` stand at
/// `first + r · row_stride + c · col_stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The first number's place.
    pub first: usize,
    /// From row to row.
    pub row_stride: usize,
    /// From column to column.
    pub col_stride: usize,
}

impl TensorMap {
    /// A tensor that is these rows, one after the other.
    pub fn whole(
        file_name: impl Into<String>,
        file_shape: &[usize],
        param: impl Into<String>,
        rows: Range<usize>,
    ) -> Self {
        let cols = file_shape.iter().product::<usize>() / rows.len().max(1);
        let view = View { first: 0, row_stride: cols, col_stride: 1 };
        Self { file_name: file_name.into(), file_shape: file_shape.to_vec(), param: param.into(), rows, cols, view }
    }

    /// As [`TensorMap::whole`], of some numbers of the tensor.
    pub fn viewed(self, cols: usize, view: View) -> Self {
        Self { cols, view, ..self }
    }

    /// Numbers there are; none if they are too many to count.
    pub(crate) fn elements(&self) -> Option<usize> {
        let whole = self.file_shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n))?;
        self.rows.len().checked_mul(self.cols).filter(|&elements| elements <= whole)
    }

    /// Whether rows follow each other as they do in our weight.
    pub(crate) fn is_contiguous(&self) -> bool {
        self.view.col_stride == 1 && (self.view.row_stride == self.cols || self.rows.len() == 1)
    }

    /// Whether it is all of the tensor, in its order.
    pub(crate) fn is_whole(&self) -> bool {
        self.view.first == 0
            && self.is_contiguous()
            && self.file_shape.iter().product::<usize>() == self.rows.len() * self.cols
    }

    /// The places of a row's numbers in the tensor.
    pub(crate) fn places(&self, row: usize) -> impl Iterator<Item = usize> + use<> {
        let View { first, row_stride, col_stride } = self.view;
        (0..self.cols).map(move |col| first + row * row_stride + col * col_stride)
    }

    /// Gathers the numbers of `size` bytes each from a tensor's bytes.
    pub(crate) fn gather<'b>(&self, bytes: &'b [u8], size: usize) -> Cow<'b, [u8]> {
        let (rows, cols) = (self.rows.len(), self.cols);
        if self.is_contiguous() {
            return Cow::Borrowed(&bytes[self.view.first * size..(self.view.first + rows * cols) * size]);
        }
        // Small squares, so that what is read together stays in the first cache.
        const SIDE: usize = 32;
        let View { first, row_stride, col_stride } = self.view;
        let mut out = vec![0; rows * cols * size];
        for (row_block, col_block) in
            (0..rows).step_by(SIDE).flat_map(|row| (0..cols).step_by(SIDE).map(move |col| (row, col)))
        {
            for row in row_block..rows.min(row_block + SIDE) {
                for col in col_block..cols.min(col_block + SIDE) {
                    let (from, to) = ((first + row * row_stride + col * col_stride) * size, (row * cols + col) * size);
                    out[to..to + size].copy_from_slice(&bytes[from..from + size]);
                }
            }
        }
        Cow::Owned(out)
    }
}

/// The maps of each tensor, in the order in which the tensors come first.
pub(crate) fn group_by_file(maps: Vec<TensorMap>) -> Vec<Vec<TensorMap>> {
    let mut places = std::collections::HashMap::new();
    let mut groups: Vec<Vec<TensorMap>> = Vec::new();
    for map in maps {
        let place = *places.entry(map.file_name.clone()).or_insert(groups.len());
        if place == groups.len() {
            groups.push(Vec::new());
        }
        groups[place].push(map);
    }
    groups
}
