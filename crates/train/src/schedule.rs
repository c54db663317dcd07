//! The learning rate: linear warm-up, then a cosine down to a minimum (Loshchilov & Hutter 2017, "SGDR", one cycle).

use crate::Recipe;

/// The rate of every step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The rate at step `warmup_steps`, the highest.
    pub peak: f64,
    /// The rate at step `steps`, the lowest after the warm-up.
    pub minimum: f64,
    /// Steps of warm-up.
    pub warmup_steps: u64,
    /// Steps in all.
    pub steps: u64,
}

impl Schedule {
    /// The schedule that a recipe asks for.
    pub fn of(recipe: &Recipe) -> Self {
        let optimizer = &recipe.optimizer;
        Self {
            peak: optimizer.learning_rate,
            minimum: optimizer.minimum_learning_rate,
            warmup_steps: optimizer.warmup_steps,
            steps: recipe.train.steps,
        }
    }

    /// The rate of `step`, counted from 1: `peak * step / warmup_steps` up to `warmup_steps`, then half a cosine wave;
    /// the minimum for any step past the last.
    pub fn rate(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let length = (self.steps - self.warmup_steps).max(1) as f64;
        let done = ((step - self.warmup_steps) as f64 / length).min(1.0);
        self.minimum + (self.peak - self.minimum) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_on_paper() {
        let schedule = Schedule { peak: 1.0, minimum: 0.1, warmup_steps: 10, steps: 110 };
        for (step, wanted) in [
            (1, 0.1),
            (5, 0.5),
            (10, 1.0),
            (35, 0.1 + 0.45 * (1.0 + 0.5_f64.sqrt())), // a quarter of the way: cos 45°
            (60, 0.55),                                // half-way: the mean of peak and minimum
            (110, 0.1),
            (1000, 0.1),
        ] {
            assert!((schedule.rate(step) - wanted).abs() < 1e-12, "step {step}: {} v {wanted}", schedule.rate(step));
        }
    }

    #[test]
    fn without_warmup_it_starts_below_the_peak() {
        let schedule = Schedule { peak: 2.0, minimum: 0.0, warmup_steps: 0, steps: 2 };
        assert_eq!(schedule.rate(1), 1.0);
        assert!(schedule.rate(2).abs() < 1e-12);
    }
}
