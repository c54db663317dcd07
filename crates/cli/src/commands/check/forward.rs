//! What the forward pass gives: hidden states, routing, logits, loss, greedy tokens.

use anyhow::Context;
use moebius_engine::Session;
use moebius_kernels::gemm::Precision;
use moebius_kernels::loss::cross_entropy_rows;
use moebius_kernels::select::argmax;
use moebius_model::{Model, Silent};

use super::golden::{Case, Golden};
use super::report::{Report, Worst};
use crate::record::{Keep, Record, record};

/// Compares everything that the folder has of one case.
///
/// # Errors
/// A golden of another type, or whatever the model reports.
pub fn check(model: &Model, golden: &Golden, case: &Case, report: &mut Report) -> anyhow::Result<()> {
    let found = record(model, Precision::F32, &case.sequences, Keep { hidden: true, routing: true })?;
    let name = |quantity: &str| format!("{}.{quantity}", case.name);

    let mut worst = Worst::default();
    worst.compare_known(&name("logits"), golden.floats(&name("logits"))?.as_deref(), &found.logits);
    report.quantity(&name("logits"), &worst);

    let mut worst = Worst::default();
    for (index, hidden) in found.hidden.iter().enumerate() {
        let name = name(&format!("hidden.{index}"));
        worst.compare_known(&name, golden.floats(&name)?.as_deref(), hidden);
    }
    report.quantity(&name("hidden"), &worst);

    routing(golden, case, &found, report)?;
    greedy(model, golden, case, report)?;

    let mut worst = Worst::default();
    let loss = next_token_loss(&found.logits, case);
    worst.compare_known(&name("loss"), golden.floats(&name("loss"))?.as_deref(), &[loss]);
    report.quantity(&name("loss"), &worst);
    Ok(())
}

/// Mean cross-entropy of each sequence's tokens but the first.
fn next_token_loss(logits: &[f32], case: &Case) -> f32 {
    let targets = case.next_tokens();
    let mut losses = vec![0.0; targets.len()];
    cross_entropy_rows(logits, &targets, &mut losses);
    let sum: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
    (sum / (targets.len() - case.sequences.len()) as f64) as f32
}

/// Router logits, chosen experts, weights.
fn routing(golden: &Golden, case: &Case, found: &Record, report: &mut Report) -> anyhow::Result<()> {
    let (mut logits, mut experts, mut weights) = (Worst::default(), Worst::default(), Worst::default());
    for layer in &found.routing {
        let name = |quantity: &str| format!("{}.{quantity}.{}", case.name, layer.place);
        logits.compare_known(&name("router_logits"), golden.floats(&name("router_logits"))?.as_deref(), &layer.logits);
        let Some(wanted_experts) = golden.integers(&name("topk_index"))? else { continue };
        let wanted_weights = golden.floats(&name("topk_weight"))?;
        let found_experts: Vec<i64> = layer.experts.iter().map(|&expert| i64::from(expert)).collect();
        // The order inside a row means nothing, so both are put in the order of the experts.
        let wanted = by_expert(&wanted_experts, wanted_weights.as_deref(), layer.top_k);
        let found = by_expert(&found_experts, Some(&layer.weights), layer.top_k);
        experts.compare_count(&name("topk_index"), wanted.len(), found.len());
        for (row, ((wanted, wanted_weights), (found, found_weights))) in wanted.iter().zip(&found).enumerate() {
            let same = wanted == found;
            experts.compare_equal(same, || {
                format!("{} row {row}: wanted {wanted:?}, found {found:?}", name("topk_index"))
            });
            if same && !wanted_weights.is_empty() {
                weights.compare(&format!("{} row {row}", name("topk_weight")), wanted_weights, found_weights);
            }
        }
    }
    if !found.routing.is_empty() {
        report.quantity(&format!("{}.router_logits", case.name), &logits);
        report.exact(&format!("{}.topk_index", case.name), &experts);
        report.quantity(&format!("{}.topk_weight", case.name), &weights);
    }
    Ok(())
}

/// Rows of k experts and their weights (none where none are known), sorted by expert.
fn by_expert(experts: &[i64], weights: Option<&[f32]>, top_k: usize) -> Vec<(Vec<i64>, Vec<f32>)> {
    let row = |(row, chosen): (usize, &[i64])| {
        let mut order: Vec<usize> = (0..chosen.len()).collect();
        order.sort_by_key(|&slot| chosen[slot]);
        let weight = |&slot: &usize| weights.and_then(|weights| weights.get(row * top_k + slot)).copied();
        (order.iter().map(|&slot| chosen[slot]).collect(), order.iter().filter_map(weight).collect())
    };
    experts.chunks(top_k).enumerate().map(row).collect()
}

/// Greedy tokens with the cache, and by reading the whole sequence anew for each token.
fn greedy(model: &Model, golden: &Golden, case: &Case, report: &mut Report) -> anyhow::Result<()> {
    for (quantity, cached) in [("greedy", true), ("greedy_nocache", false)] {
        let name = format!("{}.{quantity}", case.name);
        let mut worst = Worst::default();
        if let Some(wanted) = golden.integers(&name)? {
            let length = wanted.len() / case.sequences.len();
            for (row, (prompt, wanted)) in case.sequences.iter().zip(wanted.chunks(length.max(1))).enumerate() {
                let found = continue_greedily(model, prompt, length, cached)?;
                for (at, (&wanted, &found)) in wanted.iter().zip(&found).enumerate() {
                    worst.compare_equal(wanted == i64::from(found), || {
                        format!("{name}[{row}, {at}]: wanted {wanted}, found {found}")
                    });
                }
            }
        }
        report.exact(&name, &worst);
    }
    Ok(())
}

fn continue_greedily(model: &Model, prompt: &[u32], length: usize, cached: bool) -> anyhow::Result<Vec<u32>> {
    let mut tokens = prompt.to_vec();
    let mut session = Session::new(model, Precision::F32);
    while tokens.len() < prompt.len() + length {
        if !cached {
            session = Session::new(model, Precision::F32);
        }
        let logits = session.read(&tokens[session.position()..], &mut Silent)?;
        tokens.push(argmax(&logits).context("a vocabulary")? as u32);
    }
    Ok(tokens.split_off(prompt.len()))
}
