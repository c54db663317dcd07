//! [`Graph`]: the tape. An operation computes its result and leaves a closure that turns the result's gradient into
//! gradients of its inputs.
//!
//! Closures borrow the weights (`'p`), so nothing is counted or copied; consuming the graph by [`Graph::backward`] runs
//! them in reverse and drops each one, with the activations that it saved, as soon as it ran. Gradients are added in
//! place: the first to reach a buffer finds it *fresh* and overwrites, which spares filling it with zeros.

use crate::{Gradients, Param, Tensor, TensorError};
use moebius_kernels::gemm::{Beta, Precision};
use moebius_kernels::memory::Buffer;
use moebius_kernels::select;
use std::cell::RefCell;

/// A value that may have a place on a tape.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    node: Option<usize>,
}

impl Var {
    /// A value without gradient.
    pub fn constant(value: Tensor) -> Self {
        Self { value, node: None }
    }

    /// Its numbers and shape.
    pub fn value(&self) -> &Tensor {
        &self.value
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

    /// Whether a gradient can flow to it.
    pub fn needs_gradient(&self) -> bool {
        self.node.is_some()
    }

    /// The same value cut off from the tape.
    pub fn detach(&self) -> Self {
        Self::constant(self.value.clone())
    }
}

type BackwardStep<'p> = Box<dyn FnOnce(&[f32], &mut Backprop<'_>) + 'p>;

struct Node<'p> {
    len: usize,
    backward: Option<BackwardStep<'p>>,
}

/// Records operations while they run, or runs them without a trace.
pub struct Graph<'p> {
    precision: Precision,
    nodes: Option<RefCell<Vec<Node<'p>>>>,
}

impl<'p> Graph<'p> {
    /// Runs operations and records nothing.
    pub fn inference(precision: Precision) -> Self {
        Self { precision, nodes: None }
    }

    /// Records operations for [`Graph::backward`].
    pub fn training(precision: Precision) -> Self {
        Self { precision, nodes: Some(RefCell::default()) }
    }

    /// The precision of matrix operands (accumulators are f32 always).
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Whether operations are recorded.
    pub fn is_recording(&self) -> bool {
        self.nodes.is_some()
    }

    /// A leaf whose gradient [`Graph::backward`] gives out.
    pub fn variable(&self, value: Tensor) -> Var {
        let node = self.push(value.shape().iter().product(), None);
        Var { value, node }
    }

