//! A running average of the weights (Polyak & Juditsky 1992), exponential, as deep learning uses it.

use moebius_kernels::memory::Buffer;
use moebius_kernels::momentum::descend;
use moebius_model::Model;
use moebius_tensor::Param;

/// The average of every parameter, by parameter id.
pub struct Average {
    decay: f64,
    weights: Vec<Buffer<f32>>,
}

impl Average {
    /// Begins with the weights as they are.
    pub fn new(decay: f64, params: &[&Param]) -> Self {
        Self { decay, weights: params.iter().map(|param| Buffer::from_slice(param.value().data())).collect() }
    }

    /// `average = d average + (1 - d) weights`, with `d` rising to `decay` as `(1 + step) / (10 + step)`, so that the first
    /// weights are soon forgotten.
    pub fn update(&mut self, params: &[&Param], step: u64) {
        let decay = self.decay.min((1.0 + step as f64) / (10.0 + step as f64)) as f32;
        for (average, param) in self.weights.iter_mut().zip(params) {
            descend(average, param.value().data(), decay, decay - 1.0);
        }
    }

    /// The averages, by parameter id.
    pub fn weights(&self) -> &[Buffer<f32>] {
        &self.weights
    }

    /// The averages, to be filled from a checkpoint.
    pub fn weights_mut(&mut self) -> &mut [Buffer<f32>] {
        &mut self.weights
    }

    /// Exchanges the model's weights with the averages; a second call undoes it, to the bit.
    pub fn swap(&mut self, model: &mut Model) {
        for (param, average) in model.params_mut().into_iter().zip(&mut self.weights) {
            param.update(|weights| weights.swap_with_slice(average));
        }
    }
}

#[cfg(test)]
mod tests {
    use moebius_tensor::Tensor;

    use super::*;

    #[test]
    fn the_average_follows_on_paper() {
        let mut param = Param::new(0, "w", Tensor::new(&[2], vec![0.0, 4.0]));
        let mut average = Average::new(0.5, &[&param]);
        param.update(|weights| weights.copy_from_slice(&[8.0, 4.0]));
        // (1 + 1) / (10 + 1) of the old at the first step, half at the hundredth.
        average.update(&[&param], 1);
        assert!((average.weights()[0][0] - 8.0 * 9.0 / 11.0).abs() < 1e-5);
        let before = average.weights()[0][0];
        average.update(&[&param], 100);
        assert!((average.weights()[0][0] - (before + 8.0) / 2.0).abs() < 1e-5);
        assert_eq!(average.weights()[0][1], 4.0);
    }
}
