//! Activation checkpointing: a part of the graph that keeps its input alone and runs again in the backward.

use crate::{Graph, Place, Tensor, Var};
use moebius_kernels::memory::Buffer;
use std::cell::RefCell;
use std::rc::Rc;

/// The gradients of the outputs of a part, as they arrive.
type Arrived = Rc<RefCell<Vec<Option<Buffer<f32>>>>>;

impl<'p> Graph<'p> {
    /// Runs `f` without keeping its activations, and once more when the gradient comes: memory for time
    /// (Chen et al. 2016). Gives what `f` gives, with gradients of the same bits as without.
    ///
    /// All that `f` computes from must come through `x` or be a weight or a constant.
    ///
    /// # Errors
    /// Those of `f`, at once.
    ///
    /// # Panics
    /// In the backward, if `f` fails on an input on which it succeeded; if it uses another recorded value than `x`.
    pub fn checkpoint<E>(
        &self,
        x: &Var,
        f: impl Fn(&Graph<'p>, &Var) -> Result<Vec<Var>, E> + 'p,
    ) -> Result<Vec<Var>, E> {
        if !self.is_recording() {
            return f(self, x);
        }
        let outputs = f(&Graph::rehearsal(self.precision()).with(self.settings()), &x.detach())?;
        let arrived: Arrived = Rc::new(RefCell::new(outputs.iter().map(|_| None).collect()));
        let anchor = self.anchor(x, f, arrived.clone());
        let output = |(i, y): (usize, Var)| {
            let arrived = arrived.clone();
            self.record(y.value().clone(), move |dy, back| {
                arrived.borrow_mut()[i] = Some(dy);
                back.add(anchor, &[0.0]);
            })
        };
        Ok(outputs.into_iter().enumerate().map(output).collect())
    }

    /// The entry below the outputs, whose turn comes after theirs: it computes again and goes back through that.
    ///
    /// What reached x before from elsewhere is laid under the inner gradients, not added to their sum, so that all
    /// additions happen in the order of a graph without recomputation.
    fn anchor<E>(&self, x: &Var, f: impl Fn(&Graph<'p>, &Var) -> Result<Vec<Var>, E> + 'p, arrived: Arrived) -> Place {
        let (precision, settings, input) = (self.precision(), self.settings(), x.clone());
        let entry = self.record(Tensor::scalar(0.0), move |_, back| {
            let inner = Graph::training(precision).with(settings);
            let leaf = if back.wants(&input) { inner.variable(input.value().clone()) } else { input.detach() };
            let Ok(again) = f(&inner, &leaf) else { panic!("a recomputed part failed on an input it had taken") };
            let below = back.take(&input);
            let mut leaves = inner.backward_with(back.gradients, |inner| {
                if let Some(below) = below {
                    inner.give(&leaf, below);
                }
                for (y, dy) in again.iter().zip(arrived.take()) {
                    if let Some(dy) = dy {
                        inner.give(y, dy);
                    }
                }
            });
            if let Some(dx) = leaves.take(&leaf) {
                back.give(&input, dx);
            }
        });
        entry.place()
    }
}
