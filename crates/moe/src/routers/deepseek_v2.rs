//! DeepSeek-V2 (2024, section 2.2): experts stand on D devices; a token may use those of the M devices with its highest
//! single scores, and takes the k best of them with weight p · scale, not renormalised. Three losses, each linear in the
//! mean probabilities P: expert Σ f_i P_i, f_i = E / (K T) times i's tokens; device Σ f'_d P'_d, f'_d the mean of f and P'_d
//! the sum of P over d's experts; communication Σ f''_d P'_d, f''_d = D / (M T) times the tokens sent to d.

use super::balancing::linear_loss;
use super::math::{row_scores, softmax};
use super::selection::{plan_of_choices, top_k};
use super::{AuxiliaryLoss, Context, Decision, RoutingMethod, Setup};
use crate::{MoeError, Plan};
use moebius_tensor::{Graph, Param, Var, ops};

#[derive(Debug)]
struct DeepseekV2 {
    weight: Param,
    top_k: usize,
    devices: usize,
    most_devices: usize,
    scale: f32,
    /// Of the expert, device and communication losses.
    coefficients: [f32; 3],
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    let devices = setup.count("devices", 1, 1..=setup.experts)?;
    if !setup.experts.is_multiple_of(devices) {
        let reason = format!("wanted devices that divide the {} experts, found {devices}", setup.experts);
        return Err(setup.refuse(reason));
    }
    let most_devices = setup.count("devices_per_token", 3.min(devices), 1..=devices)?;
    let top_k = setup.top_k_up_to(setup.experts / devices * most_devices)?;
    Ok(Box::new(DeepseekV2 {
        weight: setup.score_weight("router")?,
        top_k,
        devices,
        most_devices,
        scale: setup.number("scale", 1.0, 1e-6..=1e6)? as f32,
        coefficients: [
            setup.number("expert_balance", 0.003, 0.0..=10.0)? as f32,
            setup.number("device_balance", 0.05, 0.0..=10.0)? as f32,
            setup.number("communication_balance", 0.02, 0.0..=10.0)? as f32,
        ],
    }))
}

impl DeepseekV2 {
    fn choose(&self, row: &[f32]) -> Vec<usize> {
        let width = row.len() / self.devices;
        let best: Vec<f32> =
            row.chunks_exact(width).map(|group| group.iter().copied().fold(f32::NEG_INFINITY, f32::max)).collect();
        let mut open = vec![f32::NEG_INFINITY; row.len()];
        for device in top_k(&best, self.most_devices) {
            let mine = device * width..(device + 1) * width;
            open[mine.clone()].copy_from_slice(&row[mine]);
        }
        top_k(&open, self.top_k)
    }

    /// Slopes by expert of the three losses.
    fn slopes(&self, plan: &Plan) -> [Vec<f64>; 3] {
        let (tokens, experts) = (plan.n_tokens().max(1) as f64, plan.n_experts());
        let width = experts / self.devices;
        let factor = experts as f64 / (self.top_k as f64 * tokens);
        let f: Vec<f64> = plan.counts().iter().map(|&count| factor * count as f64).collect();
        let mean = |d: usize| f[d * width..(d + 1) * width].iter().sum::<f64>() / width as f64;
        let device: Vec<f64> = (0..experts).map(|e| mean(e / width)).collect();
        let mut sent = vec![0.0; self.devices];
        for (d, sent) in sent.iter_mut().enumerate() {
            let mut mine = plan.token()[plan.offsets()[d * width]..plan.offsets()[(d + 1) * width]].to_vec();
            mine.sort_unstable();
            mine.dedup();
            *sent = self.devices as f64 / (self.most_devices as f64 * tokens) * mine.len() as f64;
        }
        let communication = (0..experts).map(|e| sent[e / width]).collect();
        [f, device, communication]
    }
}

impl RoutingMethod for DeepseekV2 {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, _: &Context<'_>) -> Result<Decision, MoeError> {
        let logits = ops::router_logits(g, x, &self.weight)?;
        let [_, experts] = logits.dims()?;
        let probabilities = softmax(g, &logits)?;
        let choices: Vec<_> = probabilities.data().chunks_exact(experts).map(|row| self.choose(row)).collect();
        let plan = plan_of_choices(experts, &choices)?;
        let weights = ops::scale(g, &row_scores(g, &probabilities, &plan), self.scale);
        let named = ["expert", "device", "communication"].into_iter().zip(self.coefficients);
        let losses = named.zip(self.slopes(&plan)).map(|((name, coefficient), slopes)| AuxiliaryLoss {
            name,
            coefficient,
            value: linear_loss(g, &probabilities, &slopes),
        });
        let losses = losses.collect();
        Ok(Decision { losses, ..Decision::new(plan, weights, logits, probabilities) })
    }

    fn params(&self) -> Vec<&Param> {
        vec![&self.weight]
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        vec![&mut self.weight]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moebius_tensor::Tensor;

    #[test]
    fn devices_on_paper() {
        let router = DeepseekV2 {
            weight: Param::new(0, "w", Tensor::zeros(&[4, 1])),
            top_k: 2,
            devices: 2,
            most_devices: 1,
            scale: 1.0,
            coefficients: [0.0; 3],
        };
        // Device 0 has the single best expert, though device 1 has two good ones.
        assert_eq!(router.choose(&[0.4, 0.0, 0.3, 0.3]), [0, 1]);
        let plan = plan_of_choices(4, &[vec![0, 1], vec![0, 1], vec![2, 3]]).unwrap();
        let [expert, device, communication] = router.slopes(&plan);
        for (found, wanted) in [(expert, [4.0 / 3.0, 2.0 / 3.0]), (device, [4.0 / 3.0, 2.0 / 3.0])] {
            assert!((found[0] - wanted[0]).abs() < 1e-9 && (found[2] - wanted[1]).abs() < 1e-9, "{found:?}");
        }
        assert!((communication[0] - 4.0 / 3.0).abs() < 1e-9 && (communication[3] - 2.0 / 3.0).abs() < 1e-9);
    }
}
