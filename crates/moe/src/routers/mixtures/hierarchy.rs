//! Hierarchical mixtures of experts (Jordan and Jacobs 1994), two levels: μ = Σ_i g_i Σ_j g_ij μ_ij. Experts are affine with
//! normal errors of one variance, or softmax regressions over classes.
//!
//! EM: posteriors h_i and h_ij = h_i h_j|i of what made each row (E); then each expert is a least squares fit or a softmax
//! regression weighted by h_ij, and each gate a softmax regression to the posteriors (M). Softmax regressions go by
//! Newton's steps, here with the usual bound (1/2)(I − 11ᵀ/n) of Böhning (1992) on the Hessian, so that the likelihood
//! never falls.
//!
//! By gradient: the slopes of ln likelihood are h_i − g_i by a logit of the top gate, h_i (h_j|i − g_j|i) by one of a
//! lower gate, and h_ij (d − μ_ij) / σ² by an expert's affine map (σ = 1 with classes).

use super::{affine, softmax};
use moebius_tensor::Rng;

/// A ridge on normal equations, so that an expert without rows stays solvable.
const RIDGE: f64 = 1e-6;

/// What an expert says of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// Numbers with normal errors.
    Numbers,
    /// Probabilities of classes, targets 1 for the right one and 0 for the others.
    Classes,
}

/// Two levels of gates over affine experts.
#[derive(Clone, Debug)]
pub struct Hierarchy {
    inputs: usize,
    outputs: usize,
    response: Response,
    /// Groups, and experts in each.
    branching: [usize; 2],
    /// `[groups, inputs + 1]`
    top: Vec<f32>,
    /// `[groups, experts, inputs + 1]`
    lower: Vec<f32>,
    /// `[groups, experts, outputs, inputs + 1]`
    expert: Vec<f32>,
    /// Of the errors; 1 with classes.
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
    pub fn random(
        [inputs, outputs]: [usize; 2],
        branching: [usize; 2],
        response: Response,
        deviation: f32,
        rng: &mut Rng,
    ) -> Self {
        let [groups, each] = branching;
        let mut fill = |len: usize| {
            let mut w = vec![0.0; len * (inputs + 1)];
            rng.fill_normal(&mut w, deviation);
            w
        };
        let (top, lower, expert) = (fill(groups), fill(groups * each), fill(groups * each * outputs));
        Self { inputs, outputs, response, branching, top, lower, expert, variance: 1.0 }
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
        for (answer, p) in self.answers(x).chunks_exact(self.outputs).zip(leaf) {
            sum.iter_mut().zip(answer).for_each(|(sum, y)| *sum += p * y);
        }
        sum
    }

    /// μ_ij of one row, `[groups, experts, outputs]`.
    fn answers(&self, x: &[f32]) -> Vec<f32> {
        let mut answers: Vec<f32> = self.expert.chunks_exact(self.inputs + 1).map(|w| affine(w, x)).collect();
        if self.response == Response::Classes {
            answers.chunks_exact_mut(self.outputs).for_each(softmax);
        }
        answers
    }

    /// ln of the density that an expert's answer gives to the target.
    fn log_density(&self, answer: &[f32], target: &[f32]) -> f64 {
        let pairs = answer.iter().zip(target);
        match self.response {
            Response::Numbers => {
                let square: f64 = pairs.map(|(y, d)| f64::from(d - y).powi(2)).sum();
                let constant = (std::f64::consts::TAU * self.variance).ln();
                -0.5 * square / self.variance - 0.5 * self.outputs as f64 * constant
            }
            Response::Classes => pairs.map(|(&y, &d)| f64::from(d) * f64::from(y.max(1e-30)).ln()).sum(),
        }
    }

