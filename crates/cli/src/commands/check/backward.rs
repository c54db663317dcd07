//! Case `a` backwards: the balance loss and the gradient of the loss by every weight.

use moebius_kernels::gemm::Precision;
use moebius_kernels::select::top_k_rows;
use moebius_model::{Batch, Loss, LossSettings, Model, named_tensors};
use moebius_moe::Routing;
use moebius_tensor::{Gradients, Graph};

use super::golden::{Case, Golden};
use super::report::{Report, Worst};

/// The routings that the reference pools: where attention heads are experts too, transformers' recorder hears their routers
/// twice.
fn counted(loss: &Loss) -> Vec<&Routing> {
    loss.mixer_routing.iter().flat_map(|routing| [routing, routing]).chain(&loss.routing).collect()
}

/// Compares with `aux.json` and `grads.safetensors`, as far as the folder has them.
///
/// # Errors
/// A golden that cannot be read, or whatever the model reports.
pub fn check(model: &Model, golden: &Golden, case: &Case, report: &mut Report) -> anyhow::Result<()> {
    let (wanted_balance, wanted_gradients) = (golden.balance_loss()?, golden.gradients()?);
    let (mut balance, mut worst) = (Worst::default(), Worst::default());
    if wanted_balance.is_some() || wanted_gradients.is_some() {
        // The gradients are those of the cross entropy alone.
        let graph = Graph::training(Precision::F32);
        let batch = Batch::of_sequences(&case.sequences);
        let loss = model.loss(&graph, &batch, &case.next_tokens(), &LossSettings::default())?;
        if let Some(wanted) = wanted_balance.and_then(|balance| balance.aux_loss) {
            // The reference pools the layers; our training balances each by itself.
            balance.compare("aux_loss", &[wanted], &[pooled_balance(&counted(&loss), model)]);
        }
        if let Some(wanted) = wanted_gradients {
            let mut gradients = Gradients::new();
            graph.backward(&loss.total, &mut gradients);
            let found = named_tensors(model, |param| gradients.get(param.id()));
            for found in &found {
                worst.compare(&found.name, &wanted.tensor(&found.name)?.to_f32()?, &found.data);
            }
            // Nothing reaches a selection bias: its gradient is zero where the reference writes one.
            let names: std::collections::HashSet<&str> = found.iter().map(|found| &found.name[..]).collect();
            for unreached in wanted.tensors().filter(|tensor| !names.contains(tensor.name)) {
                let wanted = unreached.to_f32()?;
                worst.compare(unreached.name, &wanted, &vec![0.0; wanted.len()]);
            }
        }
    }
    report.quantity(&format!("{}.aux_loss", case.name), &balance);
    report.quantity(&format!("{}.gradients", case.name), &worst);
    Ok(())
}

/// The load-balancing loss as transformers computes it: E Σ f P over the rows of all layers together, f counting the most
/// probable experts, whatever bias or group rule chose others.
fn pooled_balance(layers: &[&Routing], model: &Model) -> f32 {
    let (Some((k, _)), Some(first)) = (model.experts(), layers.first()) else { return 0.0 };
    let experts = first.plan.n_experts();
    let (mut counts, mut sums, mut rows) = (vec![0.0f64; experts], vec![0.0f64; experts], 0);
    for layer in layers {
        let probabilities = layer.probabilities.data();
        let tokens = probabilities.len() / experts;
        let (mut index, mut best) = (vec![0; tokens * k], vec![0.0; tokens * k]);
        top_k_rows(probabilities, experts, k, &mut index, &mut best);
        index.iter().for_each(|&expert| counts[expert as usize] += 1.0);
        for row in probabilities.chunks_exact(experts) {
            sums.iter_mut().zip(row).for_each(|(sum, &p)| *sum += f64::from(p));
        }
        rows += tokens;
    }
    let pairs = counts.iter().zip(&sums).map(|(count, sum)| count * sum).sum::<f64>();
    (experts as f64 * pairs / (rows * rows) as f64) as f32
}
