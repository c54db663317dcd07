//! [`RouterSettings`]: what the routers of published families differ in.

use crate::MoeError;

/// How experts are scored, chosen and weighed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterSettings {
    /// Experts a token is sent to.
    pub top_k: usize,
    /// What becomes of the logits.
    pub score: Score,
    /// Whether the logits have a bias (gpt-oss).
    pub logit_bias: bool,
    /// Whether experts are chosen by score + bias and weighed by the score alone (DeepSeek-V3, Wang et al. 2024). The
    /// bias has no gradient.
    pub selection_bias: bool,
    /// Groups of experts of which a token may use some only.
    pub groups: Option<ExpertGroups>,
    /// What the chosen scores are divided by.
    pub normalise: Normalise,
    /// What the weights are multiplied with in the end.
    pub scale: f32,
    /// Whether a weight multiplies what its expert reads instead of what it answers (Llama 4).
    pub weighs_input: bool,
}

/// What becomes of a token's logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Each expert's logistic function.
    Sigmoid,
    /// Chosen by the logits; the chosen ones' softmax.
    SoftmaxOfChosen,
    /// Chosen by the logits; the chosen ones' logistic functions.
    SigmoidOfChosen,
    /// Two experts one after the other, each weighed by a softmax over those that are nearly as good (Liu et al. 2023,
    /// "SparseMixer"), as Phi-3.5-MoE infers.
    SparseMixer {
        /// Half the relative distance from the best logit at which an expert is left out.
        jitter: f32,
    },
}

/// What the scores of a token's chosen experts are divided by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Normalise {
    /// Nothing.
    None,
    /// Their sum plus a small number.
    Sum {
        /// Added to the sum.
        plus: f32,
    },
    /// Their sum, or this number if the sum is less.
    SumAtLeast {
        /// The least divisor.
        least: f32,
    },
    /// (Σ |s|^p)^(1/p).
    Norm {
        /// p.
        p: f32,
    },
}

/// Experts in groups of one size, of which each token uses the best (DeepSeek-V2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Groups there are; divides the experts.
    pub count: usize,
    /// Groups a token may use.
    pub used: usize,
    /// What makes a group good.
    pub score: GroupScore,
}

/// What makes a group of experts good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert's score (DeepSeek-V2).
    Best,
    /// The sum of its two best (DeepSeek-V3).
    TwoBest,
}

impl RouterSettings {
    /// Softmax over all experts, the best k, renormalised or not.
    pub fn softmax(top_k: usize, renormalise: bool) -> Self {
        let normalise = if renormalise { Normalise::Sum { plus: 0.0 } } else { Normalise::None };
        Self {
            top_k,
            score: Score::Softmax,
            logit_bias: false,
            selection_bias: false,
            groups: None,
            normalise,
            scale: 1.0,
            weighs_input: false,
        }
    }

    /// Whether the weight of a token's only expert is the same whatever the logits.
    pub fn has_no_gradient(&self) -> bool {
        self.top_k == 1 && (self.normalise != Normalise::None || self.score == Score::SoftmaxOfChosen)
    }

    /// Looks whether choices and groups fit `experts`.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self, experts: usize) -> Result<(), MoeError> {
        let top_k = self.top_k;
        if !(1..=experts).contains(&top_k) {
            return Err(MoeError::TopK { top_k, experts });
        }
        if matches!(self.score, Score::SparseMixer { .. }) && top_k > 2 {
            return Err(MoeError::Settings(format!("sparse mixer: wanted 1 or 2 choices a token, found {top_k}")));
        }
        let Some(groups) = self.groups else { return Ok(()) };
        let ExpertGroups { count, used, score } = groups;
        if count == 0 || !experts.is_multiple_of(count) {
            return Err(MoeError::Settings(format!("groups: wanted a divisor of {experts} experts, found {count}")));
        }
        if !(1..=count).contains(&used) {
            return Err(MoeError::Settings(format!("groups used: wanted 1 to {count}, found {used}")));
        }
        let size = experts / count;
        if used * size < top_k {
            let message = format!("groups: wanted room for {top_k} choices, found {used} groups of {size}");
            return Err(MoeError::Settings(message));
        }
        if score == GroupScore::TwoBest && size < 2 {
            return Err(MoeError::Settings("groups: wanted at least 2 experts in each, found 1".into()));
        }
        Ok(())
    }
}

impl ExpertGroups {
    /// Takes the experts of all but the best groups out of the choice. Of groups that are equally good the first is taken.
    pub(super) fn mask(&self, scores: &mut [f32]) {
        let size = scores.len() / self.count;
        let group_scores: Vec<f32> = scores.chunks_exact(size).map(|group| self.score.of(group)).collect();
        let mut order: Vec<usize> = (0..self.count).collect();
        order.sort_by(|&a, &b| group_scores[b].total_cmp(&group_scores[a]));
        for &group in &order[self.used..] {
            scores[group * size..(group + 1) * size].fill(f32::NEG_INFINITY);
        }
    }
}

impl GroupScore {
    fn of(self, scores: &[f32]) -> f32 {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &score in scores {
            if score > first {
                (first, second) = (score, first);
            } else if score > second {
                second = score;
            }
        }
        match self {
            Self::Best => first,
            Self::TwoBest => first + second,
        }
    }
}
