//! Hierarchical noisy top-k (Shazeer et al. 2017, appendix B): a primary gate chooses groups, a gate in each group its
//! experts; y = Σ_i Σ_j G_i · G_ij · E_ij. Importance_ij is the sum of the products; Load_ij = Load_i · Load_i(X_i)_j /
//! |X_i|, X_i the tokens sent to group i (the first factor keeps a gradient to the primary gate).

use super::math::{normalised, pick, product, row_scores, softmax, squared_variation};
use super::noisy_top_k::{NoisyGate, SmoothLoad, importance_loss};
use super::selection::{plan_of, plan_of_choices, top_k, top_k_rows};
use super::{AuxiliaryLoss, Context, Decision, RoutingMethod, Setup};
use crate::MoeError;
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Param, Tensor, Var};

#[derive(Debug)]
struct Hierarchical {
    primary: NoisyGate,
    secondary: NoisyGate,
    groups: usize,
    /// Groups a token, and experts in each of them.
    k: [usize; 2],
    importance: f32,
    load: f32,
}

pub(super) fn build(setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    let (experts, hidden) = (setup.experts, setup.hidden);
    let groups = setup.count("groups", 2, 2..=4096)?;
    if !experts.is_multiple_of(groups) {
        return Err(setup.refuse(format!("wanted groups that divide the {experts} experts, found {groups}")));
    }
    let chosen = setup.count("groups_per_token", 1, 1..=groups - 1)?;
    let top_k = setup.top_k_up_to(experts / groups)?;
    if top_k == experts / groups {
        let reason = format!("wanted fewer choices a group than its {} experts, found {top_k}", experts / groups);
        return Err(setup.refuse(reason));
    }
    if top_k == 1 {
        return Err(MoeError::NoRouterGradient);
    }
    Ok(Box::new(Hierarchical {
        primary: NoisyGate {
            gate: (setup.param)("router_groups", &[groups, hidden])?,
            noise: (setup.param)("router_groups_noise", &[groups, hidden])?,
        },
        secondary: NoisyGate { gate: setup.score_weight("router")?, noise: setup.score_weight("router_noise")? },
        groups,
        k: [chosen, top_k],
        importance: setup.number("importance", 0.1, 0.0..=10.0)? as f32,
        load: setup.number("load", 0.1, 0.0..=10.0)? as f32,
    }))
}

/// Softmax within each group of `[tokens, experts]`.
fn softmax_by_group<'p>(g: &Graph<'p>, scores: &Var, width: usize) -> Result<Var, MoeError> {
    let rows = reshaped(g, scores, &[scores.data().len() / width, width]);
    let shape = scores.shape().to_vec();
    Ok(reshaped(g, &softmax(g, &rows)?, &shape))
}

fn reshaped<'p>(g: &Graph<'p>, x: &Var, shape: &[usize]) -> Var {
    let to_x = x.place();
    let output = Tensor::new(shape, Buffer::from_slice(x.data()));
    g.record_from(&[x], output, move |dy, back| back.give(to_x, dy))
}

impl RoutingMethod for Hierarchical {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, context: &Context<'_>) -> Result<Decision, MoeError> {
        let primary = self.primary.score(g, x, context.seed)?;
        // Any other stream will do.
        let secondary = self.secondary.score(g, x, context.seed ^ 0x9E37_79B9_7F4A_7C15)?;
        let [tokens, experts] = secondary.noisy.dims()?;
        let width = experts / self.groups;
        let groups = top_k_rows(primary.noisy.data(), self.groups, self.k[0]);
        let group_plan = plan_of_choices(self.groups, &groups)?;
        let group_weights = normalised(g, &row_scores(g, &softmax(g, &primary.noisy)?, &group_plan), &group_plan, 1.0);
        let inner = softmax_by_group(g, &secondary.noisy, width)?;
        let best = |t: usize, group: usize| {
            let at = t * experts + group * width;
            top_k(&secondary.noisy.data()[at..at + width], self.k[1]).into_iter().map(move |e| group * width + e)
        };
        let pairs = groups
            .iter()
            .enumerate()
            .flat_map(|(t, chosen)| chosen.iter().flat_map(move |&i| best(t, i).map(move |e| (t, e))));
        let plan = plan_of(tokens, experts, pairs)?;
        // Each pair of token and group has its own sum: a plan whose tokens are such pairs.
        let (mut group_rows, mut inner_pairs) = (Vec::new(), vec![(0, 0); plan.n_assignments()]);
        for (row, (e, &t)) in super::math::experts_of_rows(&plan).zip(plan.token()).enumerate() {
            let slot = groups[t as usize].iter().position(|&i| i == e / width).expect("its group was chosen");
            group_rows.push(group_plan.rows_of_token().1[t as usize * self.k[0] + slot] as usize);
            inner_pairs[row] = (t as usize * self.k[0] + slot, e);
        }
        let by_pair = plan_of(tokens * self.k[0], experts, inner_pairs)?;
        let inner_weights = normalised(g, &row_scores(g, &inner, &plan), &by_pair, 1.0);
        let weights = product(g, &pick(g, &group_weights, group_rows), &inner_weights);
        let losses = vec![
            AuxiliaryLoss {
                name: "importance",
                coefficient: self.importance,
                value: importance_loss(g, &weights, &plan),
            },
            AuxiliaryLoss {
                name: "load",
                coefficient: self.load,
                value: self.load_loss(g, [&primary, &secondary], &group_plan),
            },
        ];
        Ok(Decision { losses, ..Decision::new(plan, weights, secondary.clean, inner) })
    }

    /// Zero, as noisy top-k's.
    fn initial_deviation(&self, _: &Param) -> Option<f32> {
        Some(0.0)
    }

    fn params(&self) -> Vec<&Param> {
        vec![&self.primary.gate, &self.primary.noise, &self.secondary.gate, &self.secondary.noise]
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        let [primary, secondary] = [&mut self.primary, &mut self.secondary];
        vec![&mut primary.gate, &mut primary.noise, &mut secondary.gate, &mut secondary.noise]
    }
}

