//! Adaptive mixtures of local experts (Jacobs, Jordan, Nowlan, Hinton 1991) on tables: every expert computes, a gate
//! mixes, p = softmax(x G). Three errors: cooperative ‖d − Σ p_i o_i‖²; competitive Σ p_i ‖d − o_i‖²; and the paper's own,
//! −log Σ p_i exp(−½ ‖d − o_i‖²), whose slopes are −h_i (d − o_i) by o_i and p_i − h_i by the gate's logit, h_i the posterior.
//!
//! [`Hierarchy`] is the two-level mixture of Jordan and Jacobs (1994), by EM or by gradient.

mod hierarchy;

pub use hierarchy::{Hierarchy, Response};

use super::math::logistic;
use moebius_tensor::Rng;

/// What a mixture minimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MixtureError {
    /// Experts share the error of their sum.
    Cooperative,
    /// Each expert answers for itself, weighted by the gate.
    Competitive,
    /// The negative log likelihood of a mixture of normals of deviation 1.
    Likelihood,
}

/// An expert's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// The affine map itself.
    Linear,
    /// Its logistic function, for classes coded 0 and 1.
    Logistic,
}

/// Affine experts behind an affine softmax gate. Rows of tables are f32; a constant 1 is added to each row.
#[derive(Clone, Debug)]
pub struct Mixture {
    inputs: usize,
    outputs: usize,
    experts: usize,
    output: Output,
    /// `[experts, outputs, inputs + 1]`
    expert: Vec<f32>,
    /// `[experts, inputs + 1]`
    gate: Vec<f32>,
}

/// x · w plus the constant, which stands last in w.
fn affine(w: &[f32], x: &[f32]) -> f32 {
    w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>() + w[x.len()]
}

/// Softmax in place.
fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|s| *s = (*s - largest).exp());
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|s| *s /= sum);
}

impl Mixture {
    /// Normal weights of `deviation`.
    pub fn random([inputs, outputs, experts]: [usize; 3], output: Output, deviation: f32, rng: &mut Rng) -> Self {
        let mut expert = vec![0.0; experts * outputs * (inputs + 1)];
        let mut gate = vec![0.0; experts * (inputs + 1)];
        rng.fill_normal(&mut expert, deviation);
        rng.fill_normal(&mut gate, deviation);
        Self { inputs, outputs, experts, output, expert, gate }
    }

    /// The mixing proportions of one row, `[experts]`.
    pub fn proportions(&self, x: &[f32]) -> Vec<f32> {
        let mut p: Vec<f32> = self.gate.chunks_exact(self.inputs + 1).map(|w| affine(w, x)).collect();
        softmax(&mut p);
        p
    }

    /// `[experts, outputs]` for one row.
    fn answers(&self, x: &[f32]) -> Vec<f32> {
        let sums = self.expert.chunks_exact(self.inputs + 1).map(|w| affine(w, x));
        match self.output {
            Output::Linear => sums.collect(),
            Output::Logistic => sums.map(logistic).collect(),
        }
    }

    /// Σ p_i o_i, `[outputs]`, for one row.
    pub fn predict(&self, x: &[f32]) -> Vec<f32> {
        let (p, o) = (self.proportions(x), self.answers(x));
        (0..self.outputs).map(|j| p.iter().enumerate().map(|(i, p)| p * o[i * self.outputs + j]).sum()).collect()
    }

    /// The error of one row, and its slopes by answers `[experts, outputs]` and gate's logits `[experts]`.
    fn slopes(&self, p: &[f32], o: &[f32], target: &[f32], error: MixtureError) -> (f64, Vec<f32>, Vec<f32>) {
        let n = self.outputs;
        let off = |i: usize, j: usize| o[i * n + j] - target[j];
        let squares: Vec<f32> = (0..self.experts).map(|i| (0..n).map(|j| off(i, j).powi(2)).sum()).collect();
        let elements = |f: &dyn Fn(usize, usize) -> f32| (0..self.experts * n).map(|at| f(at / n, at % n)).collect();
        // d p_i / d logit_j = p_i (1_ij - p_j): from slopes by p to slopes by logits.
        let to_logits = |by_p: &[f32]| -> Vec<f32> {
            let mean: f32 = p.iter().zip(by_p).map(|(p, s)| p * s).sum();
            p.iter().zip(by_p).map(|(p, s)| p * (s - mean)).collect()
        };
        match error {
            MixtureError::Cooperative => {
                let mixed: Vec<f32> = (0..n).map(|j| (0..self.experts).map(|i| p[i] * o[i * n + j]).sum()).collect();
                let rest: Vec<f32> = mixed.iter().zip(target).map(|(m, d)| m - d).collect();
                let value = rest.iter().map(|r| f64::from(r * r)).sum();
                let by_p: Vec<f32> =
                    (0..self.experts).map(|i| (0..n).map(|j| 2.0 * rest[j] * o[i * n + j]).sum()).collect();
                (value, elements(&|i, j| 2.0 * p[i] * rest[j]), to_logits(&by_p))
            }
            MixtureError::Competitive => {
                let value = p.iter().zip(&squares).map(|(p, s)| f64::from(p * s)).sum();
                (value, elements(&|i, j| 2.0 * p[i] * off(i, j)), to_logits(&squares))
            }
            MixtureError::Likelihood => {
                // ln p_i - s_i / 2, less its largest, so that no far expert makes the sum zero.
                let terms: Vec<f32> = p.iter().zip(&squares).map(|(p, s)| p.max(1e-30).ln() - 0.5 * s).collect();
                let largest = terms.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = terms.iter().map(|t| (t - largest).exp()).sum();
                let mut h = terms;
                softmax(&mut h);
                let logits = p.iter().zip(&h).map(|(p, h)| p - h).collect();
                (-f64::from(largest + sum.ln()), elements(&|i, j| h[i] * off(i, j)), logits)
            }
        }
    }

