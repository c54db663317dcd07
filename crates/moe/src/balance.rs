//! Losses that keep the experts' load even and the router's scores small.

use crate::{LoadStatistics, Routing};
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Place, Tensor, Var};

/// E Σ_e f_e P_e, with f_e the mean number of choices of expert e a token and P_e its mean probability, over the tokens
/// of all layers together (Fedus et al. 2021, pooled as transformers' Mixtral does). About k when the load is even; the
/// counts have no gradient. Zero without tokens.
pub fn load_balancing_loss<'p>(g: &Graph<'p>, layers: &[&Routing]) -> Var {
    let experts = layers.first().map_or(0, |routing| routing.plan.n_experts());
    let mut load = LoadStatistics::default();
    for routing in layers {
        assert_eq!(routing.plan.n_experts(), experts, "layers that are pooled have the same experts");
        load.add(&routing.plan);
    }
    loss_over(g, layers, &load)
}

/// E Σ_e f_e P_e, with f_e the choices of expert e a token in all of `load`, to which this batch may belong, and P_e its
/// mean probability in this batch (Qiu et al. 2025, "Demons in the Detail"). The mean over batches of one size of the
/// losses with the load of all of them is the loss of one batch made of them. Zero without tokens.
pub fn load_balancing_loss_over<'p>(g: &Graph<'p>, layer: &Routing, load: &LoadStatistics) -> Var {
    loss_over(g, &[layer], load)
}

