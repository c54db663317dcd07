//! [`Param`]: a named weight with its packed forms, and [`Gradients`], kept apart from it.

use crate::{Tensor, TensorError};
use moebius_kernels::gemm::{Beta, Mat, Packed, Precision, grouped_matmul};
use moebius_kernels::memory::{self, Buffer};
use moebius_kernels::parallel;
use moebius_kernels::quantised::{QuantisedMatrix, grouped_quantised_matmul};
use moebius_kernels::select;
use std::ops::Deref;
use std::sync::OnceLock;

/// Packed forms of one weight, one `Packed` a matrix, by precision.
type Packs = [OnceLock<Vec<Packed>>; 2];

/// A weight of a model: `[out, in]`, a stack `[experts, out, in]`, or a vector.
///
/// Packing for the matrix products happens at first use and lasts until the weight changes.
#[derive(Debug)]
pub struct Param {
    id: usize,
    name: String,
    shape: Vec<usize>,
    numbers: Numbers,
    forward: Packs,
    backward: Packs,
}

/// So many rows of a frozen embedding are decoded by one thread.
const SERIAL_ROWS: usize = 4;

/// How a weight is held.
#[derive(Debug)]
enum Numbers {
    Dense(Tensor),
    Frozen(Frozen),
}

/// The matrices of a weight that is only run: one, or one an expert, as the products read them and in no other form.
#[derive(Debug)]
pub enum Frozen {
    /// In f32 or bf16.
    Packed(Vec<Packed>),
    /// In a block format; the products quantise what they multiply with, whatever the precision asked for.
    Quantised(Vec<QuantisedMatrix>),
}

impl Frozen {
    /// Outputs and inputs of each matrix.
    fn dims(&self) -> Vec<[usize; 2]> {
        match self {
            Self::Packed(matrices) => matrices.iter().map(|w| [w.n(), w.k()]).collect(),
            Self::Quantised(matrices) => matrices.iter().map(|w| [w.n(), w.k()]).collect(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Packed(matrices) => matrices.iter().map(Packed::bytes).sum(),
            Self::Quantised(matrices) => matrices.iter().map(|matrix| matrix.bytes().len()).sum(),
        }
    }
}

impl Param {
    /// A weight. `id` is its place among the model's weights, and in [`Gradients`].
    pub fn new(id: usize, name: impl Into<String>, value: Tensor) -> Self {
        let (shape, numbers) = (value.shape().to_vec(), Numbers::Dense(value));
        Self { id, name: name.into(), shape, numbers, forward: Packs::default(), backward: Packs::default() }
    }

