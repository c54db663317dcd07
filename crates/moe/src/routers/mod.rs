//! Every routing method behind one trait, by name.
//!
//! A method makes a [`Decision`] from x: a [`Plan`], the weight of each of its rows, and the method's own losses. A
//! token that is dropped, or that no expert chose, has no row in the plan. [`build`] makes a method from its name and
//! checked [`Options`]; [`ALL`] is the registry, one line a method.
//!
//! Letters: T `tokens`, E `experts`, H `hidden`, k choices a token, C `capacity` (most rows of an expert), p softmax of
//! the scores. Ties go to the lower index. All arithmetic here is f32 (sums of losses f64). Random numbers come from
//! [`Context::seed`] alone and are drawn in training only, so that a recomputed layer decides the same.

mod assignment;
mod balancing;
mod base;
mod deepseek_v2;
mod depths;
mod expert_choice;
mod forced;
mod gshard;
mod hash;
mod hierarchical;
mod loss_free;
pub(crate) mod math;
mod method;
pub mod mixtures;
mod noisy_top_k;
mod options;
mod selection;
mod sinkhorn;
mod soft;
mod switch;
mod top_k;
mod vision;

pub use assignment::auction;
pub use balancing::sequence_balance_loss;
pub use depths::{CausalSampler, DepthDecision, MixtureOfDepths, sampler_loss};
pub use hash::{balanced_table, clustered_table, dispersed_table, random_table};
pub use method::{MethodConfig, MethodLayer, MethodWeight};
pub use options::{MakeParam, OptionValue, Options, Setup};
pub use soft::SoftMoe;

use crate::{MoeError, Plan, RouterSettings};
use moebius_tensor::{Graph, Param, Var};
use std::fmt::Debug;
use std::rc::Rc;

/// What a method may need beside x.
#[derive(Clone, Copy, Debug, Default)]
pub struct Context<'a> {
    /// `[tokens]`: the vocabulary's ids, for hash layers.
    pub token_ids: &'a [u32],
    /// Where sequences begin among the tokens, the total at the end; empty: one sequence.
    pub starts: &'a [usize],
    /// Decides every random number of this call.
    pub seed: u64,
}

/// A loss that a method asks for.
#[derive(Clone, Debug)]
pub struct AuxiliaryLoss {
    /// What it is called in its paper.
    pub name: &'static str,
    /// Its weight in the objective.
    pub coefficient: f32,
    /// The loss before it is weighted, shape `[1]`.
    pub value: Var,
}

/// What a method decided for a batch of tokens.
#[derive(Clone, Debug)]
pub struct Decision {
    /// Which expert computes on which token.
    pub plan: Rc<Plan>,
    /// `[assignments]`: the weight of each of the plan's rows in its token's sum.
    pub weights: Var,
    /// `[tokens, experts]`: raw scores; of a method that scores nothing, zeros.
    pub logits: Var,
    /// `[tokens, experts]`: softmax of the scores, or the method's own affinities.
    pub probabilities: Var,
    /// `[tokens]`: how much of x itself is added to the layer's result, if any (BASE).
    pub skip: Option<Var>,
    /// The method's own losses.
    pub losses: Vec<AuxiliaryLoss>,
    /// The most rows an expert may have; `None`: any number.
    pub capacity: Option<usize>,
    /// Choices that found their expert full.
    pub dropped: usize,
}

impl Decision {
    /// A decision without losses, capacity or skip.
    pub fn new(plan: Rc<Plan>, weights: Var, logits: Var, probabilities: Var) -> Self {
        Self { plan, weights, logits, probabilities, skip: None, losses: Vec::new(), capacity: None, dropped: 0 }
    }

    /// The method's losses, each with its coefficient, in one number.
    pub fn auxiliary<'p>(&self, g: &Graph<'p>) -> Var {
        let terms: Vec<(f32, &Var)> = self.losses.iter().map(|loss| (loss.coefficient, &loss.value)).collect();
        moebius_tensor::ops::weighted_sum(g, &terms)
    }
}

