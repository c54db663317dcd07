//! Paired differences: each recipe against the first, seed by seed, at the same steps, the same arithmetic, the same time.
//!
//! Runs of one seed saw the same tokens in the same order, so the difference of their losses has less noise than either.
//! What is stated is the mean of these differences over seeds and their standard deviation (n - 1 in the denominator).

use serde::Serialize;

use super::runs::{Finished, Point};

/// Recipes whose total parameters differ by less than this part count as equal in them.
const EQUAL_TOTAL: f64 = 0.1;

/// What is held equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// Optimiser steps, and so tokens.
    Steps,
    /// Multiplications and additions.
    Flops,
    /// Seconds in steps on the machine that ran them.
    Seconds,
}

/// One recipe.
#[derive(Clone, Debug, Serialize)]
pub struct Side {
    /// Its name.
    pub name: String,
    /// All parameters.
    pub total_parameters: usize,
    /// Parameters that one token uses.
    pub active_parameters: usize,
    /// Multiplications and additions that learning from one token takes.
    pub flops_per_token: f64,
    /// Tokens a second in steps, the mean over seeds.
    pub tokens_per_second: f64,
    /// The validations of each seed.
    pub curves: Vec<Vec<Point>>,
}

/// Losses at one budget, the largest that every run has reached.
#[derive(Clone, Debug, Serialize)]
pub struct AtBudget {
    /// What is held equal.
    pub budget: Budget,
    /// How much of it.
    pub amount: f64,
    /// Recipe by recipe.
    pub rows: Vec<Row>,
}

/// One recipe's losses, and its differences to another's.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The recipe.
    pub name: String,
    /// The recipe it is measured against.
    pub against: String,
    /// Its loss by seed; none where the budget is below its first validation.
    pub losses: Vec<Option<f64>>,
    /// Its loss less the other's by seed: below zero, it is better.
    pub differences: Vec<Option<f64>>,
    /// Over seeds.
    pub loss: Spread,
    /// Over seeds.
    pub difference: Spread,
}

/// Mean and standard deviation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Of how many.
    pub count: usize,
    /// Their mean; none of none.
    pub mean: Option<f64>,
    /// Their standard deviation; none of fewer than two.
    pub deviation: Option<f64>,
}

/// Everything that a comparison says.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The seeds.
    pub seeds: Vec<u64>,
    /// The recipes, the first is the one measured against.
    pub sides: Vec<Side>,
    /// At equal steps, equal arithmetic, equal time.
    pub budgets: Vec<AtBudget>,
    /// Pairs of recipes of about the same total size, at equal steps: the later against the earlier.
    pub equal_total_parameters: Vec<Row>,
}

impl Budget {
    /// How much of it was spent.
    pub fn of(self, point: &Point) -> f64 {
        match self {
            Self::Steps => point.step,
            Self::Flops => point.flops,
            Self::Seconds => point.seconds,
        }
    }
}

impl Spread {
    fn of(values: &[Option<f64>]) -> Self {
        let values = values.iter().flatten().copied().collect::<Vec<f64>>();
        let count = values.len();
        let mean = (count > 0).then(|| values.iter().sum::<f64>() / count as f64);
        let deviation = mean.filter(|_| count > 1).map(|mean| {
            let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
            (squares / (count - 1) as f64).sqrt()
        });
        Self { count, mean, deviation }
    }
}

/// Compares finished runs: `finished[recipe][seed]`.
///
/// # Panics
/// Without recipes or seeds.
pub fn compare(names: &[String], seeds: &[u64], finished: &[Vec<Finished>]) -> Comparison {
    let side = |(name, runs): (&String, &Vec<Finished>)| {
        let speed = |run: &Finished| {
            let last = run.points.last().map_or((0.0, 0.0), |point| (point.step, point.seconds));
            last.0 * run.tokens_per_step as f64 / last.1.max(1e-9)
        };
        Side {
            name: name.clone(),
            total_parameters: runs[0].total_parameters,
            active_parameters: runs[0].active_parameters,
            flops_per_token: runs[0].flops_per_token,
            tokens_per_second: runs.iter().map(speed).sum::<f64>() / runs.len() as f64,
            curves: runs.iter().map(|run| run.points.clone()).collect(),
        }
    };
    let sides = names.iter().zip(finished).map(side).collect::<Vec<_>>();
    let at = |budget: Budget| {
        let amount = common(&sides, budget);
        let rows = sides.iter().map(|side| row(side, &sides[0], budget, amount)).collect();
        AtBudget { budget, amount, rows }
    };
    let budgets = [Budget::Steps, Budget::Flops, Budget::Seconds].map(at).to_vec();
    let equal_total_parameters = equal_in_total(&sides);
    Comparison { seeds: seeds.to_vec(), sides, budgets, equal_total_parameters }
}