    /// A weight without its numbers, of which only name and shape are asked: for counting.
    pub fn shaped(name: impl Into<String>, shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), ..Self::new(0, name, Tensor::zeros(&[0])) }
    }

    /// A weight of which only products are asked.
    ///
    /// # Errors
    /// Matrices of another shape than `[out, in]` or `[experts, out, in]` says.
    pub fn frozen(id: usize, name: impl Into<String>, shape: &[usize], matrices: Frozen) -> Result<Self, TensorError> {
        let wanted = match *shape {
            [out, inner] => vec![[out, inner]],
            [experts, out, inner] => vec![[out, inner]; experts],
            _ => return Err(TensorError::Rank { wanted: 2, found: shape.to_vec() }),
        };
        let dims = matrices.dims();
        if dims != wanted {
            let (wanted, found) = (wanted.concat(), dims.concat());
            return Err(TensorError::Shape { what: "packed matrices", wanted, found });
        }
        let (forward, backward) = (Packs::default(), Packs::default());
        Ok(Self { id, name: name.into(), shape: shape.to_vec(), numbers: Numbers::Frozen(matrices), forward, backward })
    }

    /// Its place among the model's weights.
    pub fn id(&self) -> usize {
        self.id
    }

    /// Gives it another place; for models that count their weights once all are there.
    pub fn set_id(&mut self, id: usize) {
        self.id = id;
    }

    /// Its name within the model.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its numbers.
    ///
    /// # Panics
    /// If it is [frozen](Param::is_frozen): then it has only products.
    pub fn value(&self) -> &Tensor {
        match &self.numbers {
            Numbers::Dense(value) => value,
            Numbers::Frozen(_) => panic!("{}: a frozen weight has only products", self.name),
        }
    }

    /// Its matrices, if only products are asked of it.
    pub fn frozen_matrices(&self) -> Option<&Frozen> {
        match &self.numbers {
            Numbers::Dense(_) => None,
            Numbers::Frozen(matrices) => Some(matrices),
        }
    }

    /// Whether only products are asked of it.
    pub fn is_frozen(&self) -> bool {
        matches!(self.numbers, Numbers::Frozen(_))
    }

    /// An error if it is frozen: for operations that need its gradient.
    ///
    /// # Errors
    /// Its name.
    pub fn check_trainable(&self) -> Result<(), TensorError> {
        if self.is_frozen() { Err(TensorError::Frozen(self.name.clone())) } else { Ok(()) }
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The dimensions bound by name.
    ///
    /// # Errors
    /// Another number of dimensions.
    pub fn dims<const N: usize>(&self) -> Result<[usize; N], TensorError> {
        <[usize; N]>::try_from(&self.shape[..]).map_err(|_| TensorError::Rank { wanted: N, found: self.shape.clone() })
    }

    /// How many numbers it has.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The bytes that it is held in, packed forms for training left out.
    pub fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::Dense(value) => size_of_val::<[f32]>(value.data()),
            Numbers::Frozen(matrices) => matrices.bytes(),
        }
    }

    /// Changes the numbers in place; packed forms are made anew at their next use.
    ///
    /// # Panics
    /// If it is frozen.
    pub fn update(&mut self, change: impl FnOnce(&mut [f32])) {
        match &mut self.numbers {
            Numbers::Dense(value) => change(value.data_mut()),
            Numbers::Frozen(_) => panic!("{}: a frozen weight does not change", self.name),
        }
        self.forward = Packs::default();
        self.backward = Packs::default();
    }

    /// Replaces the numbers.
    ///
    /// # Panics
    /// If the shape differs.
    pub fn set(&mut self, value: Tensor) {
        assert_eq!(value.shape(), self.shape, "{}: shape", self.name);
        *self = Self::new(self.id, std::mem::take(&mut self.name), value);
    }

    /// y = x Wᵀ for a weight of one matrix.
    ///
    /// # Shapes
    /// x `[rows, in]`, y `[rows, out]`.
    pub fn product(&self, precision: Precision, x: &[f32], y: &mut [f32]) {
        let rows = y.len() / self.shape[self.shape.len() - 2].max(1);
        self.grouped_product(precision, x, None, &[0, rows], y);
    }

    /// `y[i] = W[g] x[i]` for the rows `i` of each group `g`; with `source`, `y[i] = W[g] x[source[i]]`.
    ///
    /// # Shapes
    /// x `[tokens, in]`, source `[rows]`, offsets `[experts + 1]`, y `[rows, out]`.
    pub fn grouped_product(
        &self,
        precision: Precision,
        x: &[f32],
        source: Option<&[u32]>,
        offsets: &[usize],
        y: &mut [f32],
    ) {
        let packed = match &self.numbers {
            Numbers::Frozen(Frozen::Quantised(matrices)) => {
                return grouped_quantised_matmul(x, source, offsets, matrices, y);
            }
            Numbers::Frozen(Frozen::Packed(matrices)) => matrices,
            Numbers::Dense(_) => self.packed_forward(precision),
        };
        let inner = self.shape[self.shape.len() - 1];
        let gathered = source.map(|source| {
            let mut rows = Buffer::scratch(source.len() * inner);
            select::gather_rows(x, inner, source, &mut rows);
            rows
        });
        let x = gathered.as_deref().unwrap_or(x);
        let rows = x.len() / inner.max(1);
        grouped_matmul(Mat::new(x, rows, inner), offsets, packed, y, Beta::Overwrite);
    }

    /// Rows of a weight of one matrix, as an embedding's.
    ///
    /// # Shapes
    /// ids `[rows]` below `out`, result `[rows, in]`.
    pub fn rows(&self, ids: &[u32]) -> Buffer<f32> {
        let width = self.shape[self.shape.len() - 1];
        let mut rows = Buffer::scratch(ids.len() * width);
        match &self.numbers {
            Numbers::Dense(value) => select::gather_rows(value.data(), width, ids, &mut rows),
            Numbers::Frozen(matrices) => {
                parallel::rows_mut(&mut rows, width, 1, SERIAL_ROWS * width, |first, row| match matrices {
                    Frozen::Packed(matrices) => matrices[0].column(ids[first] as usize, row),
                    Frozen::Quantised(matrices) => matrices[0].row(ids[first] as usize, row),
                });
            }
        }
        rows
    }

    /// The matrices W as operands of x Wᵀ: one for `[out, in]`, one an expert for `[experts, out, in]`.
    pub fn packed_forward(&self, precision: Precision) -> &[Packed] {
        self.forward[precision as usize].get_or_init(|| self.pack(precision, true))
    }

    /// The matrices W as operands of dy W.
    pub fn packed_backward(&self, precision: Precision) -> &[Packed] {
        self.backward[precision as usize].get_or_init(|| self.pack(precision, false))
    }

    /// As [`Param::packed_forward`]; unless the weight `keeps` them, packed forms that it had not are gone after this use.
    pub fn lend_forward(&self, precision: Precision, keeps: bool) -> LentPacks<'_> {
        match self.forward[precision as usize].get() {
            None if !keeps => LentPacks::Made(self.pack(precision, true)),
            _ => LentPacks::Kept(self.packed_forward(precision)),
        }
    }

    /// As [`Param::lend_forward`] of [`Param::packed_backward`].
    pub fn lend_backward(&self, precision: Precision, keeps: bool) -> LentPacks<'_> {
        match self.backward[precision as usize].get() {
            None if !keeps => LentPacks::Made(self.pack(precision, false)),
            _ => LentPacks::Kept(self.packed_backward(precision)),
        }
    }

    fn pack(&self, precision: Precision, transposed: bool) -> Vec<Packed> {
        let [.., rows, cols] = *self.shape() else { panic!("{}: a vector is no matrix", self.name) };
        let matrices: Vec<Mat> = (self.value().data().chunks_exact((rows * cols).max(1)))
            .map(|w| Mat::new(w, rows, cols))
            .map(|w| if transposed { w.t() } else { w })
            .collect();
        Packed::pack_many(precision, &matrices)
    }
}

