//! Choosing and filling: top-k by token, capacity, plans from pairs.

use crate::{MoeError, Plan};
use std::rc::Rc;

/// The indices of the `k` largest of `scores`, largest first, ties to the lower index.
pub(super) fn top_k(scores: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(k);
    order
}

/// The `k` best of each row of `scores` `[tokens, experts]`.
pub(super) fn top_k_rows(scores: &[f32], experts: usize, k: usize) -> Vec<Vec<usize>> {
    scores.chunks_exact(experts).map(|row| top_k(row, k)).collect()
}

/// The plan of pairs (token, expert); a token's slots follow the order of its pairs.
pub(super) fn plan_of(
    n_tokens: usize,
    n_experts: usize,
    pairs: impl IntoIterator<Item = (usize, usize)>,
) -> Result<Rc<Plan>, MoeError> {
    let mut by_expert = vec![Vec::new(); n_experts];
    let mut slots = vec![0u32; n_tokens];
    for (token, expert) in pairs {
        by_expert[expert].push((token as u32, slots[token]));
        slots[token] += 1;
    }
    let mut offsets = vec![0];
    let (mut token, mut slot) = (Vec::new(), Vec::new());
    for rows in &mut by_expert {
        rows.sort_unstable();
        token.extend(rows.iter().map(|row| row.0));
        slot.extend(rows.iter().map(|row| row.1));
        offsets.push(token.len());
    }
    Ok(Rc::new(Plan::from_rows(n_tokens, offsets, token, slot)?))
}

/// The plan of all tokens' choices, none dropped.
pub(super) fn plan_of_choices(n_experts: usize, choices: &[Vec<usize>]) -> Result<Rc<Plan>, MoeError> {
    let pairs = choices.iter().enumerate().flat_map(|(t, chosen)| chosen.iter().map(move |&expert| (t, expert)));
    plan_of(choices.len(), n_experts, pairs)
}

/// C = ⌈factor · k · tokens / experts⌉ (Fedus et al. 2021, eq. 3; times k for more choices).
///
/// # Errors
/// Less than one token a capacity: then some expert could never compute.
pub(super) fn capacity(
    router: &'static str,
    factor: f64,
    k: usize,
    tokens: usize,
    experts: usize,
) -> Result<usize, MoeError> {
    let rows = factor * (k * tokens) as f64 / experts as f64;
    if rows < 1.0 && tokens > 0 {
        let reason = format!(
            "capacity of {rows:.3} tokens an expert ({factor} * {k} * {tokens} tokens / {experts} experts), wanted at \
             least 1; raise capacity_factor or the tokens of a group"
        );
        return Err(MoeError::Refused { router, reason });
    }
    // So that 1.25 * 8 / 2, which binary numbers may push above, does not gain a row.
    Ok((rows - 1e-9).ceil() as usize)
}

/// The fewest tokens with which [`capacity`] refuses nothing.
pub(super) fn least_tokens(factor: f64, k: usize, experts: usize) -> usize {
    (experts as f64 / (factor * k as f64) - 1e-9).ceil() as usize
}

/// Takes choices in the order given until their expert has `capacity` rows; gives what was taken, in order, and how many
/// were dropped.
pub(super) fn fill(
    n_experts: usize,
    capacity: usize,
    choices: impl IntoIterator<Item = (usize, usize)>,
) -> (Vec<(usize, usize)>, usize) {
    let (mut counts, mut dropped, mut taken) = (vec![0; n_experts], 0, Vec::new());
    for (token, expert) in choices {
        if counts[expert] < capacity {
            counts[expert] += 1;
            taken.push((token, expert));
        } else {
            dropped += 1;
        }
    }
    (taken, dropped)
}

/// All first choices, then all second ones, and so on, of tokens in the order given.
pub(super) fn by_rank<'a>(
    order: &'a [usize],
    choices: &'a [Vec<usize>],
    k: usize,
) -> impl Iterator<Item = (usize, usize)> + 'a {
    (0..k).flat_map(move |rank| order.iter().filter_map(move |&t| Some((t, *choices[t].get(rank)?))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn capacity_on_paper() {
        assert_eq!(capacity("r", 1.25, 1, 16, 4).unwrap(), 5);
        assert_eq!(capacity("r", 1.0, 2, 5, 4).unwrap(), 3);
        let message = capacity("r", 0.5, 1, 4, 4).unwrap_err().to_string();
        assert!(message.starts_with("router r: capacity of 0.500 tokens an expert"), "{message}");
        for (factor, k, experts) in [(0.5, 1, 4), (1.25, 2, 16), (0.07, 1, 3)] {
            let least = least_tokens(factor, k, experts);
            assert!(capacity("r", factor, k, least, experts).is_ok());
            assert!(least == 1 || capacity("r", factor, k, least - 1, experts).is_err());
        }
    }

    #[test]
    fn first_choices_fill_before_second_ones() {
        let choices = [vec![0, 1], vec![1, 0], vec![0, 1]];
        let (taken, dropped) = fill(2, 2, by_rank(&[0, 1, 2], &choices, 2));
        assert_eq!((taken, dropped), (vec![(0, 0), (1, 1), (2, 0), (0, 1)], 2));
    }

    proptest! {
        #[test]
        fn filling_keeps_order_and_capacity(
            experts in proptest::collection::vec(0usize..5, 0..60), capacity in 1usize..9,
        ) {
            let choices: Vec<(usize, usize)> = experts.iter().copied().enumerate().collect();
            let (taken, dropped) = fill(5, capacity, choices.iter().copied());
            prop_assert_eq!(taken.len() + dropped, choices.len());
            let plan = plan_of(experts.len(), 5, taken.iter().copied()).unwrap();
            for (expert, &count) in plan.counts().iter().enumerate() {
                let wanted: Vec<u32> =
                    choices.iter().filter(|c| c.1 == expert).take(capacity).map(|c| c.0 as u32).collect();
                prop_assert_eq!(count, wanted.len());
                prop_assert_eq!(&plan.token()[plan.offsets()[expert]..plan.offsets()[expert + 1]], &wanted[..]);
            }
        }
    }
}
