//! AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"), as PyTorch's `torch.optim.AdamW`.

use crate::isa::Isa;
use crate::parallel::DisjointMut;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};
use crate::tasks::for_each_block_of;

/// The settings of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment (outside the root).
    pub eps: f32,
    /// Decoupled weight decay: the parameter shrinks by `lr * weight_decay` a step.
    pub weight_decay: f32,
    /// The number of this step, from 1.
    pub step: u64,
    /// What the gradient is multiplied with first (clipping, averaging).
    pub grad_scale: f32,
}

impl AdamW {
    /// The step's constants: `[1 - lr decay, lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step)]`.
    fn factors(&self) -> [f32; 3] {
        assert!(self.step >= 1, "AdamW counts its steps from 1");
        let power = |beta: f32| 1.0 - f64::from(beta).powf(self.step as f64);
        let keep = 1.0 - f64::from(self.lr) * f64::from(self.weight_decay);
        [keep as f32, (f64::from(self.lr) / power(self.beta1)) as f32, (1.0 / power(self.beta2).sqrt()) as f32]
    }
}

/// One step: `m`, `v` take in the gradient, `param` moves.
///
/// # Shapes
/// All four `[n]`.
pub fn adamw(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], settings: &AdamW) {
    adamw_on(Isa::current(), param, grad, m, v, settings);
}

/// Numbers of a task: enough for the memory to stream.
const BLOCK: usize = 1 << 15;

fn adamw_on(isa: Isa, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], settings: &AdamW) {
    assert!(param.len() == grad.len() && param.len() == m.len() && param.len() == v.len());
    let len = param.len();
    let (param, m, v) = (DisjointMut::new(param), DisjointMut::new(m), DisjointMut::new(v));
    for_each_block_of(BLOCK, len, 2, |block| {
        // SAFETY: blocks are disjoint.
        let (param, m, v) = unsafe { (param.range(block.clone()), m.range(block.clone()), v.range(block.clone())) };
        dispatch(isa, Step { param, grad: &grad[block], m, v, settings });
    });
}

struct Step<'a> {
    param: &'a mut [f32],
    grad: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    settings: &'a AdamW,
}

impl Kernel for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let splat = |value| Lanes::splat(simd, value);
        let load = |from: &[f32]| Lanes::load_any(simd, from, 0.0);
        let settings = self.settings;
        let [keep, rate, root] = settings.factors().map(splat);
        let (take, keep_v, take_v) = (splat(1.0 - settings.beta1), splat(settings.beta2), splat(1.0 - settings.beta2));
        let (scale, eps) = (splat(settings.grad_scale), splat(settings.eps));
        let moments = self.m.chunks_mut(LANES).zip(self.v.chunks_mut(LANES));
        for ((param, grad), (m, v)) in self.param.chunks_mut(LANES).zip(self.grad.chunks(LANES)).zip(moments) {
            let g = load(grad) * scale;
            let old_m = load(m);
            let new_m = (g - old_m).fma(take, old_m);
            let new_v = (take_v * g).fma(g, load(v) * keep_v);
            let change = rate * new_m / new_v.sqrt().fma(root, eps);
            new_m.store_any(m);
            new_v.store_any(v);
            (load(param) * keep - change).store_any(param);
        }
    }
}

/// The plain loop that [`adamw`] is compared with.
pub fn adamw_reference(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], settings: &AdamW) {
    assert!(param.len() == grad.len() && param.len() == m.len() && param.len() == v.len());
    let [keep, rate, root] = settings.factors();
    for i in 0..param.len() {
        let g = grad[i] * settings.grad_scale;
        m[i] += (1.0 - settings.beta1) * (g - m[i]);
        v[i] = settings.beta2 * v[i] + (1.0 - settings.beta2) * g * g;
        param[i] = param[i] * keep - rate * m[i] / (v[i].sqrt() * root + settings.eps);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check, numbers};

    const SETTINGS: AdamW =
        AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3, grad_scale: 0.5 };

    #[test]
    fn steps_are_the_reference() {
        for len in [0, 1, 15, 16, 17, 100, BLOCK + 3] {
            let grad = &numbers(2, len + 1)[1..];
            let start = || {
                let v = numbers(4, len).iter().map(|x| x * x).collect::<Vec<f32>>();
                [numbers(1, len), numbers(3, len), v]
            };
            let [mut param, mut m, mut v] = start();
            adamw_reference(&mut param, grad, &mut m, &mut v, &SETTINGS);
            check(&[param, m, v], 1e-6, |isa| {
                let [mut param, mut m, mut v] = start();
                adamw_on(isa, &mut param, grad, &mut m, &mut v, &SETTINGS);
                vec![param, m, v]
            });
        }
    }

    /// `torch.optim.AdamW` by hand, in f64: the first step moves by `lr * sign(grad)` after the decay.
    #[test]
    fn formula_is_pytorchs() {
        let (mut param, mut m, mut v) = ([2.0f32], [0.0], [0.0]);
        let (mut p, mut em, mut ev) = (2.0f64, 0.0f64, 0.0f64);
        for step in 1..=20 {
            let g = (step as f64 * 0.7).sin();
            p -= 1e-2 * 0.1 * p;
            em = 0.9 * em + 0.1 * g;
            ev = 0.95 * ev + 0.05 * g * g;
            let denominator = ev.sqrt() / (1.0 - 0.95f64.powi(step)).sqrt() + 1e-8;
            p -= 1e-2 / (1.0 - 0.9f64.powi(step)) * em / denominator;
            let settings = AdamW { step: step as u64, grad_scale: 1.0, ..SETTINGS };
            adamw(&mut param, &[g as f32], &mut m, &mut v, &settings);
            assert_close("param", &param, &[p as f32], 2e-6);
        }
    }
}
