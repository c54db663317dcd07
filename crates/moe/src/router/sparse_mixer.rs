//! SparseMixer as Phi-3.5-MoE infers with it (Liu et al. 2023; Abdin et al. 2024): the best expert, weighed by a softmax
//! over the logits that are nearly as good, then the same again without it. A token's weights do not sum to one.

use super::Routing;
use crate::{MoeError, Plan};
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Tensor, Var};
use std::rc::Rc;

/// Routes by logits `[tokens, experts]`.
pub(super) fn route<'p>(
    g: &Graph<'p>,
    jitter: f32,
    k: usize,
    logits: Var,
    probabilities: Var,
) -> Result<Routing, MoeError> {
    let [tokens, experts] = logits.dims()?;
    // `[tokens, k, experts]`: the softmax that weighs each choice.
    let mut gates = Buffer::<f32>::zeroed(tokens * k * experts);
    let mut index = vec![0; tokens * k];
    for (token, logits) in logits.data().chunks_exact(experts).enumerate() {
        let chosen = &mut index[token * k..(token + 1) * k];
        for slot in 0..k {
            let (before, rest) = chosen.split_at_mut(slot);
            let gates = &mut gates[(token * k + slot) * experts..][..experts];
            rest[0] = choose(logits, before, jitter, gates);
        }
    }
    let by_token: Buffer<f32> =
        index.iter().enumerate().map(|(choice, &expert)| gates[choice * experts + expert as usize]).collect();
    let plan = Rc::new(Plan::from_choices(experts, k, &index)?);
    let rows = plan.rows_of_token().1;
    let mut by_row = Buffer::scratch(rows.len());
    rows.iter().zip(by_token.iter()).for_each(|(&row, &weight)| by_row[row as usize] = weight);
    let topk_weight = Tensor::new(&[tokens, k], by_token);
    let (to_logits, backward_plan, chosen) = (logits.place(), plan.clone(), index.clone());
    let output = Tensor::new(&[by_row.len()], by_row);
    let weights = g.record_from(&[&logits], output, move |dw, back| {
        let rows = backward_plan.rows_of_token().1;
        let Some(dlogits) = back.sum_of(to_logits) else { return };
        for (choice, gates) in gates.chunks_exact(experts).enumerate() {
            // The slope of a softmax: w (δ − p).
            let (expert, d) = (chosen[choice] as usize, dw[rows[choice] as usize]);
            let dlogits = &mut dlogits[choice / k * experts..][..experts];
            let slope = d * gates[expert];
            dlogits.iter_mut().zip(gates).for_each(|(to, p)| *to -= slope * p);
            dlogits[expert] += slope;
        }
    });
    Ok(Routing::of_family(plan, weights, logits, probabilities, (index, topk_weight)))
}

/// The best expert that is not among `taken`; `gates` becomes the softmax over it and those nearly as good.
fn choose(logits: &[f32], taken: &[u32], jitter: f32, gates: &mut [f32]) -> u32 {
    let (mut best, mut top) = (0, f32::NEG_INFINITY);
    for (expert, &logit) in logits.iter().enumerate() {
        if logit > top && !taken.contains(&(expert as u32)) {
            (best, top) = (expert, logit);
        }
    }
    let mut sum = 0.0;
    for (expert, (gate, &logit)) in gates.iter_mut().zip(logits).enumerate() {
        let far = (top - logit) / logit.abs().max(top) > 2.0 * jitter;
        let out = taken.contains(&(expert as u32)) || far;
        *gate = if out { 0.0 } else { (logit - top).exp() };
        sum += *gate;
    }
    gates.iter_mut().for_each(|gate| *gate /= sum);
    best as u32
}
