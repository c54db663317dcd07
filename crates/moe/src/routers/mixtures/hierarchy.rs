//! Hierarchical mixtures of experts (Jordan and Jacobs 1994), two levels: μ = Σ_i g_i Σ_j g_ij μ_ij, experts affine with
//! normal errors of one variance. EM: posteriors h_i and h_ij of what made each row (E); then each expert is a least
//! squares fit weighted by h_ij, and each gate a softmax regression to the posteriors by Newton's steps (M), here with
//! the usual bound (1/2)(I − 11ᵀ/n) of Böhning (1992) on the Hessian, so that the likelihood never falls.

use super::{affine, softmax};
use moebius_tensor::Rng;

/// A ridge on normal equations, so that an expert without rows stays solvable.
const RIDGE: f64 = 1e-6;

/// Two levels of gates over affine experts.
#[derive(Clone, Debug)]
pub struct Hierarchy {
    inputs: usize,
    outputs: usize,
    /// Groups, and experts in each.
    branching: [usize; 2],
    /// `[groups, inputs + 1]`
    top: Vec<f32>,
    /// `[groups, experts, inputs + 1]`
    lower: Vec<f32>,
    /// `[groups, experts, outputs, inputs + 1]`
    expert: Vec<f32>,
    variance: f64,
}

/// What the E-step finds for one row: h_i `[groups]`, h_ij `[groups, experts]` (their products with h_i), ln likelihood.
struct Posterior {
    group: Vec<f64>,
    leaf: Vec<f64>,
    log_likelihood: f64,
}

impl Hierarchy {
    /// Normal weights of `deviation`.
    pub fn random(inputs: usize, outputs: usize, branching: [usize; 2], deviation: f32, rng: &mut Rng) -> Self {
        let [groups, each] = branching;
        let mut fill = |len: usize| {
            let mut w = vec![0.0; len * (inputs + 1)];
            rng.fill_normal(&mut w, deviation);
            w
        };
        let (top, lower, expert) = (fill(groups), fill(groups * each), fill(groups * each * outputs));
        Self { inputs, outputs, branching, top, lower, expert, variance: 1.0 }
    }

    /// g_i g_ij of one row, `[groups, experts]`, and g_i.
    fn gates(&self, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let row = self.inputs + 1;
        let mut top: Vec<f32> = self.top.chunks_exact(row).map(|w| affine(w, x)).collect();
        softmax(&mut top);
        let mut leaf: Vec<f32> = self.lower.chunks_exact(row).map(|w| affine(w, x)).collect();
        for (group, g) in leaf.chunks_exact_mut(self.branching[1]).zip(&top) {
            softmax(group);
            group.iter_mut().for_each(|p| *p *= g);
        }
        (leaf, top)
    }

    /// μ of one row, `[outputs]`.
    pub fn predict(&self, x: &[f32]) -> Vec<f32> {
        let (leaf, _) = self.gates(x);
        let mut sum = vec![0.0; self.outputs];
        for (answers, p) in self.expert.chunks_exact(self.outputs * (self.inputs + 1)).zip(leaf) {
            let each = answers.chunks_exact(self.inputs + 1).map(|w| p * affine(w, x));
            sum.iter_mut().zip(each).for_each(|(sum, y)| *sum += y);
        }
        sum
    }

    fn posterior(&self, x: &[f32], target: &[f32]) -> Posterior {
        let (leaf, _) = self.gates(x);
        let n = self.outputs as f64;
        let experts = self.expert.chunks_exact(self.outputs * (self.inputs + 1));
        let terms: Vec<f64> = (experts.zip(leaf))
            .map(|(answers, p)| {
                let square: f64 = (answers.chunks_exact(self.inputs + 1).zip(target))
                    .map(|(w, d)| f64::from(d - affine(w, x)).powi(2))
                    .sum();
                let normal = -0.5 * square / self.variance - 0.5 * n * (std::f64::consts::TAU * self.variance).ln();
                f64::from(p.max(1e-30)).ln() + normal
            })
            .collect();
        let largest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = terms.iter().map(|t| (t - largest).exp()).sum();
        let leaf: Vec<f64> = terms.iter().map(|t| (t - largest).exp() / sum).collect();
        let group = leaf.chunks_exact(self.branching[1]).map(|h| h.iter().sum()).collect();
        Posterior { group, leaf, log_likelihood: largest + sum.ln() }
    }

    /// The mean log likelihood of the rows.
    ///
    /// # Shapes
    /// x `[rows, inputs]`, targets `[rows, outputs]`.
    pub fn log_likelihood(&self, x: &[f32], targets: &[f32]) -> f64 {
        let rows = x.chunks_exact(self.inputs).zip(targets.chunks_exact(self.outputs));
        let count = rows.len().max(1) as f64;
        rows.map(|(x, d)| self.posterior(x, d).log_likelihood / count).sum()
    }

    /// One round of EM, with `gate_steps` Newton steps for each gate. Gives the log likelihood before it.
    ///
    /// # Shapes
    /// As [`Hierarchy::log_likelihood`].
    pub fn em(&mut self, x: &[f32], targets: &[f32], gate_steps: usize) -> f64 {
        let rows: Vec<&[f32]> = x.chunks_exact(self.inputs).collect();
        let posteriors: Vec<Posterior> =
            rows.iter().zip(targets.chunks_exact(self.outputs)).map(|(x, d)| self.posterior(x, d)).collect();
        let before = posteriors.iter().map(|p| p.log_likelihood).sum::<f64>() / rows.len().max(1) as f64;
        self.fit_experts(&rows, targets, &posteriors);
        let (row, [groups, each]) = (self.inputs + 1, self.branching);
        let ones = vec![1.0; rows.len()];
        let of_group = |t: usize, i: usize| posteriors[t].group[i];
        fit_gate(&mut self.top, &rows, groups, &ones, &of_group, gate_steps);
        for group in 0..groups {
            let weights: Vec<f64> = posteriors.iter().map(|p| p.group[group]).collect();
            let share = |t: usize, j: usize| posteriors[t].leaf[group * each + j] / weights[t].max(1e-300);
            let gate = &mut self.lower[group * each * row..(group + 1) * each * row];
            fit_gate(gate, &rows, each, &weights, &share, gate_steps);
        }
        before
    }