impl Hierarchical {
    /// CV² of Load_i · Load_i(X_i)_j / |X_i|.
    fn load_loss<'p>(
        &self,
        g: &Graph<'p>,
        [primary, secondary]: [&super::noisy_top_k::NoisyScores; 2],
        group_plan: &crate::Plan,
    ) -> Var {
        let tokens = group_plan.n_tokens();
        let width = secondary.noisy.shape()[1] / self.groups;
        let outer = primary.load(&(0..tokens).collect::<Vec<_>>(), 0..self.groups, self.k[0]);
        let (mut loads, mut inner, mut sizes) = (Vec::new(), Vec::<SmoothLoad>::new(), Vec::new());
        for group in 0..self.groups {
            let bounds = group_plan.offsets()[group]..group_plan.offsets()[group + 1];
            let mine: Vec<usize> = group_plan.token()[bounds].iter().map(|&t| t as usize).collect();
            let load = secondary.load(&mine, group * width..(group + 1) * width, self.k[1]);
            let size = mine.len().max(1) as f64;
            loads.extend(load.loads.iter().map(|inner| outer.loads[group] * inner / size));
            inner.push(load);
            sizes.push(size);
        }
        let (value, slopes) = squared_variation(&loads);
        let of_outer = (0..self.groups).map(|group| {
            let pairs = inner[group].loads.iter().zip(&slopes[group * width..]);
            pairs.map(|(inner, slope)| inner * slope / sizes[group]).sum()
        });
        let of_outer: Vec<f64> = of_outer.collect();
        let factors: Vec<f64> = (0..self.groups).map(|group| outer.loads[group] / sizes[group]).collect();
        let of_inner: Vec<(SmoothLoad, Vec<f64>)> = (inner.into_iter().enumerate())
            .map(|(group, load)| {
                let slopes = slopes[group * width..(group + 1) * width].iter().map(|slope| slope * factors[group]);
                (load, slopes.collect())
            })
            .collect();
        // The value stands in the first; the second adds the slopes that reach the inner gate.
        let first = primary.loss(g, value, &[(outer, of_outer)]);
        let second = secondary.loss(g, 0.0, &of_inner);
        moebius_tensor::ops::sum(g, &[&first, &second])
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{by_scores, close};
    use super::*;
    use moebius_kernels::gemm::Precision;

    /// Two of three groups, at 3/4 and 1/4; in each two of three experts, at 2/3 and 1/3.
    #[test]
    fn weights_are_products_of_both_gates() {
        let inner = [2f32.ln(), 0.0, -9.0];
        let options = [("groups", 3.0.into()), ("groups_per_token", 2.0.into())];
        let method = by_scores("hierarchical", [9, 2], &options, &|name| match name {
            "router_groups" => Some(vec![3f32.ln(), 0.0, -9.0]),
            "router" => Some(inner.repeat(3)),
            _ => None,
        });
        let (g, x) = (Graph::inference(Precision::F32), Var::constant(Tensor::new(&[1, 2], vec![1.0, 0.0])));
        let decision = method.decide(&g, &x, &Context::default()).unwrap();
        assert_eq!(decision.plan.counts(), [1, 1, 0, 1, 1, 0, 0, 0, 0]);
        close(decision.weights.data(), &[1.0 / 2.0, 1.0 / 4.0, 1.0 / 6.0, 1.0 / 12.0]);
        // Importances 1/2, 1/4, 1/6, 1/12 and five zeros: mean 1/9, mean square (36 + 9 + 4 + 1) / 144 / 9.
        close(decision.losses[0].value.data(), &[(50.0 / 144.0 / 9.0 - 1.0 / 81.0) * 81.0]);
    }
}
