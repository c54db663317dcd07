//! [`Backprop`]: the gradients of a backward pass while they come together.
//!
//! Gradients are added in place: the first to reach a buffer finds it *fresh* and overwrites, which spares filling it
//! with zeros and lets a matrix product write there directly. An operation that made its gradient in a buffer of its own
//! gives that away instead of copying it.

use crate::{Gradients, Param, Place, Tensor};
use moebius_kernels::gemm::{Beta, Mat, Packed, Precision};
use moebius_kernels::memory::{self, Buffer};
use moebius_kernels::select;

/// Gradients under way, as an operation's closure sees them.
pub struct Backprop<'g> {
    graph: u64,
    by_entry: Vec<Option<Buffer<f32>>>,
    lens: Vec<usize>,
    packed: Option<(Precision, Tensor, Packed)>,
    pub(crate) gradients: &'g mut Gradients,
}

impl<'g> Backprop<'g> {
    /// No gradients yet for a tape of entries of `lens` numbers.
    pub(crate) fn new(graph: u64, lens: Vec<usize>, gradients: &'g mut Gradients) -> Self {
        Self { graph, by_entry: lens.iter().map(|_| None).collect(), lens, packed: None, gradients }
    }

    pub(crate) fn take_entry(&mut self, index: usize) -> Option<Buffer<f32>> {
        self.by_entry[index].take()
    }

    /// What has come to `x` so far, taken away.
    pub(crate) fn take(&mut self, x: impl Into<Place>) -> Option<Buffer<f32>> {
        self.by_entry[x.into().on(self.graph)?].take()
    }

    pub(crate) fn into_leaves(self) -> LeafGradients {
        LeafGradients { graph: self.graph, by_entry: self.by_entry }
    }

    /// Whether a gradient of `x` is wanted; if not, making it may be spared.
    pub fn wants(&self, x: impl Into<Place>) -> bool {
        x.into().on(self.graph).is_some()
    }

    /// The buffer for the gradient of `x` and how to write it: overwrite all of it, or add. `None` if nothing flows
    /// there.
    pub fn of(&mut self, x: impl Into<Place>) -> Option<(&mut [f32], Beta)> {
        let entry = x.into().on(self.graph)?;
        let fresh = self.by_entry[entry].is_none();
        let buffer = self.by_entry[entry].get_or_insert_with(|| Buffer::scratch(self.lens[entry]));
        Some((buffer, if fresh { Beta::Overwrite } else { Beta::Accumulate }))
    }

    /// As [`Backprop::of`], for operations that can only add: zeros where nothing came yet.
    pub fn sum_of(&mut self, x: impl Into<Place>) -> Option<&mut [f32]> {
        let (buffer, beta) = self.of(x)?;
        if beta == Beta::Overwrite {
            memory::clear(buffer);
        }
        Some(buffer)
    }

    /// Adds `gradient` to that of `x`.
    pub fn add(&mut self, x: impl Into<Place>, gradient: &[f32]) {
        match self.of(x) {
            Some((buffer, Beta::Overwrite)) => memory::copy(gradient, buffer),
            Some((buffer, Beta::Accumulate)) => select::add_assign(buffer, gradient),
            None => {}
        }
    }

    /// As [`Backprop::add`], without a copy where nothing came yet.
    pub fn give(&mut self, x: impl Into<Place>, gradient: Buffer<f32>) {
        let Some(entry) = x.into().on(self.graph) else { return };
        match &mut self.by_entry[entry] {
            Some(sum) => select::add_assign(sum, &gradient),
            empty => {
                assert_eq!(gradient.len(), self.lens[entry], "numbers of a gradient");
                *empty = Some(gradient);
            }
        }
    }

    /// `x` `[rows, cols]` as the right operand of a product. The last one is kept: queries, keys and values are
    /// products of one input, whose backwards follow each other.
    pub(crate) fn packed(&mut self, precision: Precision, x: &Tensor, [rows, cols]: [usize; 2]) -> Packed {
        let kept = self.packed.take_if(|(kept, of, _)| *kept != precision || !of.shares_with(x));
        // Its memory is the next one's.
        drop(kept);
        let (_, _, packed) = self
            .packed
            .get_or_insert_with(|| (precision, x.clone(), Packed::pack(precision, Mat::new(x.data(), rows, cols))));
        packed.clone()
    }

    /// The buffer for the gradient of a weight and how to write it.
    pub fn weight(&mut self, param: &Param) -> (&mut [f32], Beta) {
        let (buffer, fresh) = self.gradients.slot(param.id(), param.value().data().len());
        (buffer, if fresh { Beta::Overwrite } else { Beta::Accumulate })
    }

    /// As [`Backprop::weight`], zeros where nothing came yet.
    pub fn weight_sum(&mut self, param: &Param) -> &mut [f32] {
        self.gradients.get_mut(param.id(), param.value().data().len())
    }

    /// Adds `gradient` to that of a weight, without a copy where nothing came yet.
    pub fn give_weight(&mut self, param: &Param, gradient: Buffer<f32>) {
        self.gradients.give(param.id(), gradient);
    }
}

/// The gradients of a graph's leaves.
pub struct LeafGradients {
    graph: u64,
    by_entry: Vec<Option<Buffer<f32>>>,
}

impl LeafGradients {
    /// The gradient of a leaf made by [`Graph::variable`](crate::Graph::variable), if anything reached it.
    pub fn get(&self, leaf: impl Into<Place>) -> Option<&[f32]> {
        self.by_entry.get(leaf.into().on(self.graph)?)?.as_deref()
    }

    /// As [`LeafGradients::get`], taken out.
    pub(crate) fn take(&mut self, leaf: impl Into<Place>) -> Option<Buffer<f32>> {
        self.by_entry.get_mut(leaf.into().on(self.graph)?)?.take()
    }
}
