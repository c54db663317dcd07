//! The learning rate: linear warm-up, then a way down to a minimum.
//!
//! Cosine: Loshchilov & Hutter 2017, "SGDR", one cycle. Warm-up, stable, decay: Hu et al. 2024, "MiniCPM".

use crate::Recipe;
use crate::recipe::{OptimizerSection, ScheduleKind};

/// The rate of every step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The way down.
    pub kind: ScheduleKind,
    /// The rate at step `warmup_steps`, the highest.
    pub peak: f64,
    /// The rate at step `steps`, the lowest after the warm-up.
    pub minimum: f64,
    /// Steps of warm-up.
    pub warmup_steps: u64,
    /// Steps at the end over which `wsd` goes down.
    pub decay_steps: u64,
    /// Steps in all.
    pub steps: u64,
}

impl Schedule {
    /// The schedule that a recipe asks for.
    pub fn of(recipe: &Recipe) -> Self {
        Self::of_section(&recipe.optimizer, recipe.train.steps)
    }

    /// The schedule of a section in a run of `steps` steps.
    pub fn of_section(optimizer: &OptimizerSection, steps: u64) -> Self {
        Self {
            kind: optimizer.schedule,
            peak: optimizer.learning_rate,
            minimum: optimizer.minimum_learning_rate,
            warmup_steps: optimizer.warmup_steps,
            decay_steps: optimizer.decay_steps.unwrap_or((steps / 5).max(1)),
            steps,
        }
    }

    /// The rate of `step`, counted from 1: `peak * step / warmup_steps` up to `warmup_steps`, then down; the last step's
    /// for any step past it.
    pub fn rate(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        // How much of the way from start to end is done.
        let done = |start: u64| {
            let length = self.steps.saturating_sub(start).max(1) as f64;
            (step.saturating_sub(start) as f64 / length).min(1.0)
        };
        let high = match self.kind {
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done(self.warmup_steps)).cos()),
            ScheduleKind::Linear => 1.0 - done(self.warmup_steps),
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Wsd => 1.0 - done(self.steps.saturating_sub(self.decay_steps).max(self.warmup_steps)),
        };
        self.minimum + (self.peak - self.minimum) * high
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> Schedule {
        Schedule { kind, peak: 1.0, minimum: 0.1, warmup_steps: 10, decay_steps: 20, steps: 110 }
    }

    fn assert_rates(schedule: Schedule, rates: &[(u64, f64)]) {
        for &(step, wanted) in rates {
            let found = schedule.rate(step);
            assert!((found - wanted).abs() < 1e-12, "{:?}, step {step}: {found} v {wanted}", schedule.kind);
        }
    }

    #[test]
    fn values_on_paper() {
        let quarter = 0.1 + 0.45 * (1.0 + 0.5_f64.sqrt()); // cos 45°
        for kind in [ScheduleKind::Cosine, ScheduleKind::Linear, ScheduleKind::Constant, ScheduleKind::Wsd] {
            assert_rates(schedule(kind), &[(1, 0.1), (5, 0.5), (10, 1.0)]);
        }
        assert_rates(schedule(ScheduleKind::Cosine), &[(35, quarter), (60, 0.55), (110, 0.1), (1000, 0.1)]);
        assert_rates(schedule(ScheduleKind::Linear), &[(35, 0.775), (60, 0.55), (110, 0.1), (1000, 0.1)]);
        assert_rates(schedule(ScheduleKind::Constant), &[(35, 1.0), (110, 1.0), (1000, 1.0)]);
        assert_rates(schedule(ScheduleKind::Wsd), &[(11, 1.0), (90, 1.0), (100, 0.55), (110, 0.1), (1000, 0.1)]);
    }

    #[test]
    fn a_decay_longer_than_what_the_warmup_leaves_begins_after_it() {
        let wsd = Schedule { decay_steps: 110, ..schedule(ScheduleKind::Wsd) };
        assert_rates(wsd, &[(10, 1.0), (60, 0.55), (110, 0.1)]);
    }

    #[test]
    fn without_warmup_it_starts_below_the_peak() {
        let cosine = ScheduleKind::Cosine;
        let schedule = Schedule { kind: cosine, peak: 2.0, minimum: 0.0, warmup_steps: 0, decay_steps: 1, steps: 2 };
        assert_eq!(schedule.rate(1), 1.0);
        assert!(schedule.rate(2).abs() < 1e-12);
    }
}