    /// Weighted least squares for each expert, then the variance that is left.
    fn fit_experts(&mut self, rows: &[&[f32]], targets: &[f32], posteriors: &[Posterior]) {
        let (row, outputs) = (self.inputs + 1, self.outputs);
        let mut left = 0.0;
        for (leaf, expert) in self.expert.chunks_exact_mut(outputs * row).enumerate() {
            let mut normal = vec![0.0; row * row];
            let mut right = vec![0.0; row * outputs];
            for ((x, d), posterior) in rows.iter().zip(targets.chunks_exact(outputs)).zip(posteriors) {
                let h = posterior.leaf[leaf];
                let x = |i: usize| x.get(i).map_or(1.0, |&x| f64::from(x));
                for i in 0..row {
                    (0..row).for_each(|j| normal[i * row + j] += h * x(i) * x(j));
                    (0..outputs).for_each(|o| right[i * outputs + o] += h * x(i) * f64::from(d[o]));
                }
            }
            (0..row).for_each(|i| normal[i * row + i] += RIDGE);
            solve(&mut normal, &mut right, row, outputs);
            (0..outputs * row).for_each(|at| expert[at] = right[at % row * outputs + at / row] as f32);
            for ((x, d), posterior) in rows.iter().zip(targets.chunks_exact(outputs)).zip(posteriors) {
                let off = expert.chunks_exact(row).zip(d).map(|(w, d)| f64::from(d - affine(w, x)).powi(2));
                left += posterior.leaf[leaf] * off.sum::<f64>();
            }
        }
        self.variance = (left / targets.len().max(1) as f64).max(1e-6);
    }
}

/// Softmax regression of targets h(row, branch) weighted by row, in `steps` bounded Newton steps.
fn fit_gate(
    gate: &mut [f32],
    rows: &[&[f32]],
    branches: usize,
    weights: &[f64],
    target: &dyn Fn(usize, usize) -> f64,
    steps: usize,
) {
    let row = gate.len() / branches;
    for _ in 0..steps {
        let mut normal = vec![0.0; row * row];
        let mut right = vec![0.0; row * branches];
        for (t, (x, &weight)) in rows.iter().zip(weights).enumerate() {
            let mut p: Vec<f32> = gate.chunks_exact(row).map(|w| affine(w, x)).collect();
            softmax(&mut p);
            let x = |i: usize| x.get(i).map_or(1.0, |&x| f64::from(x));
            for i in 0..row {
                // Half of x xᵀ bounds the Hessian of every branch.
                (0..row).for_each(|j| normal[i * row + j] += 0.5 * weight * x(i) * x(j));
                (0..branches).for_each(|b| right[i * branches + b] += weight * x(i) * (target(t, b) - f64::from(p[b])));
            }
        }
        (0..row).for_each(|i| normal[i * row + i] += RIDGE);
        solve(&mut normal, &mut right, row, branches);
        (0..gate.len()).for_each(|at| gate[at] += right[at % row * branches + at / row] as f32);
    }
}

/// Solves a `[n, n]` · x = b `[n, m]` into b, a symmetric and positive, by Gauss and Jordan.
fn solve(a: &mut [f64], b: &mut [f64], n: usize, m: usize) {
    for pivot in 0..n {
        let scale = 1.0 / a[pivot * n + pivot];
        (0..n).for_each(|j| a[pivot * n + j] *= scale);
        (0..m).for_each(|j| b[pivot * m + j] *= scale);
        for i in (0..n).filter(|&i| i != pivot) {
            let factor = a[i * n + pivot];
            (0..n).for_each(|j| a[i * n + j] -= factor * a[pivot * n + j]);
            (0..m).for_each(|j| b[i * m + j] -= factor * b[pivot * m + j]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihood_never_falls_and_the_pieces_are_found() {
        // Four pieces of a broken line.
        let x: Vec<f32> = (0..80).map(|i| i as f32 / 20.0 - 2.0).collect();
        let y: Vec<f32> = x.iter().map(|&x| if x < 0.0 { (x + 1.0).abs() } else { 1.0 - (x - 1.0).abs() }).collect();
        let mut tree = Hierarchy::random(1, 1, [2, 2], 0.5, &mut Rng::new(6));
        let mut last = f64::NEG_INFINITY;
        for round in 0..200 {
            let now = tree.em(&x, &y, 3);
            assert!(now >= last - 1e-3, "round {round}: {last} to {now}");
            last = now;
        }
        let error = x.iter().zip(&y).map(|(x, y)| (tree.predict(&[*x])[0] - y).powi(2)).sum::<f32>() / 80.0;
        assert!(error < 0.02, "{error}");
    }

    #[test]
    fn equations_on_paper() {
        let (mut a, mut b) = (vec![2.0, 1.0, 1.0, 3.0], vec![4.0, 7.0]);
        solve(&mut a, &mut b, 2, 1);
        assert!((b[0] - 1.0).abs() < 1e-12 && (b[1] - 2.0).abs() < 1e-12);
    }
}
