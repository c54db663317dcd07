//! AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"), as PyTorch's `torch.optim.AdamW`.

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
    adamw_reference(param, grad, m, v, settings);
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
