//! AdamW over all parameters of a model (Loshchilov & Hutter 2019), with the moments that a checkpoint carries.
//!
//! Weight decay acts on matrices: attention, experts, routers, output head. It leaves alone the norms' weights (vectors)
//! and the token embedding, whose rare rows would shrink at every step that does not see them; with tied embeddings the
//! shared matrix counts as the embedding.

use moebius_kernels::memory::Buffer;
use moebius_kernels::optimizer::{AdamW, adamw};
use moebius_tensor::{Gradients, Param};

use crate::recipe::OptimizerSection;

/// The moments of every parameter, by parameter id, and the constants of the recipe.
pub struct Optimizer {
    settings: OptimizerSection,
    moments: Vec<Moments>,
}

/// Running means of one parameter's gradient and of its square.
pub struct Moments {
    /// Adam's `m`.
    pub first: Buffer<f32>,
    /// Adam's `v`.
    pub second: Buffer<f32>,
}

/// What one step needs besides gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepSettings {
    /// The number of the step, from 1.
    pub step: u64,
    /// The learning rate.
    pub rate: f64,
    /// What every gradient is multiplied with first: averaging and clipping in one.
    pub gradient_scale: f64,
}

impl Optimizer {
    /// Moments of zero for `params`.
    pub fn new(settings: &OptimizerSection, params: &[&Param]) -> Self {
        let moments = params.iter().map(|param| {
            let len = param.value().data().len();
            Moments { first: Buffer::zeroed(len), second: Buffer::zeroed(len) }
        });
        Self { settings: settings.clone(), moments: moments.collect() }
    }

    /// The moments, by parameter id.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// The moments, by parameter id, to be filled from a checkpoint.
    pub fn moments_mut(&mut self) -> &mut [Moments] {
        &mut self.moments
    }

    /// Moves every parameter against its gradient. A parameter without gradient has one of zero: its moments fade and
    /// its weights decay, the same whether or not an earlier step of this process gave it one.
    pub fn step(&mut self, params: Vec<&mut Param>, gradients: &mut Gradients, step: &StepSettings) {
        for param in params {
            let id = param.id();
            let len = param.value().data().len();
            let decays = param.value().shape().len() >= 2 && !is_embedding(param.name());
            let settings = AdamW {
                lr: step.rate as f32,
                beta1: self.settings.beta1 as f32,
                beta2: self.settings.beta2 as f32,
                eps: self.settings.epsilon as f32,
                weight_decay: if decays { self.settings.weight_decay as f32 } else { 0.0 },
                step: step.step,
                grad_scale: step.gradient_scale as f32,
            };
            let gradient = gradients.get_mut(id, len);
            let Moments { first, second } = &mut self.moments[id];
            param.update(|weights| adamw(weights, gradient, first, second, &settings));
        }
    }
}

/// Whether a parameter is the token embedding.
fn is_embedding(name: &str) -> bool {
    name.contains("embed")
}

/// The factor by which a mean gradient of norm `norm` is cut to `limit` (Pascanu et al. 2013; PyTorch's
/// `clip_grad_norm_`, with its 1e-6).
pub fn clip_factor(norm: f64, limit: f64) -> f64 {
    (limit / (norm + 1e-6)).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_on_paper() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert!((clip_factor(4.0, 1.0) * 4.0 - 1.0).abs() < 1e-6);
        assert_eq!(clip_factor(0.0, 1.0), 1.0);
    }
}
