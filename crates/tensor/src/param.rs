//! [`Param`]: a named weight with its packed forms, and [`Gradients`], kept apart from it.

use crate::Tensor;
use moebius_kernels::gemm::{Mat, Packed, Precision};
use moebius_kernels::memory::Buffer;
use moebius_kernels::select;
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
    value: Tensor,
    forward: Packs,
    backward: Packs,
}

impl Param {
    /// A weight. `id` is its place among the model's weights, and in [`Gradients`].
    pub fn new(id: usize, name: impl Into<String>, value: Tensor) -> Self {
        Self { id, name: name.into(), value, forward: Packs::default(), backward: Packs::default() }
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
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        self.value.shape()
    }

    /// Changes the numbers in place; packed forms are made anew at their next use.
    pub fn update(&mut self, change: impl FnOnce(&mut [f32])) {
        change(self.value.data_mut());
        self.forward = Packs::default();
        self.backward = Packs::default();
    }

    /// Replaces the numbers.
    ///
    /// # Panics
    /// If the shape differs.
    pub fn set(&mut self, value: Tensor) {
        assert_eq!(value.shape(), self.value.shape(), "{}: shape", self.name);
        *self = Self::new(self.id, std::mem::take(&mut self.name), value);
    }

    /// The matrices W as operands of x Wᵀ: one for `[out, in]`, one an expert for `[experts, out, in]`.
    pub fn packed_forward(&self, precision: Precision) -> &[Packed] {
        self.forward[precision as usize].get_or_init(|| self.pack(precision, true))
    }

    /// The matrices W as operands of dy W.
    pub fn packed_backward(&self, precision: Precision) -> &[Packed] {
        self.backward[precision as usize].get_or_init(|| self.pack(precision, false))
    }

    fn pack(&self, precision: Precision, transposed: bool) -> Vec<Packed> {
        let [.., rows, cols] = *self.shape() else { panic!("{}: a vector is no matrix", self.name) };
        let matrices: Vec<Mat> = (self.value.data().chunks_exact((rows * cols).max(1)))
            .map(|w| Mat::new(w, rows, cols))
            .map(|w| if transposed { w.t() } else { w })
            .collect();
        Packed::pack_many(precision, &matrices)
    }
}

/// The gradients of a model's weights, by [`Param::id`]. Their memory is kept from step to step.
#[derive(Debug, Default)]
pub struct Gradients {
    by_param: Vec<Slot>,
}

#[derive(Debug, Default)]
struct Slot {
    buffer: Option<Buffer<f32>>,
    live: bool,
}

impl Gradients {
    /// No gradients yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The gradient of a weight, if anything reached it.
    pub fn get(&self, id: usize) -> Option<&[f32]> {
        self.by_param.get(id).filter(|slot| slot.live)?.buffer.as_deref()
    }

    /// The buffer of a weight of `len` numbers to add into, and whether it holds nothing yet: then its content is
    /// unspecified, and the caller overwrites all of it.
    pub fn slot(&mut self, id: usize, len: usize) -> (&mut [f32], bool) {
        if self.by_param.len() <= id {
            self.by_param.resize_with(id + 1, Slot::default);
        }
        let slot = &mut self.by_param[id];
        let fresh = !std::mem::replace(&mut slot.live, true);
        let buffer = slot.buffer.get_or_insert_with(|| Buffer::scratch(len));
        assert_eq!(buffer.len(), len, "gradient {id}: length");
        (buffer, fresh)
    }

    /// The buffer of a weight of `len` numbers to add into, zeros if nothing reached it yet.
    pub fn get_mut(&mut self, id: usize, len: usize) -> &mut [f32] {
        let (buffer, fresh) = self.slot(id, len);
        if fresh {
            buffer.fill(0.0);
        }
        buffer
    }

    /// Multiplies all by `factor`.
    pub fn scale(&mut self, factor: f32) {
        for slot in self.by_param.iter_mut().filter(|slot| slot.live) {
            if let Some(buffer) = &mut slot.buffer {
                select::scale(buffer, factor);
            }
        }
    }

    /// The Euclidean norm of all gradients together, summed in the order of ids: the same bits for any thread count.
    pub fn norm(&self) -> f64 {
        (0..self.by_param.len()).filter_map(|id| self.get(id)).map(select::sum_squares).sum::<f64>().sqrt()
    }

    /// Forgets the values, keeps the memory.
    pub fn clear(&mut self) {
        self.by_param.iter_mut().for_each(|slot| slot.live = false);
    }
}