    fn posterior(&self, x: &[f32], target: &[f32]) -> Posterior {
        let (leaf, _) = self.gates(x);
        let answers = self.answers(x);
        let terms: Vec<f64> = (answers.chunks_exact(self.outputs).zip(leaf))
            .map(|(answer, p)| f64::from(p.max(1e-30)).ln() + self.log_density(answer, target))
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

    /// One round of EM, with `newton_steps` for each softmax regression. Gives the log likelihood before it.
    ///
    /// # Shapes
    /// As [`Hierarchy::log_likelihood`].
    pub fn em(&mut self, x: &[f32], targets: &[f32], newton_steps: usize) -> f64 {
        let rows: Vec<&[f32]> = x.chunks_exact(self.inputs).collect();
        let posteriors: Vec<Posterior> =
            rows.iter().zip(targets.chunks_exact(self.outputs)).map(|(x, d)| self.posterior(x, d)).collect();
        let before = posteriors.iter().map(|p| p.log_likelihood).sum::<f64>() / rows.len().max(1) as f64;
        let (row, [groups, each]) = (self.inputs + 1, self.branching);
        match self.response {
            Response::Numbers => self.fit_experts(&rows, targets, &posteriors),
            Response::Classes => {
                let right = |t: usize, class: usize| f64::from(targets[t * self.outputs + class]);
                for (leaf, expert) in self.expert.chunks_exact_mut(self.outputs * row).enumerate() {
                    let weights: Vec<f64> = posteriors.iter().map(|p| p.leaf[leaf]).collect();
                    regress(expert, &rows, self.outputs, &weights, &right, newton_steps);
                }
            }
        }
        let ones = vec![1.0; rows.len()];
        let of_group = |t: usize, i: usize| posteriors[t].group[i];
        regress(&mut self.top, &rows, groups, &ones, &of_group, newton_steps);
        for group in 0..groups {
            let weights: Vec<f64> = posteriors.iter().map(|p| p.group[group]).collect();
            let share = |t: usize, j: usize| posteriors[t].leaf[group * each + j] / weights[t].max(1e-300);
            let gate = &mut self.lower[group * each * row..(group + 1) * each * row];
            regress(gate, &rows, each, &weights, &share, newton_steps);
        }
        before
    }

    /// One step of gradient ascent on the mean log likelihood; gives it as it was before. The variance stays.
    ///
    /// # Shapes
    /// As [`Hierarchy::log_likelihood`].
    pub fn step(&mut self, x: &[f32], targets: &[f32], rate: f32) -> f64 {
        let (before, slopes) = self.gradient(x, targets);
        for (weights, slopes) in [&mut self.top, &mut self.lower, &mut self.expert].into_iter().zip(&slopes) {
            weights.iter_mut().zip(slopes).for_each(|(w, slope)| *w += rate * slope);
        }
        before
    }

    /// The mean log likelihood, and its slopes by the top gate, the lower ones and the experts.
    fn gradient(&self, x: &[f32], targets: &[f32]) -> (f64, [Vec<f32>; 3]) {
        let count = (x.len() / self.inputs).max(1) as f32;
        let mut sums = [&self.top, &self.lower, &self.expert].map(|weights| vec![0.0; weights.len()]);
        let mut value = 0.0;
        for (x, target) in x.chunks_exact(self.inputs).zip(targets.chunks_exact(self.outputs)) {
            let ((leaf, top), h, answers) = (self.gates(x), self.posterior(x, target), self.answers(x));
            value += h.log_likelihood / f64::from(count);
            let each = self.branching[1];
            let by_top: Vec<f32> = h.group.iter().zip(&top).map(|(&h, g)| h as f32 - g).collect();
            // g_ij = g_i g_j|i, so h_i g_j|i = h_i g_ij / g_i.
            let share = |at: usize| leaf[at] / top[at / each].max(1e-30);
            let by_lower: Vec<f32> =
                (0..leaf.len()).map(|at| (h.leaf[at] - h.group[at / each] * f64::from(share(at))) as f32).collect();
            let variance = self.variance as f32;
            let by_answer = answers
                .iter()
                .enumerate()
                .map(|(at, y)| h.leaf[at / self.outputs] as f32 * (target[at % self.outputs] - y) / variance);
            for (sums, slopes) in sums.iter_mut().zip([by_top, by_lower, by_answer.collect()]) {
                for (sums, slope) in sums.chunks_exact_mut(self.inputs + 1).zip(slopes) {
                    sums.iter_mut().zip(x.iter().chain(&[1.0])).for_each(|(sum, x)| *sum += slope * x / count);
                }
            }
        }
        (value, sums)
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

/// Softmax regression, by one affine map a branch, of targets h(row, branch) weighted by row, in `steps` bounded Newton steps.
fn regress(
    maps: &mut [f32],
    rows: &[&[f32]],
    branches: usize,
    weights: &[f64],
    target: &dyn Fn(usize, usize) -> f64,
    steps: usize,
) {
    let row = maps.len() / branches;
    for _ in 0..steps {
        let mut normal = vec![0.0; row * row];
        let mut right = vec![0.0; row * branches];
        for (t, (x, &weight)) in rows.iter().zip(weights).enumerate() {
            let mut p: Vec<f32> = maps.chunks_exact(row).map(|w| affine(w, x)).collect();
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
        (0..maps.len()).for_each(|at| maps[at] += right[at % row * branches + at / row] as f32);
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
        let mut tree = Hierarchy::random([1, 1], [2, 2], Response::Numbers, 0.5, &mut Rng::new(6));
        let mut last = f64::NEG_INFINITY;
        for round in 0..200 {
            let now = tree.em(&x, &y, 3);
            assert!(now >= last - 1e-3, "round {round}: {last} to {now}");
            last = now;
        }
        let error = x.iter().zip(&y).map(|(x, y)| (tree.predict(&[*x])[0] - y).powi(2)).sum::<f32>() / 80.0;
        assert!(error < 0.02, "{error}");
    }

    /// Four classes on a ring of eight places: no two of them are parted by a line.
    fn ring() -> (Vec<f32>, Vec<f32>) {
        let (mut x, mut targets) = (Vec::new(), Vec::new());
        for i in 0..96 {
            let angle = i as f32 / 96.0 * std::f32::consts::TAU;
            x.extend([angle.cos(), angle.sin()]);
            targets.extend((0..4).map(|class| f32::from(u8::from(i / 12 % 4 == class))));
        }
        (x, targets)
    }

    fn share_right(tree: &Hierarchy, x: &[f32], targets: &[f32]) -> f32 {
        let best = |row: &[f32]| (0..row.len()).fold(0, |best, at| if row[at] > row[best] { at } else { best });
        let rows = x.chunks_exact(2).zip(targets.chunks_exact(4));
        let count = rows.len() as f32;
        rows.filter(|(x, d)| best(&tree.predict(x)) == best(d)).count() as f32 / count
    }

    #[test]
    fn classes_are_learnt_by_em_and_by_gradient() {
        let (x, targets) = ring();
        let tree = |seed| Hierarchy::random([2, 4], [2, 2], Response::Classes, 0.5, &mut Rng::new(seed));
        let (mut by_em, mut by_gradient, mut last) = (tree(3), tree(3), f64::NEG_INFINITY);
        for round in 0..150 {
            let now = by_em.em(&x, &targets, 2);
            assert!(now >= last - 1e-4, "round {round}: {last} to {now}");
            last = now;
        }
        for _ in 0..4000 {
            by_gradient.step(&x, &targets, 1.0);
        }
        let found = [&by_em, &by_gradient].map(|tree| share_right(tree, &x, &targets));
        // Without gates, one regression gets a quarter to a half.
        assert!(found.iter().all(|&share| share > 0.8), "{found:?}");
    }

    #[test]
    fn gradients_match_finite_differences() {
        let mut rng = Rng::new(4);
        let mut x = vec![0.0; 10];
        rng.fill_normal(&mut x, 1.0);
        let (mut numbers, classes) = (vec![0.0; 15], [1.0, 0.0, 0.0, 0.0, 0.0, 1.0].repeat(3)[..15].to_vec());
        rng.fill_normal(&mut numbers, 1.0);
        for (response, targets) in [(Response::Numbers, numbers), (Response::Classes, classes)] {
            let tree = Hierarchy::random([2, 3], [2, 3], response, 0.5, &mut rng);
            let (_, [top, lower, expert]) = tree.gradient(&x, &targets);
            let what = format!("{response:?}");
            moebius_testkit::check_gradient(&what, &tree.top, &top, |moved| {
                Hierarchy { top: moved.to_vec(), ..tree.clone() }.log_likelihood(&x, &targets)
            });
            moebius_testkit::check_gradient(&what, &tree.lower, &lower, |moved| {
                Hierarchy { lower: moved.to_vec(), ..tree.clone() }.log_likelihood(&x, &targets)
            });
            moebius_testkit::check_gradient(&what, &tree.expert, &expert, |moved| {
                Hierarchy { expert: moved.to_vec(), ..tree.clone() }.log_likelihood(&x, &targets)
            });
        }
    }

    #[test]
    fn equations_on_paper() {
        let (mut a, mut b) = (vec![2.0, 1.0, 1.0, 3.0], vec![4.0, 7.0]);
        solve(&mut a, &mut b, 2, 1);
        assert!((b[0] - 1.0).abs() < 1e-12 && (b[1] - 2.0).abs() < 1e-12);
    }
}