/// Packed forms of a weight: the weight's own, or made for one use.
#[derive(Debug)]
pub enum LentPacks<'p> {
    /// Those that the weight keeps.
    Kept(&'p [Packed]),
    /// Gone with this value.
    Made(Vec<Packed>),
}

impl Deref for LentPacks<'_> {
    type Target = [Packed];

    fn deref(&self) -> &[Packed] {
        match self {
            Self::Kept(packed) => packed,
            Self::Made(packed) => packed,
        }
    }
}

/// The gradients of a model's weights, by [`Param::id`].
///
/// A forward pass has activations and no gradients yet, the end of a backward pass gradients and no activations any more:
/// cleared gradients give their memory back to the pool, where the next forward pass finds it.
#[derive(Debug, Default)]
pub struct Gradients {
    by_param: Vec<Option<Buffer<f32>>>,
}

impl Gradients {
    /// No gradients yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The gradient of a weight, if anything reached it.
    pub fn get(&self, id: usize) -> Option<&[f32]> {
        self.by_param.get(id)?.as_deref()
    }

    fn entry(&mut self, id: usize) -> &mut Option<Buffer<f32>> {
        if self.by_param.len() <= id {
            self.by_param.resize_with(id + 1, || None);
        }
        &mut self.by_param[id]
    }

    /// The buffer of a weight of `len` numbers to add into, and whether it holds nothing yet: then its content is
    /// unspecified, and the caller overwrites all of it.
    pub fn slot(&mut self, id: usize, len: usize) -> (&mut [f32], bool) {
        let entry = self.entry(id);
        let fresh = entry.is_none();
        let buffer = entry.get_or_insert_with(|| Buffer::scratch(len));
        assert_eq!(buffer.len(), len, "gradient {id}: length");
        (buffer, fresh)
    }

    /// The buffer of a weight of `len` numbers to add into, zeros if nothing reached it yet.
    pub fn get_mut(&mut self, id: usize, len: usize) -> &mut [f32] {
        let (buffer, fresh) = self.slot(id, len);
        if fresh {
            memory::clear(buffer);
        }
        buffer
    }

    /// Adds `gradient` to that of a weight; if nothing reached it yet, takes the buffer instead of copying it.
    pub fn give(&mut self, id: usize, gradient: Buffer<f32>) {
        if self.get(id).is_some() {
            select::add_assign(self.slot(id, gradient.len()).0, &gradient);
        } else {
            *self.entry(id) = Some(gradient);
        }
    }

    /// Multiplies all by `factor`.
    pub fn scale(&mut self, factor: f32) {
        self.by_param.iter_mut().flatten().for_each(|buffer| select::scale(buffer, factor));
    }

    /// The Euclidean norm of all gradients together, summed in the order of ids: the same bits for any thread count.
    pub fn norm(&self) -> f64 {
        (0..self.by_param.len()).filter_map(|id| self.get(id)).map(select::sum_squares).sum::<f64>().sqrt()
    }