fn loss_over<'p>(g: &Graph<'p>, layers: &[&Routing], load: &LoadStatistics) -> Var {
    let experts = load.counts.len();
    let tokens: usize = layers.iter().map(|routing| routing.plan.n_tokens()).sum();
    if tokens == 0 || load.tokens == 0 {
        return Var::constant(Tensor::scalar(0.0));
    }
    let mut sums = vec![0f64; experts];
    for routing in layers {
        for row in routing.probabilities.data().chunks_exact(experts) {
            sums.iter_mut().zip(row).for_each(|(sum, &p)| *sum += f64::from(p));
        }
    }
    let factor = experts as f64 / (load.tokens as f64 * tokens as f64);
    let counts = &load.counts;
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
            let dloss = dloss[0];
            let slopes = (probabilities.data().chunks_exact(*experts).zip(lse))
                .flat_map(|(row, &z)| row.iter().map(move |&p| 2.0 * z * p * dloss / tokens as f32));
            back.give(*to_logits, slopes.collect::<Buffer<f32>>());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Router, TopKRouter};
    use moebius_kernels::gemm::Precision;
    use moebius_tensor::{Gradients, Param};

    /// A top-k router over 4 experts whose scores are its input, ln of the probabilities given.
    fn route<'p>(router: &'p TopKRouter, g: &Graph<'p>, probabilities: &[[f32; 4]]) -> Routing {
        let logits = probabilities.iter().flatten().map(|p| p.ln()).collect::<Vec<_>>();
        router.route(g, &Var::constant(Tensor::new(&[probabilities.len(), 4], logits))).unwrap()
    }

    fn router(top_k: usize) -> TopKRouter {
        let identity = (0..16).map(|i| f32::from(u8::from(i % 5 == 0))).collect::<Vec<_>>();
        TopKRouter::new(Param::new(0, "gate", Tensor::new(&[4, 4], identity)), top_k, false).unwrap()
    }

    fn close(found: &[f32], wanted: f32) {
        assert!((found[0] - wanted).abs() < 1e-5, "{found:?}, wanted {wanted}");
    }

    #[test]
    fn balance_on_paper() {
        let [one, two] = [router(1), router(2)];
        let g = Graph::inference(Precision::F32);
        // Each expert is first choice once: f = 1/4 each, so 4 Σ P / 4 = 1, whatever the probabilities.
        let even = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]];
        close(load_balancing_loss(&g, &[&route(&one, &g, &even)]).data(), 1.0);
        // All on the first expert: f = (1, 0, 0, 0), P = (0.7, ..): 4 * 0.7.
        let collapsed = [even[0]; 4];
        close(load_balancing_loss(&g, &[&route(&one, &g, &collapsed)]).data(), 2.8);
        // Two choices: f counts both, 4 * (0.7 + 0.1) where all fall on experts 0 and 1.
        close(load_balancing_loss(&g, &[&route(&two, &g, &collapsed)]).data(), 3.2);
        // Two layers that collapse onto other experts: pooled, f = (1/2, 1/2, 0, 0), P = (0.4, 0.4, ..).
        let other = [even[1]; 4];
        let layers = [route(&one, &g, &collapsed), route(&one, &g, &other)];
        close(load_balancing_loss(&g, &[&layers[0], &layers[1]]).data(), 4.0 * 0.4);
        assert_eq!(load_balancing_loss(&g, &[]).data(), [0.0]);
    }

    #[test]
    fn micro_batches_that_are_uneven_alone_are_even_together() {
        let router = router(1);
        let g = Graph::inference(Precision::F32);
        // Expert 0 alone has the first batch, expert 1 the second: f = (1/2, 1/2, 0, 0) over both.
        let batches = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]].map(|p| route(&router, &g, &[p; 4]));
        let mut load = LoadStatistics::default();
        batches.iter().for_each(|batch| load.add(&batch.plan));
        assert_eq!((&load.counts[..], load.tokens), (&[4, 4, 0, 0][..], 8));
        for batch in &batches {
            close(load_balancing_loss(&g, &[batch]).data(), 2.8);
            close(load_balancing_loss_over(&g, batch, &load).data(), 4.0 * (0.7 + 0.1) / 2.0);
        }
        // As of one batch of both.
        close(load_balancing_loss(&g, &[&batches[0], &batches[1]]).data(), 4.0 * (0.7 + 0.1) / 2.0);
        assert_eq!(load_balancing_loss_over(&g, &batches[0], &LoadStatistics::default()).data(), [0.0]);
    }

    #[test]
    fn z_loss_on_paper() {
        let router = router(1);
        let g = Graph::inference(Precision::F32);
        // The logits are ln p, so their logsumexp is ln 1 = 0; with all scaled by e it is 1.
        let even = [[0.25; 4]; 3];
        close(z_loss(&g, &[&route(&router, &g, &even)]).data(), 0.0);
        let raised = [[0.25 * std::f32::consts::E; 4]; 3];
        close(z_loss(&g, &[&route(&router, &g, &raised)]).data(), 1.0);
        // A mean over tokens, not over layers.
        let layers = [route(&router, &g, &even), route(&router, &g, &raised[..1])];
        close(z_loss(&g, &[&layers[0], &layers[1]]).data(), 0.25);
        // Large scores do not overflow.
        let x = Var::constant(Tensor::new(&[1, 4], vec![200.0, 0.0, 0.0, 0.0]));
        close(z_loss(&g, &[&router.route(&g, &x).unwrap()]).data(), 40000.0);
        assert_eq!(z_loss(&g, &[]).data(), [0.0]);
    }

    #[test]
    fn a_layer_without_tokens_adds_nothing() {
        let router = router(2);
        let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
        let layers = [route(&router, &g, &[[0.4, 0.3, 0.2, 0.1]]), route(&router, &g, &[])];
        let both: Vec<Var> = [load_balancing_loss, z_loss].map(|loss| loss(&g, &[&layers[0], &layers[1]])).into();
        for (loss, both) in [load_balancing_loss, z_loss].iter().zip(&both) {
            assert_eq!(loss(&g, &[&layers[0]]).data(), both.data());
        }
        g.backward_from(&[(&both[0], &[1.0]), (&both[1], &[1.0])], &mut gradients);
        assert!(gradients.get(0).is_some());
    }
}
