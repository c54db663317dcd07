//! How evenly a router spreads its tokens.

use crate::Plan;
use serde::{Deserialize, Serialize};

/// Tokens of each expert of one layer, summed over batches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadStatistics {
    /// Assignments of each expert.
    pub counts: Vec<u64>,
    /// Tokens that were routed.
    #[serde(default)]
    pub tokens: u64,
}

impl LoadStatistics {
    /// Adds a plan's assignments.
    pub fn add(&mut self, plan: &Plan) {
        self.tokens += plan.n_tokens() as u64;
        self.counts.resize(plan.n_experts(), 0);
        self.counts.iter_mut().zip(plan.counts()).for_each(|(sum, count)| *sum += count as u64);
    }

    /// Each expert's share of all assignments; zeros without any.
    pub fn shares(&self) -> Vec<f64> {
        let total = self.counts.iter().sum::<u64>().max(1) as f64;
        self.counts.iter().map(|&count| count as f64 / total).collect()
    }

    /// The largest load over the mean, less one: 0 when even, experts − 1 when all goes to one (MaxVio, Wang et al. 2024).
    pub fn max_violation(&self) -> f64 {
        let largest = self.shares().into_iter().fold(0.0, f64::max);
        if largest == 0.0 { 0.0 } else { largest * self.counts.len() as f64 - 1.0 }
    }

    /// Entropy of the shares over its largest value: 1 when even, 0 when all goes to one.
    pub fn entropy(&self) -> f64 {
        if self.counts.len() < 2 {
            return 1.0;
        }
        let sum: f64 = self.shares().into_iter().filter(|&share| share > 0.0).map(|share| -share * share.ln()).sum();
        sum / (self.counts.len() as f64).ln()
    }

    /// Experts that got nothing.
    pub fn dead_experts(&self) -> usize {
        self.counts.iter().filter(|&&count| count == 0).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_and_collapsed_loads() {
        let even = LoadStatistics { counts: vec![5; 4], tokens: 20 };
        assert_eq!((even.max_violation(), even.entropy(), even.dead_experts()), (0.0, 1.0, 0));
        let collapsed = LoadStatistics { counts: vec![0, 8, 0, 0], tokens: 8 };
        assert_eq!((collapsed.max_violation(), collapsed.entropy(), collapsed.dead_experts()), (3.0, 0.0, 3));
        let mut sum = LoadStatistics::default();
        sum.add(&Plan::from_choices(3, 2, &[0, 1, 1, 2]).unwrap());
        sum.add(&Plan::from_choices(3, 1, &[1]).unwrap());
        assert_eq!(sum.counts, [1, 3, 1]);
    }
}
