//! Routers, plans, dispatch, expert banks, balance losses, statistics: what makes a layer a mixture of experts.
//!
//! A layer reads as the papers' steps: a [`Router`] scores tokens and makes a [`Plan`] (which expert gets which token),
//! an [`ExpertBank`] computes on rows sorted by expert, and their outputs are summed back by token with the router's
//! weights. Training and inference run the same code.
//!
//! Shapes in this crate: `tokens` rows of x, `hidden` their width, `experts`, `k` choices a token, `assignments` the
//! chosen (token, expert) pairs, sorted by expert, `width` an expert's inner width.
#![forbid(unsafe_code)]

mod balance;
mod capacity;
mod error;
mod experts;
pub mod grouped;
mod head_bank;
mod layer;
pub mod placement;
mod plan;
mod router;
pub mod routers;
mod statistics;

pub use balance::{load_balancing_loss, load_balancing_loss_over, z_loss};
pub use capacity::limit_by_sequence;
pub use error::MoeError;
pub use experts::ExpertBank;
pub use head_bank::HeadBank;
pub use layer::MoeLayer;
pub use plan::Plan;
pub use router::{ExpertGroups, GroupScore, NO_EXPERT, Normalise, Router, RouterSettings, Routing, Score, TopKRouter};
pub use statistics::LoadStatistics;
