//! Case `a` backwards: the balance loss and the gradient of the loss by every weight.

use moebius_kernels::gemm::Precision;
use moebius_model::{Batch, Loss, LossSettings, Model, named_tensors};
use moebius_moe::{Routing, load_balancing_loss};
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
            let pooled = load_balancing_loss(&graph, &counted(&loss));
            balance.compare("aux_loss", &[wanted], pooled.data());
        }
        if let Some(wanted) = wanted_gradients {
            let mut gradients = Gradients::new();
            graph.backward(&loss.total, &mut gradients);
            let found = named_tensors(model, |param| gradients.get(param.id()));
            for found in &found {
                worst.compare(&found.name, &wanted.tensor(&found.name)?.to_f32()?, found.data);
            }
            worst.compare_count("gradients of tensors", wanted.tensors().count(), found.len());
        }
    }
    report.quantity(&format!("{}.aux_loss", case.name), &balance);
    report.quantity(&format!("{}.gradients", case.name), &worst);
    Ok(())
}
