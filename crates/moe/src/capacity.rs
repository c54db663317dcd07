//! Capacity by sequence, as the Switch Transformers of Hugging Face count it: an expert takes the first so many tokens of
//! each sequence that choose it; the others get nothing from it, and the residual carries them.

use crate::{MoeError, Plan, Routing};
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Tensor, Var};
use std::rc::Rc;

/// Takes out of a routing with one expert a token what goes beyond `capacity`. A token that is taken out keeps its logits and
/// probabilities; its `topk_index` is `u32::MAX`.
///
/// With `counts` (one a sequence, `[experts]`; none: zeros), what each expert took before counts too, and is moved on.
///
/// # Errors
/// More than one expert a token.
pub fn limit_by_sequence<'p>(
    g: &Graph<'p>,
    routing: Routing,
    starts: &[usize],
    capacity: usize,
    counts: &mut [&mut [u32]],
) -> Result<Routing, MoeError> {
    let (tokens, experts) = (routing.plan.n_tokens(), routing.plan.n_experts());
    if routing.topk_index.len() != tokens {
        let found = routing.topk_index.len();
        return Err(MoeError::Plan(format!("capacity: wanted one choice for each of {tokens} tokens, found {found}")));
    }
    let mut index = routing.topk_index.clone();
    for (sequence, bounds) in starts.windows(2).enumerate() {
        let mut fresh = vec![0; experts];
        let taken = counts.get_mut(sequence).map_or(&mut fresh[..], |counts| &mut counts[..]);
        for chosen in &mut index[bounds[0]..bounds[1]] {
            let taken = &mut taken[*chosen as usize];
            if *taken as usize >= capacity {
                *chosen = u32::MAX;
            } else {
                *taken += 1;
            }
        }
    }
    if index == routing.topk_index {
        return Ok(routing);
    }
    // Rows stay in their order, by expert and then by token.
    let kept: Vec<usize> = (0..tokens).filter(|&row| index[routing.plan.token()[row] as usize] != u32::MAX).collect();
    let token: Vec<u32> = kept.iter().map(|&row| routing.plan.token()[row]).collect();
    let before = |row: usize| kept.partition_point(|&kept| kept < row);
    let offsets = routing.plan.offsets().iter().map(|&row| before(row)).collect();
    let plan = Rc::new(Plan::from_rows(tokens, offsets, token, vec![0; kept.len()])?);
    Ok(Routing { plan, weights: take(g, &routing.weights, &kept), topk_index: index, ..routing })
}

/// The numbers at some places.
fn take<'p>(g: &Graph<'p>, x: &Var, places: &[usize]) -> Var {
    let taken: Buffer<f32> = places.iter().map(|&place| x.data()[place]).collect();
    let (to_x, places) = (x.place(), places.to_vec());
    g.record_from(&[x], Tensor::new(&[places.len()], taken), move |d, back| {
        let Some(dx) = back.sum_of(to_x) else { return };
        places.iter().zip(d.iter()).for_each(|(&place, d)| dx[place] += d);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Router, TopKRouter};
    use moebius_kernels::gemm::Precision;
    use moebius_tensor::{Gradients, Param};

    fn route<'p>(router: &'p TopKRouter, g: &Graph<'p>, choices: &[usize]) -> Routing {
        let x: Vec<f32> = choices.iter().flat_map(|&chosen| [0, 1].map(|e| f32::from(u8::from(e == chosen)))).collect();
        router.route(g, &Var::constant(Tensor::new(&[choices.len(), 2], x))).unwrap()
    }

    /// Two experts that read one coordinate each.
    fn router() -> TopKRouter {
        TopKRouter::new(Param::new(0, "router", Tensor::new(&[2, 2], vec![1.0, 0.0, 0.0, 1.0])), 1, false).unwrap()
    }

    #[test]
    fn the_first_tokens_of_each_sequence_are_taken() {
        let (router, g) = (router(), Graph::inference(Precision::F32));
        let limited = |choices: &[usize], starts: &[usize], counts: &mut [&mut [u32]]| {
            limit_by_sequence(&g, route(&router, &g, choices), starts, 2, counts).unwrap()
        };
        const OUT: u32 = u32::MAX;
        let choices = [1, 1, 0, 1, 1, 1, 0, 1];
        let whole = limited(&choices, &[0, 5, 8], &mut []);
        assert_eq!(whole.topk_index, [1, 1, 0, OUT, OUT, 1, 0, 1]);
        assert_eq!((whole.plan.offsets(), whole.plan.token()), (&[0, 2, 6][..], &[2, 6, 0, 1, 5, 7][..]));
        assert_eq!(whole.weights.shape(), [6]);
        // In pieces the same are taken.
        let mut counts = [0; 2];
        let pieces: Vec<u32> = [&choices[..1], &choices[1..4], &choices[4..5]]
            .iter()
            .flat_map(|piece| limited(piece, &[0, piece.len()], &mut [&mut counts]).topk_index)
            .collect();
        assert_eq!(pieces, whole.topk_index[..5]);
        assert_eq!(counts, [1, 2]);
    }

    #[test]
    fn the_router_learns_from_what_is_taken() {
        let router = router();
        let (g, mut gradients) = (Graph::training(Precision::F32), Gradients::new());
        let routing = limit_by_sequence(&g, route(&router, &g, &[0, 0, 0]), &[0, 3], 1, &mut []).unwrap();
        assert_eq!(routing.weights.data().len(), 1);
        g.backward_from(&[(&routing.weights, &[1.0])], &mut gradients);
        // d p₀ / d w₀ = p₀ (1 − p₀) x of the one token that was taken.
        let p = routing.probabilities.data()[0];
        assert!((gradients.get(0).unwrap()[0] - p * (1.0 - p)).abs() < 1e-6);
    }
}
