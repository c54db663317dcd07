//! The router of published families: from scores to a [`Plan`] and the weights of its rows, as [`RouterSettings`] say.

mod scores;
mod settings;
mod sparse_mixer;

pub use settings::{ExpertGroups, GroupScore, Normalise, RouterSettings, Score};

use crate::routers::{AuxiliaryLoss, Decision};
use crate::{MoeError, Plan};
use moebius_kernels::memory::Buffer;
use moebius_kernels::select;
use moebius_tensor::{Graph, Param, Tensor, Var, ops};
use std::rc::Rc;

/// What a router decided for a batch of tokens.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Which expert computes on which token.
    pub plan: Rc<Plan>,
    /// `[assignments]`: the weight of each of the plan's rows in its token's sum.
    pub weights: Var,
    /// `[tokens, experts]`: raw scores.
    pub logits: Var,
    /// `[tokens, experts]`: softmax of the scores.
    pub probabilities: Var,
    /// `[tokens, k]`: chosen experts, best first.
    pub topk_index: Vec<u32>,
    /// `[tokens, k]`: their weights.
    pub topk_weight: Tensor,
    /// The losses of a routing method; a family's router has none of its own.
    pub losses: Vec<AuxiliaryLoss>,
    /// Choices that found their expert full.
    pub dropped: usize,
}

/// Stands in [`Routing::topk_index`] where a token has fewer experts than others.
pub const NO_EXPERT: u32 = u32::MAX;

impl From<Decision> for Routing {
    /// A method's decision; k is the most experts that any token has, missing ones are [`NO_EXPERT`] with weight zero.
    fn from(decision: Decision) -> Self {
        let Decision { plan, weights, logits, probabilities, losses, dropped, .. } = decision;
        let (offsets, rows) = plan.rows_of_token();
        let k = offsets.windows(2).map(|bounds| bounds[1] - bounds[0]).max().unwrap_or(0);
        let (mut index, mut by_token) = (vec![NO_EXPERT; plan.n_tokens() * k], vec![0.0; plan.n_tokens() * k]);
        for (token, bounds) in offsets.windows(2).enumerate() {
            let mut mine: Vec<(f32, u32)> = (rows[bounds[0]..bounds[1]].iter())
                .map(|&row| (weights.data()[row as usize], plan.expert_of_row(row as usize) as u32))
                .collect();
            mine.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            for (slot, (weight, expert)) in mine.into_iter().enumerate() {
                (index[token * k + slot], by_token[token * k + slot]) = (expert, weight);
            }
        }
        let topk_weight = Tensor::new(&[plan.n_tokens(), k], by_token);
        Self { plan, weights, logits, probabilities, topk_index: index, topk_weight, losses, dropped }
    }
}

impl Routing {
    /// What a family's router decided: nothing dropped, no losses of its own.
    fn of_family(
        plan: Rc<Plan>,
        weights: Var,
        logits: Var,
        probabilities: Var,
        (topk_index, topk_weight): (Vec<u32>, Tensor),
    ) -> Self {
        let (losses, dropped) = (Vec::new(), 0);
        Self { plan, weights, logits, probabilities, topk_index, topk_weight, losses, dropped }
    }
}

/// Scores tokens and chooses their experts. Works in f32 whatever the graph's precision.
pub trait Router {
    /// Routes the rows of x `[tokens, hidden]`.
    fn route<'p>(&'p self, g: &Graph<'p>, x: &Var) -> Result<Routing, MoeError>;

    /// Its weights.
    fn params(&self) -> Vec<&Param>;

    /// Its weights, to be changed.
    fn params_mut(&mut self) -> Vec<&mut Param>;
}

/// Scores all experts, takes the best k, weighs them: every published family's router, by its [`RouterSettings`].
///
/// Ties go to the lower index. The choice has no gradient; the router learns through the weights and the balance
/// losses.
#[derive(Debug)]
pub struct TopKRouter {
    weight: Param,
    logit_bias: Option<Param>,
    selection_bias: Option<Param>,
    settings: RouterSettings,
}

impl TopKRouter {
    /// A router with the scores softmax(x · weightᵀ), as in Mixtral (renormalised) and OLMoE (raw).
    ///
    /// # Shapes
    /// weight `[experts, hidden]`.
    ///
    /// # Errors
    /// Unless 1 <= `top_k` <= experts.
    pub fn new(weight: Param, top_k: usize, renormalise: bool) -> Result<Self, MoeError> {
        Self::with(weight, [None, None], RouterSettings::softmax(top_k, renormalise))
    }