    /// One step of plain gradient descent on the mean error of the rows; gives that error before the step.
    ///
    /// # Shapes
    /// x `[rows, inputs]`, targets `[rows, outputs]`.
    pub fn step(&mut self, x: &[f32], targets: &[f32], error: MixtureError, rate: f32) -> f64 {
        let (value, expert, gate) = self.gradient(x, targets, error);
        self.expert.iter_mut().zip(&expert).for_each(|(w, d)| *w -= rate * d);
        self.gate.iter_mut().zip(&gate).for_each(|(w, d)| *w -= rate * d);
        value
    }

    /// The mean error and its gradients by the experts' weights and the gate's.
    fn gradient(&self, x: &[f32], targets: &[f32], error: MixtureError) -> (f64, Vec<f32>, Vec<f32>) {
        let rows = (x.len() / self.inputs).max(1) as f32;
        let (mut expert, mut gate) = (vec![0.0; self.expert.len()], vec![0.0; self.gate.len()]);
        let mut value = 0.0;
        for (x, target) in x.chunks_exact(self.inputs).zip(targets.chunks_exact(self.outputs)) {
            let (p, o) = (self.proportions(x), self.answers(x));
            let (row, mut by_answer, by_logit) = self.slopes(&p, &o, target, error);
            value += row / f64::from(rows);
            if self.output == Output::Logistic {
                by_answer.iter_mut().zip(&o).for_each(|(d, o)| *d *= o * (1.0 - o));
            }
            for (sums, slopes) in [(&mut expert, by_answer), (&mut gate, by_logit)] {
                for (sums, slope) in sums.chunks_exact_mut(self.inputs + 1).zip(slopes) {
                    sums.iter_mut().zip(x.iter().chain(&[1.0])).for_each(|(s, x)| *s += slope * x / rows);
                }
            }
        }
        (value, expert, gate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moebius_testkit::check_gradient;

    #[test]
    fn gradients_match_finite_differences() {
        let mut rng = Rng::new(4);
        let (mut x, mut targets) = (vec![0.0; 10], vec![0.0; 15]);
        rng.fill_normal(&mut x, 1.0);
        rng.fill_uniform(&mut targets, 0.0, 1.0);
        for error in [MixtureError::Cooperative, MixtureError::Competitive, MixtureError::Likelihood] {
            for output in [Output::Linear, Output::Logistic] {
                let mixture = Mixture::random([2, 3, 4], output, 0.5, &mut rng);
                let (_, expert, gate) = mixture.gradient(&x, &targets, error);
                let what = format!("{error:?} {output:?}");
                check_gradient(&what, &mixture.expert, &expert, |moved| {
                    Mixture { expert: moved.to_vec(), ..mixture.clone() }.gradient(&x, &targets, error).0
                });
                check_gradient(&what, &mixture.gate, &gate, |moved| {
                    Mixture { gate: moved.to_vec(), ..mixture.clone() }.gradient(&x, &targets, error).0
                });
            }
        }
    }

    #[test]
    fn posteriors_on_paper() {
        // Two experts, even gate, answers 0 and 1, target 1: h = e^0 / (e^0 + e^-½) for the second.
        let mixture = Mixture {
            inputs: 1,
            outputs: 1,
            experts: 2,
            output: Output::Linear,
            expert: vec![0.0, 0.0, 0.0, 1.0],
            gate: vec![0.0; 4],
        };
        let (value, expert, gate) = mixture.gradient(&[0.0], &[1.0], MixtureError::Likelihood);
        let h = 1.0 / (1.0 + (-0.5f64).exp());
        assert!((value - -(0.5 + 0.5 * (-0.5f64).exp()).ln()).abs() < 1e-6);
        assert!((f64::from(gate[3]) - (0.5 - h)).abs() < 1e-6 && (f64::from(expert[1]) + 1.0 - h).abs() < 1e-6);
    }

    #[test]
    fn a_mixture_learns_a_bent_line() {
        let x: Vec<f32> = (0..40).map(|i| i as f32 / 10.0 - 2.0).collect();
        let targets: Vec<f32> = x.iter().map(|x| 2.0 * x.abs()).collect();
        let mut mixture = Mixture::random([1, 1, 2], Output::Linear, 0.3, &mut Rng::new(2));
        for _ in 0..3000 {
            mixture.step(&x, &targets, MixtureError::Likelihood, 0.3);
        }
        let error = x.iter().zip(&targets).map(|(x, d)| (mixture.predict(&[*x])[0] - d).powi(2)).sum::<f32>() / 40.0;
        // The best line alone leaves a mean square of about 1.4.
        assert!(error < 0.1, "{error}");
    }
}
