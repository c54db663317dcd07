//! Even loads by force, for benchmarks: `round_robin` gives token t the experts t k, t k + 1, ... modulo E, whatever the
//! scores; `quantile` (and only in training) lowers each expert's scores by the value that its k T / E best tokens reach,
//! so that experts compete by rank and not by level. Weights are softmax, renormalised. The quantile looks at the whole
//! batch.

use super::math::{normalised, row_scores, softmax};
use super::selection::{plan_of_choices, top_k_rows};
use super::{Context, Decision, RoutingMethod, Setup};
use crate::MoeError;
use moebius_tensor::{Graph, Param, Var, ops};

#[derive(Debug)]
struct Forced {
    weight: Param,
    top_k: usize,
    quantile: bool,
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    let top_k = setup.top_k_up_to(setup.experts)?;
    if top_k == 1 {
        return Err(MoeError::NoRouterGradient);
    }
    let quantile = setup.word("by", &["round_robin", "quantile"])? == 1;
    if quantile {
        setup.looks_at_the_batch()?;
    }
    Ok(Box::new(Forced { weight: setup.score_weight("router")?, top_k, quantile }))
}

/// Scores less the level that each expert's `take` best tokens reach.
fn less_quantile(scores: &[f32], experts: usize, take: usize) -> Vec<f32> {
    let levels: Vec<f32> = (0..experts)
        .map(|e| {
            let mut column: Vec<f32> = scores.iter().skip(e).step_by(experts).copied().collect();
            column.sort_by(|a, b| b.total_cmp(a));
            column.get(take.saturating_sub(1)).or(column.last()).copied().unwrap_or(0.0)
        })
        .collect();
    scores.iter().enumerate().map(|(i, score)| score - levels[i % experts]).collect()
}

impl RoutingMethod for Forced {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, _: &Context<'_>) -> Result<Decision, MoeError> {
        let logits = ops::router_logits(g, x, &self.weight)?;
        let [tokens, experts] = logits.dims()?;
        let probabilities = softmax(g, &logits)?;
        let k = self.top_k;
        let choices = match (self.quantile, g.is_training()) {
            (false, _) => (0..tokens).map(|t| (0..k).map(|i| (t * k + i) % experts).collect()).collect(),
            (true, true) => top_k_rows(&less_quantile(logits.data(), experts, k * tokens / experts), experts, k),
            (true, false) => top_k_rows(logits.data(), experts, k),
        };
        let plan = plan_of_choices(experts, &choices)?;
        let weights = normalised(g, &row_scores(g, &probabilities, &plan), &plan, 1.0);
        Ok(Decision::new(plan, weights, logits, probabilities))
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

    #[test]
    fn levels_are_taken_away() {
        // Expert 0 scores higher throughout; each still wins the tokens that it ranks high.
        let scores = [9.0, 1.0, 5.0, 4.0, 8.0, 0.0, 6.0, 3.0];
        assert_eq!(top_k_rows(&less_quantile(&scores, 2, 2), 2, 1), [[0], [1], [0], [1]]);
    }
}
