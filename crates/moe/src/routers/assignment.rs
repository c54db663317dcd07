//! Balanced assignment by auction (Bertsekas 1979, with similar objects: Bertsekas and Castañon 1989).

/// The expert of each token, at most ⌈tokens / experts⌉ tokens an expert, of the largest sum of affinities `[tokens,
/// experts]` but for at most `tokens` · `epsilon`.
///
/// Each token bids for a place at the expert where affinity less price is largest: the price rises by the lead over the
/// next expert and by `epsilon`, and who held the cheapest place there goes back to bid again.
pub fn auction(affinities: &[f32], experts: usize, epsilon: f64) -> Vec<usize> {
    let tokens = affinities.len() / experts.max(1);
    let places = tokens.div_ceil(experts.max(1));
    if experts == 1 {
        return vec![0; tokens];
    }
    // Without spare places every price must be paid; spare ones cost nothing, as the theory wants of places left free.
    let mut held: Vec<Vec<(f64, usize)>> = vec![Vec::new(); experts];
    let mut expert_of = vec![0; tokens];
    let mut waiting: Vec<usize> = (0..tokens).rev().collect();
    while let Some(token) = waiting.pop() {
        let price = |e: usize| {
            let full = held[e].len() == places;
            if full { held[e].iter().map(|holder| holder.0).fold(f64::INFINITY, f64::min) } else { 0.0 }
        };
        let value = |e: usize| f64::from(affinities[token * experts + e]) - price(e);
        let (mut best, mut second) = ((f64::NEG_INFINITY, 0), f64::NEG_INFINITY);
        for e in 0..experts {
            let v = value(e);
            if v > best.0 {
                second = best.0;
                best = (v, e);
            } else {
                second = second.max(v);
            }
        }
        let expert = best.1;
        let bid = price(expert) + best.0 - second + epsilon;
        if held[expert].len() == places {
            let cheapest = (0..places).min_by(|&a, &b| held[expert][a].0.total_cmp(&held[expert][b].0)).unwrap_or(0);
            waiting.push(held[expert].swap_remove(cheapest).1);
        }
        held[expert].push((bid, token));
        expert_of[token] = expert;
    }
    expert_of
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The largest sum over all balanced assignments.
    fn best(affinities: &[f32], experts: usize, counts: &mut Vec<usize>, token: usize) -> f64 {
        let tokens = affinities.len() / experts;
        if token == tokens {
            return 0.0;
        }
        let mut largest = f64::NEG_INFINITY;
        for e in 0..experts {
            if counts[e] < tokens / experts {
                counts[e] += 1;
                let rest = best(affinities, experts, counts, token + 1);
                largest = largest.max(f64::from(affinities[token * experts + e]) + rest);
                counts[e] -= 1;
            }
        }
        largest
    }

    #[test]
    fn the_loser_of_least_moves() {
        // Both want expert 0; token 1 loses 0.1 elsewhere, token 0 loses 0.8.
        assert_eq!(auction(&[0.9, 0.1, 0.8, 0.7], 2, 1e-3), [0, 1]);
    }

    proptest! {
        #[test]
        fn exact_counts_and_nearly_the_best_sum(affinities in proptest::collection::vec(-3f32..3.0, 18)) {
            let found = auction(&affinities, 3, 1e-3);
            for e in 0..3 {
                prop_assert_eq!(found.iter().filter(|&&f| f == e).count(), 2);
            }
            let sum: f64 = found.iter().enumerate().map(|(t, &e)| f64::from(affinities[t * 3 + e])).sum();
            prop_assert!(sum >= best(&affinities, 3, &mut vec![0; 3], 0) - 6e-3 - 1e-5);
        }
    }
}
