//! [`Graph`]: the tape. An operation computes its result and leaves a closure that turns the result's gradient into
//! gradients of its inputs.
//!
//! Closures borrow the weights (`'p`), so nothing is counted or copied. They keep the numbers that they need, and of
//! values whose numbers they do not need only the [`Place`]. Consuming the graph by [`Graph::backward`] runs them in
//! reverse and drops each one, with the activations that it saved, as soon as it ran.

use crate::{Backprop, Gradients, LeafGradients, Tensor, TensorError};
use moebius_kernels::gemm::Precision;
use moebius_kernels::memory::Buffer;
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where the gradient of a value goes: its place on a tape, without its numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place(Option<Node>);

/// An entry of the tape `graph`. The number of the tape is there to catch values that stray onto another one, where
/// their gradient would reach something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Node {
    graph: u64,
    index: usize,
}

impl Place {
    /// Its entry on the tape `graph`; `None` if nothing flows there.
    ///
    /// # Panics
    /// If it is a place on another tape.
    pub(crate) fn on(self, graph: u64) -> Option<usize> {
        let node = self.0?;
        assert_eq!(
            node.graph, graph,
            "a value of another graph, from which its gradient cannot be reached (captured by a recomputed part?)"
        );
        Some(node.index)
    }
}

impl From<&Var> for Place {
    fn from(x: &Var) -> Self {
        x.place
    }
}

/// A value that may have a place on a tape.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    place: Place,
}

impl Var {
    /// A value without gradient.
    pub fn constant(value: Tensor) -> Self {
        Self { value, place: Place::default() }
    }

    /// Its numbers and shape.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Its numbers and shape, to be changed: without a copy where nobody else holds them.
    pub fn into_value(self) -> Tensor {
        self.value
    }

    /// Its numbers.
    pub fn data(&self) -> &[f32] {
        self.value.data()
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        self.value.shape()
    }

    /// Its dimensions bound by name.
    pub fn dims<const N: usize>(&self) -> Result<[usize; N], TensorError> {
        self.value.dims()
    }

    /// Where its gradient goes: what a closure keeps that needs no more of the value, so that its numbers are freed.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Whether a gradient can flow to it.
    pub fn needs_gradient(&self) -> bool {
        self.place.0.is_some()
    }

    /// The same value cut off from the tape.
    pub fn detach(&self) -> Self {
        Self::constant(self.value.clone())
    }
}

/// Turns the gradient of an operation's output, which it owns, into those of its inputs.
type BackwardStep<'p> = Box<dyn FnOnce(Buffer<f32>, &mut Backprop<'_>) + 'p>;

struct Entry<'p> {
    len: usize,
    backward: Option<BackwardStep<'p>>,
}

/// Records operations while they run, or runs them without a trace.
pub struct Graph<'p> {
    id: u64,
    settings: GraphSettings,
    training: bool,
    tape: Option<RefCell<Vec<Entry<'p>>>>,
}

/// What decides the bits of what runs on a graph.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GraphSettings {
    precision: Precision,
    router_precision: Precision,
    expert_dropout: f32,
    seed: u64,
    keeps_packs: bool,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

impl<'p> Graph<'p> {
    fn new(precision: Precision, training: bool, recording: bool) -> Self {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let settings = GraphSettings {
            precision,
            router_precision: Precision::F32,
            expert_dropout: 0.0,
            seed: 0,
            keeps_packs: true,
        };
        Self { id, settings, training, tape: recording.then(RefCell::default) }
    }

    /// Runs operations and records nothing.
    pub fn inference(precision: Precision) -> Self {
        Self::new(precision, false, false)
    }

    /// Records operations for [`Graph::backward`].
    pub fn training(precision: Precision) -> Self {
        Self::new(precision, true, true)
    }

    /// Runs what will run again on a recording graph, as it will, and records nothing.
    pub fn rehearsal(precision: Precision) -> Self {
        Self::new(precision, true, false)
    }

    /// The same with other settings.
    pub(crate) fn with(self, settings: GraphSettings) -> Self {
        Self { settings, ..self }
    }

    /// What a graph that computes a part of this one again must have in common with it.
    pub(crate) fn settings(&self) -> GraphSettings {
        self.settings
    }

    /// The same, its routers' products and logits rounded to `precision`: to compare with f32, which is how routers work
    /// without this.
    #[must_use]
    pub fn with_routers_in(self, precision: Precision) -> Self {
        let settings = GraphSettings { router_precision: precision, ..self.settings };
        Self { settings, ..self }
    }

    /// The same, with a seed for what is drawn by lot while it runs.
    #[must_use]
    pub fn seeded(self, seed: u64) -> Self {
        let settings = GraphSettings { seed, ..self.settings };
        Self { settings, ..self }
    }

    /// Decides every random number of what runs here; what is computed again draws the same.
    pub fn seed(&self) -> u64 {
        self.settings.seed
    }

