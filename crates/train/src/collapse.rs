//! Expert collapse: a layer that sends most of its tokens to a few of its experts, named with advice.
//!
//! The load of [`WINDOW`] steps together is judged: a single step's is noise. `exp(H)` of the shares, with H their
//! entropy, says how many experts a layer has in effect: all of them when even, `experts_per_token` when the same few
//! get everything.

use serde::{Deserialize, Serialize};

use crate::Recipe;
use crate::metrics::LayerLoad;

/// Steps whose loads are judged together.
pub const WINDOW: u64 = 50;

/// An expert with less than this part of an even share is dead.
const DEAD_SHARE: f64 = 0.01;

/// A layer that has collapsed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollapseRecord {
    /// The last of the steps judged.
    pub step: u64,
    /// The layer among the sparse ones, from 0.
    pub layer: usize,
    /// Experts of the layer.
    pub experts: usize,
    /// How many it has in effect.
    pub effective_experts: f64,
    /// Experts that got next to nothing.
    pub dead: Vec<usize>,
    /// The experts that got most, enough to make up half of all.
    pub busiest: Vec<usize>,
    /// What may help, in a sentence.
    pub advice: String,
}

/// Adds a step's loads to the sums.
pub fn add(sums: &mut Vec<Vec<u64>>, load: &[LayerLoad]) {
    sums.resize_with(load.len(), Vec::new);
    for (sum, layer) in sums.iter_mut().zip(load) {
        sum.resize(layer.counts.len(), 0);
        sum.iter_mut().zip(&layer.counts).for_each(|(sum, count)| *sum += count);
    }
}

/// The collapsed layers among `sums`.
pub fn find(sums: &[Vec<u64>], step: u64, recipe: &Recipe) -> Vec<CollapseRecord> {
    let chosen = recipe.model.experts_per_token.unwrap_or(1) as f64;
    let layers = sums.iter().enumerate();
    layers.filter_map(|(layer, counts)| judge(layer, counts, step, chosen, recipe)).collect()
}

fn judge(layer: usize, counts: &[u64], step: u64, chosen: f64, recipe: &Recipe) -> Option<CollapseRecord> {
    let total = counts.iter().sum::<u64>() as f64;
    let experts = counts.len();
    if total == 0.0 || experts < 2 {
        return None;
    }
    let shares = counts.iter().map(|&count| count as f64 / total).collect::<Vec<_>>();
    let entropy: f64 = shares.iter().filter(|&&share| share > 0.0).map(|share| -share * share.ln()).sum();
    let effective_experts = entropy.exp();
    let even = 1.0 / experts as f64;
    let dead = (0..experts).filter(|&expert| shares[expert] < DEAD_SHARE * even).collect::<Vec<_>>();
    let few = effective_experts < chosen + (experts as f64 - chosen) / 3.0;
    if !few && dead.len() * 4 <= experts {
        return None;
    }
    let mut by_share = (0..experts).collect::<Vec<_>>();
    by_share.sort_by(|&a, &b| shares[b].total_cmp(&shares[a]).then(a.cmp(&b)));
    let mut sum = 0.0;
    let busiest = by_share.into_iter().take_while(|&expert| {
        let more = sum < 0.5;
        sum += shares[expert];
        more
    });
    let (busiest, advice) = (busiest.collect(), advice(recipe));
    Some(CollapseRecord { step, layer, experts, effective_experts, dead, busiest, advice })
}

/// What the recipe could say otherwise.
fn advice(recipe: &Recipe) -> String {
    let coefficient = recipe.balance.load_balancing;
    if coefficient == 0.0 {
        return "set balance.load_balancing = 0.01: nothing keeps the experts evenly loaded".to_owned();
    }
    let mut advice = format!(
        "raise balance.load_balancing (now {coefficient}) tenfold or lower optimizer.groups.router.learning_rate_factor"
    );
    if recipe.balance.z == 0.0 {
        advice.push_str("; set balance.z = 0.001 against growing router scores");
    }
    advice
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn recipe(balance: &str) -> Recipe {
        let text = format!(
            "[model]\npreset = 'moe-nano'\n[data]\ntrain = ['a']\nvalid = ['b']\n[train]\nsteps = 9\n[balance]\n{balance}"
        );
        Recipe::parse("x.toml", Path::new(""), &text).unwrap()
    }

    #[test]
    fn collapse_on_paper() {
        let recipe = recipe("load_balancing = 0");
        let find = |counts: &[u64]| find(&[counts.to_vec()], 50, &recipe).pop();
        assert_eq!(find(&[100; 8]), None);
        assert_eq!(find(&[200, 150, 120, 100, 90, 70, 40, 30]), None, "uneven, but alive");
        let two = find(&[400, 400, 0, 0, 0, 0, 0, 0]).expect("two of eight");
        assert!((two.effective_experts - 2.0).abs() < 1e-9);
        assert_eq!((two.dead, two.busiest), (vec![2, 3, 4, 5, 6, 7], vec![0]));
        assert!(two.advice.starts_with("set balance.load_balancing = 0.01"), "{}", two.advice);
        let dying = find(&[130, 130, 130, 130, 130, 0, 0, 0]).expect("three of eight are dead");
        assert_eq!((dying.dead, dying.busiest), (vec![5, 6, 7], vec![0, 1, 2]));
        assert_eq!(find(&[0; 8]), None);
    }

    #[test]
    fn the_advice_knows_the_recipe() {
        let advice = advice(&recipe("load_balancing = 0.01\nz = 0"));
        assert!(advice.contains("(now 0.01)") && advice.contains("balance.z = 0.001"), "{advice}");
    }

    #[test]
    fn loads_of_steps_add_up() {
        let load = |counts: &[u64]| LayerLoad { counts: counts.to_vec(), ..LayerLoad::default() };
        let mut sums = Vec::new();
        add(&mut sums, &[load(&[1, 2]), load(&[3, 4])]);
        add(&mut sums, &[load(&[1, 2]), load(&[3, 4])]);
        assert_eq!(sums, [[2, 4], [6, 8]]);
    }
}
