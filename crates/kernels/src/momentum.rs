//! Gradient descent with momentum (Polyak 1964; Nesterov's form as in Sutskever et al. 2013), in two passes, so that
//! something may be done to the update between them: [`crate::orthogonal`] makes Muon of it.

use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::for_each_block_of;

/// Numbers of a task: enough for the memory to stream.
const BLOCK: usize = 1 << 15;

/// How a gradient becomes an update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Momentum {
    /// How much of the old momentum stays, 0 to below 1.
    pub decay: f32,
    /// Whether the update looks one step ahead.
    pub nesterov: bool,
    /// What the gradient is multiplied with first (clipping, averaging).
    pub grad_scale: f32,
}

/// `g = grad_scale grad; momentum = decay momentum + g; update = momentum`, or with Nesterov `g + decay momentum`.
///
/// # Shapes
/// All three `[n]`.
pub fn momentum(grad: &[f32], momentum: &mut [f32], update: &mut [f32], settings: &Momentum) {
    momentum_on(Isa::current(), grad, momentum, update, settings);
}

fn momentum_on(isa: Isa, grad: &[f32], momentum: &mut [f32], update: &mut [f32], settings: &Momentum) {
    assert!(grad.len() == momentum.len() && grad.len() == update.len());
    let len = grad.len();
    let (momentum, update) = (DisjointMut::new(momentum), DisjointMut::new(update));
    for_each_block_of(BLOCK, len, 1, |block| {
        // SAFETY: blocks are disjoint.
        let (momentum, update) = unsafe { (momentum.range(block.clone()), update.range(block.clone())) };
        dispatch(isa, Gather { grad: &grad[block], momentum, update, settings });
    });
}

struct Gather<'a> {
    grad: &'a [f32],
    momentum: &'a mut [f32],
    update: &'a mut [f32],
    settings: &'a Momentum,
}

impl Kernel for Gather<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let load = |from: &[f32]| Lanes::load_any(simd, from, 0.0);
        let (decay, scale) = (Lanes::splat(simd, self.settings.decay), Lanes::splat(simd, self.settings.grad_scale));
        let state = self.momentum.chunks_mut(LANES).zip(self.update.chunks_mut(LANES));
        for (grad, (momentum, update)) in self.grad.chunks(LANES).zip(state) {
            let g = load(grad) * scale;
            let new = load(momentum).fma(decay, g);
            new.store_any(momentum);
            if self.settings.nesterov { new.fma(decay, g) } else { new }.store_any(update);
        }
    }
}

/// `param = keep param - rate update`.
///
/// # Shapes
/// Both `[n]`.
pub fn descend(param: &mut [f32], update: &[f32], keep: f32, rate: f32) {
    descend_on(Isa::current(), param, update, keep, rate);
}

fn descend_on(isa: Isa, param: &mut [f32], update: &[f32], keep: f32, rate: f32) {
    assert_eq!(param.len(), update.len());
    let len = param.len();
    let param = DisjointMut::new(param);
    for_each_block_of(BLOCK, len, 1, |block| {
        // SAFETY: blocks are disjoint.
        let param = unsafe { param.range(block.clone()) };
        dispatch(isa, Descend { param, update: &update[block], keep, rate });
    });
}

struct Descend<'a> {
    param: &'a mut [f32],
    update: &'a [f32],
    keep: f32,
    rate: f32,
}

impl Kernel for Descend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (keep, rate) = (Lanes::splat(simd, self.keep), Lanes::splat(simd, self.rate));
        for (param, update) in self.param.chunks_mut(LANES).zip(self.update.chunks(LANES)) {
            let (old, change) = (Lanes::load_any(simd, param, 0.0), Lanes::load_any(simd, update, 0.0) * rate);
            (old * keep - change).store_any(param);
        }
    }
}

/// The plain loop that [`momentum`] is compared with.
pub fn momentum_reference(grad: &[f32], momentum: &mut [f32], update: &mut [f32], settings: &Momentum) {
    for i in 0..grad.len() {
        let g = grad[i] * settings.grad_scale;
        momentum[i] = settings.decay * momentum[i] + g;
        update[i] = if settings.nesterov { g + settings.decay * momentum[i] } else { momentum[i] };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check, numbers};

    #[test]
    fn both_passes_are_the_reference() {
        for nesterov in [false, true] {
            let settings = Momentum { decay: 0.95, nesterov, grad_scale: 0.5 };
            for len in [0, 1, 15, 16, 17, 100, BLOCK + 3] {
                let grad = &numbers(2, len + 1)[1..];
                let (mut state, mut update) = (numbers(1, len), vec![0.0; len]);
                momentum_reference(grad, &mut state, &mut update, &settings);
                let param = numbers(3, len).iter().zip(&update).map(|(p, u)| 0.9 * p - 0.1 * u).collect();
                check(&[state, update, param], 1e-6, |isa| {
                    let (mut state, mut update, mut param) = (numbers(1, len), vec![0.0; len], numbers(3, len));
                    momentum_on(isa, grad, &mut state, &mut update, &settings);
                    descend_on(isa, &mut param, &update, 0.9, 0.1);
                    vec![state, update, param]
                });
            }
        }
    }

    /// `torch.optim.SGD(momentum=0.9, nesterov=True)` by hand: after n equal gradients the momentum is a geometric sum.
    #[test]
    fn equal_gradients_sum_geometrically() {
        let settings = Momentum { decay: 0.5, nesterov: true, grad_scale: 1.0 };
        let (mut state, mut update) = ([0.0], [0.0]);
        for wanted in [1.5, 1.75, 1.875] {
            momentum(&[1.0], &mut state, &mut update, &settings);
            assert_close("update", &update, &[wanted], 1e-6);
        }
    }
}