    /// The same, for weights that change before they are used again: the packed forms of experts, which are most of a
    /// model, are not kept.
    #[must_use]
    pub fn with_weights_used_once(self) -> Self {
        let settings = GraphSettings { keeps_packs: false, ..self.settings };
        Self { settings, ..self }
    }

    /// Whether packed forms of the weights are worth keeping.
    pub fn keeps_packs(&self) -> bool {
        self.settings.keeps_packs
    }

    /// The precision of matrix operands (accumulators are f32 always).
    pub fn precision(&self) -> Precision {
        self.settings.precision
    }

    /// The same, with this share of the experts' inner activations dropped wherever gradients are wanted.
    #[must_use]
    pub fn with_expert_dropout(self, share: f32) -> Self {
        let settings = GraphSettings { expert_dropout: share, ..self.settings };
        Self { settings, ..self }
    }

    /// The share of the experts' inner activations that is dropped: none unless training.
    pub fn expert_dropout(&self) -> f32 {
        if self.training { self.settings.expert_dropout } else { 0.0 }
    }

    /// The precision of routers' products and logits: f32 but for comparisons.
    pub fn router_precision(&self) -> Precision {
        self.settings.router_precision
    }

    /// Whether operations are recorded.
    pub fn is_recording(&self) -> bool {
        self.tape.is_some()
    }

    /// Whether gradients are wanted of what runs here: because it is recorded, or will be when it is computed again (see
    /// [`Graph::checkpoint`]). What cannot be trained refuses by this.
    pub fn is_training(&self) -> bool {
        self.training
    }

    /// A leaf whose gradient [`Graph::backward`] gives out.
    pub fn variable(&self, value: Tensor) -> Var {
        let place = self.push(value.data().len(), None);
        Var { value, place }
    }

    /// Enters an operation that has weights of its own: recorded whatever its inputs. `backward` owns the gradient of
    /// the output.
    pub fn record(&self, output: Tensor, backward: impl FnOnce(Buffer<f32>, &mut Backprop<'_>) + 'p) -> Var {
        if !self.is_recording() {
            return Var::constant(output);
        }
        let place = self.push(output.data().len(), Some(Box::new(backward)));
        Var { value: output, place }
    }

    /// Enters an operation without weights: recorded only if one of its inputs is.
    ///
    /// # Panics
    /// If an input stands on the tape of another graph.
    pub fn record_from(
        &self,
        inputs: &[&Var],
        output: Tensor,
        backward: impl FnOnce(Buffer<f32>, &mut Backprop<'_>) + 'p,
    ) -> Var {
        let places: Vec<Place> = inputs.iter().map(|input| input.place).collect();
        self.record_from_places(&places, output, backward)
    }

    /// As [`Graph::record_from`], for an operation that has taken its inputs apart.
    pub(crate) fn record_from_places(
        &self,
        inputs: &[Place],
        output: Tensor,
        backward: impl FnOnce(Buffer<f32>, &mut Backprop<'_>) + 'p,
    ) -> Var {
        let recorded = inputs.iter().filter(|input| input.on(self.id).is_some()).count();
        if recorded > 0 { self.record(output, backward) } else { Var::constant(output) }
    }

    fn push(&self, len: usize, backward: Option<BackwardStep<'p>>) -> Place {
        Place(self.tape.as_ref().map(|tape| {
            let mut tape = tape.borrow_mut();
            tape.push(Entry { len, backward });
            Node { graph: self.id, index: tape.len() - 1 }
        }))
    }

    /// Adds d `loss` / d weight to `gradients`, and gives the gradients of the leaves.
    ///
    /// # Panics
    /// If `loss` is not one number.
    pub fn backward(self, loss: &Var, gradients: &mut Gradients) -> LeafGradients {
        assert_eq!(loss.data().len(), 1, "the loss is one number, found shape {:?}", loss.shape());
        self.backward_from(&[(loss, &[1.0])], gradients)
    }

    /// As [`Graph::backward`], from given gradients of several values.
    pub fn backward_from(self, seeds: &[(&Var, &[f32])], gradients: &mut Gradients) -> LeafGradients {
        self.backward_with(gradients, |backprop| seeds.iter().for_each(|&(value, seed)| backprop.add(value, seed)))
    }

    /// As [`Graph::backward`], from the gradients that `seed` lays down.
    pub(crate) fn backward_with(
        self,
        gradients: &mut Gradients,
        seed: impl FnOnce(&mut Backprop<'_>),
    ) -> LeafGradients {
        let tape = self.tape.map(RefCell::into_inner).unwrap_or_default();
        let mut backprop = Backprop::new(self.id, tape.iter().map(|entry| entry.len).collect(), gradients);
        seed(&mut backprop);
        for (index, entry) in tape.into_iter().enumerate().rev() {
            if let Some(step) = entry.backward
                && let Some(gradient) = backprop.take_entry(index)
            {
                step(gradient, &mut backprop);
            }
        }
        backprop.into_leaves()
    }
}

#[cfg(test)]
mod tests;
