//! Losses that keep the experts' load even and the router's scores small.

use crate::Routing;
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Place, Tensor, Var};

/// E Σ_e f_e P_e, with f_e the mean number of choices of expert e a token and P_e its mean probability, over the tokens
/// of all layers together (Fedus et al. 2021, pooled as transformers' Mixtral does). About k when the load is even; the
/// counts have no gradient. Zero without tokens.
pub fn load_balancing_loss<'p>(g: &Graph<'p>, layers: &[&Routing]) -> Var {
    let experts = layers.first().map_or(0, |routing| routing.plan.n_experts());
    let tokens: usize = layers.iter().map(|routing| routing.plan.n_tokens()).sum();
    if tokens == 0 {
        return Var::constant(Tensor::scalar(0.0));
    }
    let (mut counts, mut sums) = (vec![0usize; experts], vec![0f64; experts]);
    for routing in layers {
        assert_eq!(routing.plan.n_experts(), experts, "layers that are pooled have the same experts");
        counts.iter_mut().zip(routing.plan.counts()).for_each(|(sum, count)| *sum += count);
        for row in routing.probabilities.data().chunks_exact(experts) {
            sums.iter_mut().zip(row).for_each(|(sum, &p)| *sum += f64::from(p));
        }
    }
    let factor = experts as f64 / (tokens as f64 * tokens as f64);
    let value: f64 = counts.iter().zip(&sums).map(|(&count, sum)| factor * count as f64 * sum).sum();
    let places: Vec<Place> = layers.iter().map(|routing| routing.probabilities.place()).collect();
    let slopes: Vec<f32> = counts.iter().map(|&count| (factor * count as f64) as f32).collect();
    let vars: Vec<&Var> = layers.iter().map(|routing| &routing.probabilities).collect();
    g.record_from(&vars, Tensor::scalar(value as f32), move |dloss, back| {
        for &to_probabilities in &places {
            let Some(dp) = back.sum_of(to_probabilities) else { continue };
            for row in dp.chunks_exact_mut(slopes.len()) {
                row.iter_mut().zip(&slopes).for_each(|(dp, slope)| *dp += dloss[0] * slope);
            }
        }
    })
}

/// Mean over the tokens of all layers of logsumexp(logits)² (Zoph et al. 2022): pulls the scores towards zero, where
/// f32 and bf16 are precise.
pub fn z_loss<'p>(g: &Graph<'p>, layers: &[&Routing]) -> Var {
    let tokens: usize = layers.iter().map(|routing| routing.plan.n_tokens()).sum();
    if tokens == 0 {
        return Var::constant(Tensor::scalar(0.0));
    }
    let log_sum_exp = |routing: &&Routing| -> Vec<f32> {
        let rows = routing.logits.data().chunks_exact(routing.plan.n_experts());
        rows.map(|row| {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            max + row.iter().map(|&logit| (logit - max).exp()).sum::<f32>().ln()
        })
        .collect()
    };
    let lse: Vec<Vec<f32>> = layers.iter().map(log_sum_exp).collect();
    let value = lse.iter().flatten().map(|&z| f64::from(z) * f64::from(z)).sum::<f64>() / tokens as f64;
    let input =
        |routing: &&Routing| (routing.logits.place(), routing.probabilities.value().clone(), routing.plan.n_experts());
    let inputs: Vec<(Place, Tensor, usize)> = layers.iter().map(input).collect();
    let vars: Vec<&Var> = layers.iter().map(|routing| &routing.logits).collect();
    g.record_from(&vars, Tensor::scalar(value as f32), move |dloss, back| {
        for ((to_logits, probabilities, experts), lse) in inputs.iter().zip(&lse) {
            // d lse² / d logit = 2 lse p.
            let factor = 2.0 * dloss[0] / tokens as f32;
            let slopes = (probabilities.data().chunks_exact(*experts).zip(lse))
                .flat_map(|(row, &z)| row.iter().map(move |&p| factor * z * p));
            back.give(*to_logits, slopes.collect::<Buffer<f32>>());
        }
    })
}