/// The largest amount that every run has spent at its last validation.
fn common(sides: &[Side], budget: Budget) -> f64 {
    let spent = |curve: &Vec<Point>| curve.last().map_or(0.0, |point| budget.of(point));
    sides.iter().flat_map(|side| &side.curves).map(spent).fold(f64::INFINITY, f64::min)
}

fn row(side: &Side, against: &Side, budget: Budget, amount: f64) -> Row {
    let losses = |side: &Side| side.curves.iter().map(|curve| loss_at(curve, budget, amount)).collect::<Vec<_>>();
    let (own, other) = (losses(side), losses(against));
    let differences = own.iter().zip(&other).map(|(own, other)| Some((*own)? - (*other)?)).collect::<Vec<_>>();
    let (loss, difference) = (Spread::of(&own), Spread::of(&differences));
    Row { name: side.name.clone(), against: against.name.clone(), losses: own, differences, loss, difference }
}

/// The loss at an amount, on the straight line between the validations around it.
fn loss_at(curve: &[Point], budget: Budget, amount: f64) -> Option<f64> {
    let after = curve.iter().position(|point| budget.of(point) >= amount * (1.0 - 1e-12))?;
    let (right, spent) = (&curve[after], budget.of(&curve[after]));
    if after == 0 || spent <= amount * (1.0 + 1e-12) {
        return (spent <= amount * (1.0 + 1e-12)).then_some(right.loss);
    }
    let left = &curve[after - 1];
    let part = (amount - budget.of(left)) / (spent - budget.of(left));
    Some(left.loss + part * (right.loss - left.loss))
}

fn equal_in_total(sides: &[Side]) -> Vec<Row> {
    let amount = common(sides, Budget::Steps);
    let mut rows = Vec::new();
    for (at, earlier) in sides.iter().enumerate() {
        for later in &sides[at + 1..] {
            let (a, b) = (earlier.total_parameters as f64, later.total_parameters as f64);
            if (a - b).abs() < EQUAL_TOTAL * a.max(b) {
                rows.push(row(later, earlier, Budget::Steps, amount));
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    /// A run with validations at steps 10 and 20.
    fn run(parameters: usize, flops: f64, seconds: f64, losses: [f64; 2]) -> Finished {
        let point =
            |at: usize, step: f64| Point { step, flops: step * flops, seconds: step * seconds, loss: losses[at] };
        Finished {
            total_parameters: parameters,
            active_parameters: 50,
            flops_per_token: flops / 4.0,
            tokens_per_step: 4,
            corpus: Digest(1),
            points: vec![point(0, 10.0), point(1, 20.0)],
        }
    }

    #[test]
    fn differences_on_paper() {
        let names = ["dense", "sparse", "wide"].map(str::to_owned);
        let finished = [
            vec![run(100, 1.0, 1.0, [4.0, 3.0]), run(100, 1.0, 1.0, [4.2, 3.1])],
            // Twice the time a step, the same arithmetic.
            vec![run(300, 1.0, 2.0, [3.6, 2.8]), run(300, 1.0, 2.0, [3.8, 3.0])],
            vec![run(310, 4.0, 4.0, [3.4, 2.6]), run(310, 4.0, 4.0, [3.4, 2.5])],
        ];
        let found = compare(&names, &[1, 2], &finished);
        let [steps, flops, seconds] = &found.budgets[..] else { panic!("three budgets") };
        assert_eq!((steps.amount, flops.amount, seconds.amount), (20.0, 20.0, 20.0));
        let close = |found: Option<f64>, wanted: f64| assert!((found.unwrap() - wanted).abs() < 1e-12, "{found:?}");
        close(steps.rows[1].difference.mean, -0.15);
        close(steps.rows[1].difference.deviation, (0.005f64).sqrt());
        close(steps.rows[0].difference.mean, 0.0);
        close(flops.rows[1].difference.mean, -0.15);
        // After 20 of its 40 seconds the sparse one stands at its first validation: 3.6 and 3.8.
        close(seconds.rows[1].loss.mean, 3.7);
        close(seconds.rows[1].difference.mean, 0.65);
        // The wide one has no validation that early.
        assert_eq!(flops.rows[2].loss, Spread { count: 0, mean: None, deviation: None });
        // 300 and 310 are equal in total, 100 is not.
        assert_eq!(found.equal_total_parameters.len(), 1);
        let equal = &found.equal_total_parameters[0];
        assert_eq!((equal.name.as_str(), equal.against.as_str()), ("wide", "sparse"));
        close(equal.difference.mean, -0.35);
    }

    #[test]
    fn between_validations_the_line_counts() {
        let curve = run(1, 1.0, 1.0, [4.0, 3.0]).points;
        assert_eq!(loss_at(&curve, Budget::Steps, 15.0), Some(3.5));
        assert_eq!(loss_at(&curve, Budget::Steps, 10.0), Some(4.0));
        assert_eq!(loss_at(&curve, Budget::Steps, 9.0), None);
        assert_eq!(loss_at(&curve, Budget::Steps, 21.0), None);
    }
}