    /// A router by its settings. The biases are added to the logits, and to the scores when experts are chosen.
    ///
    /// # Shapes
    /// weight `[experts, hidden]`, biases `[experts]`.
    ///
    /// # Errors
    /// Choices or groups that do not fit the experts; a bias of another length, one that the settings do not speak of, or
    /// one that they do and that is missing.
    pub fn with(
        weight: Param,
        [logit_bias, selection_bias]: [Option<Param>; 2],
        settings: RouterSettings,
    ) -> Result<Self, MoeError> {
        let [experts, _] = weight.dims()?;
        settings.check(experts)?;
        for (bias, wanted) in [(&logit_bias, settings.logit_bias), (&selection_bias, settings.selection_bias)] {
            let fits = match bias {
                Some(bias) => wanted && bias.shape() == [experts],
                None => !wanted,
            };
            if !fits {
                let found = bias.as_ref().map_or(Vec::new(), |bias| bias.shape().to_vec());
                let wanted = if wanted { vec![experts] } else { Vec::new() };
                return Err(moebius_tensor::TensorError::Shape { what: "router's bias", wanted, found }.into());
            }
        }
        Ok(Self { weight, logit_bias, selection_bias, settings })
    }

    /// What is added to the scores when experts are chosen, to be changed; none unless the settings speak of it.
    pub(crate) fn selection_bias_mut(&mut self) -> Option<&mut Param> {
        self.selection_bias.as_mut()
    }

    /// How it scores, chooses and weighs.
    pub fn settings(&self) -> &RouterSettings {
        &self.settings
    }
}

impl Router for TopKRouter {
    fn route<'p>(&'p self, g: &Graph<'p>, x: &Var) -> Result<Routing, MoeError> {
        let settings = &self.settings;
        if g.is_training() && settings.has_no_gradient() {
            return Err(MoeError::NoRouterGradient);
        }
        let mut logits = ops::router_logits(g, x, &self.weight)?;
        if let Some(bias) = &self.logit_bias {
            logits = ops::add_bias(g, &logits, bias)?;
        }
        let [tokens, experts] = logits.dims()?;
        let k = settings.top_k;
        let probabilities = scores::softmax(g, &logits)?;
        if let Score::SparseMixer { jitter } = settings.score {
            return sparse_mixer::route(g, jitter, k, logits, probabilities);
        }
        let scores = match settings.score {
            Score::Softmax => probabilities.clone(),
            Score::Sigmoid => scores::sigmoid(g, &logits),
            Score::SoftmaxOfChosen | Score::SigmoidOfChosen | Score::SparseMixer { .. } => logits.clone(),
        };
        let (mut index, mut best) = (vec![0; tokens * k], Buffer::scratch(tokens * k));
        match self.selection_scores(scores.data(), experts) {
            None => select::top_k_rows(scores.data(), experts, k, &mut index, &mut best),
            Some(adjusted) => {
                select::top_k_rows(&adjusted, experts, k, &mut index, &mut best);
                // What weighs is the score itself.
                for (at, (best, &expert)) in best.iter_mut().zip(&index).enumerate() {
                    *best = scores.data()[at / k * experts + expert as usize];
                }
            }
        }
        let plan = Rc::new(Plan::from_choices(experts, k, &index)?);
        let (weights, topk_weight) = scores::weigh(g, settings, &scores, &plan, &index, best);
        Ok(Routing::of_family(plan, weights, logits, probabilities, (index, topk_weight)))
    }

    fn params(&self) -> Vec<&Param> {
        [&self.weight].into_iter().chain(&self.logit_bias).chain(&self.selection_bias).collect()
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        [&mut self.weight].into_iter().chain(&mut self.logit_bias).chain(&mut self.selection_bias).collect()
    }
}

impl TopKRouter {
    /// The scores by which experts are chosen, where they are not those that weigh.
    fn selection_scores(&self, scores: &[f32], experts: usize) -> Option<Buffer<f32>> {
        if self.selection_bias.is_none() && self.settings.groups.is_none() {
            return None;
        }
        let mut adjusted = Buffer::from_slice(scores);
        for row in adjusted.chunks_exact_mut(experts) {
            if let Some(bias) = &self.selection_bias {
                row.iter_mut().zip(bias.value().data()).for_each(|(score, bias)| *score += bias);
            }
            if let Some(groups) = &self.settings.groups {
                groups.mask(row);
            }
        }
        Some(adjusted)
    }
}

#[cfg(test)]
mod tests;