    /// Enters an operation that has weights of its own: recorded whatever its inputs.
    pub fn record(&self, output: Tensor, backward: impl FnOnce(&[f32], &mut Backprop<'_>) + 'p) -> Var {
        let node = self.push(output.data().len(), Some(Box::new(backward)));
        Var { value: output, node }
    }

    /// Enters an operation without weights: recorded only if one of its inputs is.
    pub fn record_from(
        &self,
        inputs: &[&Var],
        output: Tensor,
        backward: impl FnOnce(&[f32], &mut Backprop<'_>) + 'p,
    ) -> Var {
        if inputs.iter().any(|input| input.needs_gradient()) {
            self.record(output, backward)
        } else {
            Var::constant(output)
        }
    }

    fn push(&self, len: usize, backward: Option<BackwardStep<'p>>) -> Option<usize> {
        let mut nodes = self.nodes.as_ref()?.borrow_mut();
        nodes.push(Node { len, backward });
        Some(nodes.len() - 1)
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
        let nodes = self.nodes.map(RefCell::into_inner).unwrap_or_default();
        let lens = nodes.iter().map(|node| node.len).collect::<Vec<_>>();
        let mut backprop = Backprop { by_node: lens.iter().map(|_| None).collect(), lens, gradients };
        for (value, gradient) in seeds {
            backprop.add(value, gradient);
        }
        for (id, node) in nodes.into_iter().enumerate().rev() {
            if let Some(step) = node.backward
                && let Some(gradient) = backprop.by_node[id].take()
            {
                step(&gradient, &mut backprop);
            }
        }
        LeafGradients { by_node: backprop.by_node }
    }

    /// Runs `f` without keeping its activations, and once more when the gradient comes: memory for time
    /// (Chen et al. 2016). Gives what `f` gives; gradients are the same bits as without.
    pub fn checkpoint<E>(
        &self,
        x: &Var,
        f: impl Fn(&Graph<'p>, &Var) -> Result<Vec<Var>, E> + 'p,
    ) -> Result<Vec<Var>, E> {
        if !self.is_recording() {
            return f(self, x);
        }
        let outputs = f(&Graph::inference(self.precision), &x.detach())?;
        let shared = std::rc::Rc::new(RefCell::new(vec![None; outputs.len()]));
        let (precision, input) = (self.precision, x.clone());
        // The node below the outputs runs after all of them: it holds the recomputation.
        let collected = shared.clone();
        let anchor = self.record(Tensor::scalar(0.0), move |_, back| {
            let inner = Graph::training(precision);
            let leaf = inner.variable(input.value().clone());
            let Ok(again) = f(&inner, &leaf) else { unreachable!("it succeeded on the same input") };
            let collected = collected.take();
            let seeds: Vec<(&Var, &[f32])> = again
                .iter()
                .zip(&collected)
                .filter_map(|(y, d): (_, &Option<Vec<f32>>)| Some((y, d.as_deref()?)))
                .collect();
            let leaves = inner.backward_from(&seeds, back.gradients);
            if let Some(dx) = leaves.get(&leaf) {
                back.add(&input, dx);
            }
        });
        Ok(outputs
            .into_iter()
            .enumerate()
            .map(|(i, y)| {
                let (shared, anchor) = (shared.clone(), anchor.clone());
                self.record(y.value().clone(), move |dy, back| {
                    shared.borrow_mut()[i] = Some(dy.to_vec());
                    back.add(&anchor, &[0.0]);
                })
            })
            .collect())
    }
}

/// Gradients under way, as an operation's closure sees them.
pub struct Backprop<'g> {
    by_node: Vec<Option<Buffer<f32>>>,
    lens: Vec<usize>,
    gradients: &'g mut Gradients,
}

impl Backprop<'_> {
    /// The buffer for the gradient of `x` and how to write it: overwrite all of it, or add. `None` if nothing flows
    /// there.
    pub fn of(&mut self, x: &Var) -> Option<(&mut [f32], Beta)> {
        let node = x.node?;
        let fresh = self.by_node[node].is_none();
        let buffer = self.by_node[node].get_or_insert_with(|| Buffer::scratch(self.lens[node]));
        Some((buffer, if fresh { Beta::Overwrite } else { Beta::Accumulate }))
    }

    /// As [`Backprop::of`], for operations that can only add: zeros where nothing came yet.
    pub fn sum_of(&mut self, x: &Var) -> Option<&mut [f32]> {
        let (buffer, beta) = self.of(x)?;
        if beta == Beta::Overwrite {
            buffer.fill(0.0);
        }
        Some(buffer)
    }

    /// Adds `gradient` to that of `x`.
    pub fn add(&mut self, x: &Var, gradient: &[f32]) {
        match self.of(x) {
            Some((buffer, Beta::Overwrite)) => buffer.copy_from_slice(gradient),
            Some((buffer, Beta::Accumulate)) => select::add_assign(buffer, gradient),
            None => {}
        }
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
}

/// The gradients of a graph's leaves.
pub struct LeafGradients {
    by_node: Vec<Option<Buffer<f32>>>,
}

impl LeafGradients {
    /// The gradient of a leaf made by [`Graph::variable`], if anything reached it.
    pub fn get(&self, leaf: &Var) -> Option<&[f32]> {
        self.by_node.get(leaf.node?)?.as_deref()
    }
}