/// Chooses experts for tokens. Works in f32 whatever the graph's precision.
pub trait RoutingMethod: Debug + Send + Sync {
    /// Decides about the rows of x `[tokens, hidden]`.
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, context: &Context<'_>) -> Result<Decision, MoeError>;

    /// Its weights.
    fn params(&self) -> Vec<&Param>;

    /// Its weights, to be changed.
    fn params_mut(&mut self) -> Vec<&mut Param>;

    /// Deviation of the normal numbers, cut off at two of it, that one of its weights begins with; none: as the model's
    /// other weights.
    fn initial_deviation(&self, weight: &Param) -> Option<f32> {
        let _ = weight;
        None
    }

    /// How it scores, chooses and weighs, if a published family's router could do the same.
    fn settings(&self) -> Option<&RouterSettings> {
        None
    }

    /// The fewest tokens of a batch with which every expert's capacity is at least one.
    fn least_tokens(&self) -> usize {
        1
    }

    /// Told once an optimiser step how many assignments each expert had in the whole batch; for methods that balance
    /// without a gradient.
    fn after_step(&mut self, counts: &[u64]) {
        let _ = counts;
    }
}

impl RoutingMethod for Box<dyn RoutingMethod> {
    fn decide<'p>(&'p self, g: &Graph<'p>, x: &Var, context: &Context<'_>) -> Result<Decision, MoeError> {
        (**self).decide(g, x, context)
    }

    fn params(&self) -> Vec<&Param> {
        (**self).params()
    }

    fn params_mut(&mut self) -> Vec<&mut Param> {
        (**self).params_mut()
    }

    fn initial_deviation(&self, weight: &Param) -> Option<f32> {
        (**self).initial_deviation(weight)
    }

    fn settings(&self) -> Option<&RouterSettings> {
        (**self).settings()
    }

    fn least_tokens(&self) -> usize {
        (**self).least_tokens()
    }

    fn after_step(&mut self, counts: &[u64]) {
        (**self).after_step(counts);
    }
}

/// Makes a method from what [`Setup`] says.
type Build = fn(&mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError>;

/// A line of the registry.
#[derive(Debug)]
pub struct Entry {
    /// Its name in recipes.
    pub name: &'static str,
    /// Makes one.
    build: Build,
}

/// All methods, by name.
pub const ALL: &[Entry] = &[
    Entry { name: "top_k", build: top_k::build },
    Entry { name: "noisy_top_k", build: noisy_top_k::build },
    Entry { name: "hierarchical", build: hierarchical::build },
    Entry { name: "switch", build: switch::build },
    Entry { name: "gshard", build: gshard::build },
    Entry { name: "vision", build: vision::build },
    Entry { name: "expert_choice", build: expert_choice::build },
    Entry { name: "hash", build: hash::build },
    Entry { name: "base", build: base::build },
    Entry { name: "sinkhorn", build: sinkhorn::build },
    Entry { name: "loss_free", build: loss_free::build },
    Entry { name: "deepseek_v2", build: deepseek_v2::build },
    Entry { name: "forced", build: forced::build },
];

/// The method `name` with `setup`'s options.
///
/// # Errors
/// An unknown name or option, a value out of range, or a combination that is known to be wrong.
pub fn build(name: &str, setup: &mut Setup<'_>) -> Result<Box<dyn RoutingMethod>, MoeError> {
    let Some(entry) = ALL.iter().find(|entry| entry.name == name) else {
        let known = ALL.iter().map(|entry| entry.name).collect::<Vec<_>>().join(", ");
        return Err(MoeError::UnknownRouter { found: name.to_owned(), known });
    };
    setup.router = entry.name;
    let method = (entry.build)(setup)?;
    setup.finish()?;
    Ok(method)
}

#[cfg(test)]
mod suite;
#[cfg(test)]
mod testing;
