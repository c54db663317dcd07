//! Balance losses: all are linear in the mean probability of each expert, with slopes counted without a gradient.

use super::math::scalar;
use moebius_tensor::{Graph, Var};

/// Σ_e slope_e · mean over tokens of p_te.
pub(super) fn linear_loss<'p>(g: &Graph<'p>, probabilities: &Var, slopes: &[f64]) -> Var {
    let tokens = (probabilities.data().len() / slopes.len().max(1)).max(1) as f64;
    let rows = probabilities.data().chunks_exact(slopes.len());
    let value: f64 = rows.map(|row| row.iter().zip(slopes).map(|(&p, s)| f64::from(p) * s / tokens).sum::<f64>()).sum();
    let each = (0..probabilities.data().len()).map(|i| (slopes[i % slopes.len()] / tokens) as f32).collect();
    scalar(g, value, vec![(probabilities, each)])
}

/// E Σ_e f_e P_e, f_e the share of the counts (Fedus et al. 2021, eq. 4): 1 when even.
pub(super) fn share_loss<'p>(g: &Graph<'p>, probabilities: &Var, counts: &[u64]) -> Var {
    let total = counts.iter().sum::<u64>().max(1) as f64;
    let slopes: Vec<f64> = counts.iter().map(|&count| counts.len() as f64 * count as f64 / total).collect();
    linear_loss(g, probabilities, &slopes)
}

/// DeepSeek-V3's sequence-wise loss (2024, eqs. 17-20): for each sequence Σ_i f_i P_i with f_i = E / (K T) times the
/// tokens that chose i, and P_i the mean of s_i / Σ_j s_j; the mean over sequences. `chosen` `[tokens, experts]` says
/// which experts a token has before any bias.
pub fn sequence_balance_loss<'p>(g: &Graph<'p>, scores: &Var, chosen: &[bool], k: usize, starts: &[usize]) -> Var {
    let [tokens, experts] = *scores.shape() else { panic!("scores are [tokens, experts]") };
    let whole = [0, tokens];
    let starts = if starts.len() < 2 { &whole[..] } else { starts };
    let (mut value, mut slopes) = (0.0, vec![0.0; tokens * experts]);
    for bounds in starts.windows(2) {
        let range = bounds[0] * experts..bounds[1] * experts;
        let length = (bounds[1] - bounds[0]).max(1) as f64;
        let mut f = vec![0.0; experts];
        chosen[range.clone()].chunks_exact(experts).for_each(|row| {
            f.iter_mut()
                .zip(row)
                .for_each(|(f, &c)| *f += f64::from(u8::from(c)) * experts as f64 / (k as f64 * length));
        });
        let share = 1.0 / (length * (starts.len() - 1) as f64);
        let rows = scores.data()[range.clone()].chunks_exact(experts).zip(slopes[range].chunks_exact_mut(experts));
        for (row, slopes) in rows {
            let sum = row.iter().map(|&s| f64::from(s)).sum::<f64>().max(1e-20);
            let mean: f64 = row.iter().zip(&f).map(|(&s, f)| f64::from(s) * f / sum).sum();
            value += share * mean;
            slopes.iter_mut().zip(&f).for_each(|(slope, f)| *slope = (share * (f - mean) / sum) as f32);
        }
    }
    scalar(g, value, vec![(scores, slopes)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use moebius_kernels::gemm::Precision;
    use moebius_tensor::Tensor;

    #[test]
    fn sequences_are_balanced_one_by_one() {
        // Each of two sequences uses one expert alone: even together, as uneven as can be by sequence.
        let g = Graph::inference(Precision::F32);
        let s = Var::constant(Tensor::new(&[2, 2], vec![0.9, 0.1, 0.1, 0.9]));
        let chosen = [true, false, false, true];
        let together = sequence_balance_loss(&g, &s, &chosen, 1, &[]).data()[0];
        let apart = sequence_balance_loss(&g, &s, &chosen, 1, &[0, 1, 2]).data()[0];
        assert!((together - 1.0).abs() < 1e-6 && (apart - 1.8).abs() < 1e-6, "{together} {apart}");
    }
}
