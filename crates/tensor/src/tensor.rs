//! [`Tensor`]: a shape and shared f32 numbers, row-major.

use moebius_kernels::memory::Buffer;
use std::sync::Arc;
use thiserror::Error;

/// A shape that does not fit what is done with it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TensorError {
    /// Another number of dimensions than bound by name.
    #[error("wanted {wanted} dimensions, found shape {found:?}")]
    Rank {
        /// Dimensions wanted.
        wanted: usize,
        /// The shape found.
        found: Vec<usize>,
    },
    /// Another shape than the operation takes.
    #[error("{what}: wanted shape {wanted:?}, found {found:?}")]
    Shape {
        /// Which operand.
        what: &'static str,
        /// The shape wanted.
        wanted: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A weight that only products are made with is asked for its gradient.
    #[error("{0} is held for running only: load the model for training to have gradients")]
    Frozen(String),
}

/// Numbers with a shape. Cloning shares them; [`Tensor::data_mut`] copies first if they are shared.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Arc<Buffer<f32>>,
}

impl Tensor {
    /// A tensor of `shape`.
    ///
    /// # Panics
    /// If the shape asks for another number of elements.
    pub fn new(shape: &[usize], data: impl Into<Buffer<f32>>) -> Self {
        let data = data.into();
        assert_eq!(shape.iter().product::<usize>(), data.len(), "elements of shape {shape:?}");
        Self { shape: shape.to_vec(), data: Arc::new(data) }
    }

    /// Zeros.
    pub fn zeros(shape: &[usize]) -> Self {
        Self::new(shape, Buffer::zeroed(shape.iter().product()))
    }

    /// One number, of shape `[1]`.
    pub fn scalar(value: f32) -> Self {
        Self::new(&[1], Buffer::from_slice(&[value]))
    }

    /// The lengths of the dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The numbers, row-major.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The numbers, to be changed; copied first if another tensor shares them.
    pub fn data_mut(&mut self) -> &mut [f32] {
        Arc::<Buffer<f32>>::make_mut(&mut self.data)
    }

    /// Whether both hold the same numbers in the same shape, not just equal ones.
    pub(crate) fn shares_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.data, &other.data) && self.shape == other.shape
    }

    /// Tensors that share the numbers.
    #[cfg(test)]
    pub(crate) fn holders(&self) -> usize {
        Arc::strong_count(&self.data)
    }

    /// The dimensions bound by name: `let [tokens, hidden] = x.dims()?`.
    pub fn dims<const N: usize>(&self) -> Result<[usize; N], TensorError> {
        <[usize; N]>::try_from(&self.shape[..]).map_err(|_| TensorError::Rank { wanted: N, found: self.shape.clone() })
    }

    /// The same numbers under another shape.
    ///
    /// # Panics
    /// If the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), self.data.len(), "elements of shape {shape:?}");
        Self { shape: shape.to_vec(), data: self.data.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_until_one_changes() {
        let first = Tensor::new(&[2, 2], vec![1.0, 2.0, 3.0, 4.0]);
        let mut second = first.reshape(&[4]);
        assert_eq!(first.data().as_ptr(), second.data().as_ptr());
        second.data_mut()[0] = 9.0;
        assert_eq!((first.data()[0], second.data()[0]), (1.0, 9.0));
        let address = second.data().as_ptr();
        second.data_mut()[0] = 8.0;
        assert_eq!(second.data().as_ptr(), address, "copied only when shared");
    }

    #[test]
    fn another_rank_is_an_error() {
        let x = Tensor::zeros(&[2, 3]);
        assert_eq!(x.dims(), Ok([2, 3]));
        assert_eq!(x.dims::<3>().unwrap_err().to_string(), "wanted 3 dimensions, found shape [2, 3]");
    }
}