    /// Forgets the values and gives the memory back.
    pub fn clear(&mut self) {
        self.by_param.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moebius_kernels::gemm::matmul_packed;

    #[test]
    fn packs_last_until_the_weight_changes() {
        let mut param = Param::new(0, "w", Tensor::new(&[2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        let address = |param: &Param| param.packed_forward(Precision::F32).as_ptr();
        let first = address(&param);
        assert_eq!(address(&param), first);
        let product = |param: &Param| {
            let mut y = [0.0; 2];
            let x = Mat::new(&[1.0, 10.0, 100.0], 1, 3);
            matmul_packed(x, &param.packed_forward(Precision::F32)[0], &mut y, Beta::Overwrite);
            let mut dx = [0.0; 3];
            let dy = Mat::new(&[1.0, 10.0], 1, 2);
            matmul_packed(dy, &param.packed_backward(Precision::F32)[0], &mut dx, Beta::Overwrite);
            (y, dx)
        };
        assert_eq!(product(&param), ([321.0, 654.0], [41.0, 52.0, 63.0]));
        param.update(|w| w.iter_mut().for_each(|w| *w = -*w));
        assert_eq!(product(&param), ([-321.0, -654.0], [-41.0, -52.0, -63.0]));
        param.set(Tensor::zeros(&[2, 3]));
        assert_eq!(product(&param), ([0.0; 2], [0.0; 3]));
    }

    #[test]
    fn packs_for_one_use_are_not_kept() {
        let param = Param::new(0, "w", Tensor::new(&[2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        assert!(matches!(param.lend_backward(Precision::Bf16, false), LentPacks::Made(_)));
        assert!(matches!(param.lend_backward(Precision::Bf16, false), LentPacks::Made(_)));
        let kept = param.packed_backward(Precision::Bf16);
        assert_eq!(param.lend_backward(Precision::Bf16, false).as_ptr(), kept.as_ptr());
    }

    #[test]
    fn a_stack_has_a_pack_for_each_matrix() {
        let param = Param::new(0, "w", Tensor::zeros(&[3, 4, 5]));
        for (packs, k, n) in
            [(param.packed_forward(Precision::Bf16), 5, 4), (param.packed_backward(Precision::F32), 4, 5)]
        {
            assert_eq!(packs.iter().map(|pack| (pack.k(), pack.n())).collect::<Vec<_>>(), [(k, n); 3]);
        }
    }

    #[test]
    fn a_shared_value_is_not_changed_behind_its_holders_back() {
        let mut param = Param::new(0, "w", Tensor::scalar(1.0));
        let kept = param.value().clone();
        param.update(|w| w[0] = 2.0);
        assert_eq!((kept.data(), param.value().data()), (&[1.0][..], &[2.0][..]));
    }

    #[test]
    fn gradients_start_fresh() {
        let mut gradients = Gradients::new();
        assert_eq!(gradients.get(2), None);
        gradients.slot(2, 2).0.copy_from_slice(&[3.0, 0.0]);
        assert!(!gradients.slot(2, 2).1, "no longer fresh");
        gradients.get_mut(0, 1)[0] = 4.0;
        assert_eq!((gradients.get(0), gradients.get(1)), (Some(&[4.0][..]), None));
        assert_eq!(gradients.norm(), 5.0);
        gradients.scale(2.0);
        assert_eq!((gradients.get(2), gradients.norm()), (Some(&[6.0, 0.0][..]), 10.0));

        gradients.clear();
        assert_eq!((gradients.get(2), gradients.norm()), (None, 0.0));
        assert_eq!(gradients.get_mut(2, 2), [0.0; 2], "nothing is left of the step before");
    }

    #[test]
    fn a_given_buffer_is_taken_or_added() {
        let mut gradients = Gradients::new();
        let buffer = Buffer::from_slice(&[1.0, 2.0]);
        let address = buffer.as_ptr();
        gradients.give(1, buffer);
        assert_eq!(gradients.get(1).map(<[f32]>::as_ptr), Some(address));
        gradients.give(1, Buffer::from_slice(&[10.0, 10.0]));
        assert_eq!(gradients.get(1), Some(&[11.0, 12.0][..]));
        gradients.clear();
        gradients.give(1, Buffer::from_slice(&[5.0, 5.0]));
        assert_eq!(gradients.get(1), Some(&[5.0, 5.0][..]));
    }
}
