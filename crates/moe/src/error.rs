//! What can be wrong with a router, a plan or a layer's input.

use moebius_tensor::TensorError;
use thiserror::Error;

/// An error of this crate.
#[derive(Debug, Error, PartialEq)]
pub enum MoeError {
    /// A shape that does not fit.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A plan whose parts contradict each other.
    #[error("routing plan: {0}")]
    Plan(String),
    /// More choices than experts, or none.
    #[error("top-k router: wanted 1 to {experts} choices a token, found {top_k}")]
    TopK {
        /// Choices a token.
        top_k: usize,
        /// Experts there are.
        experts: usize,
    },
    /// Settings of a router that contradict each other.
    #[error("router: {0}")]
    Settings(String),
    /// A combination that trains nothing.
    #[error(
        "top-1 routing with renormalised weights cannot be trained: the weight is always 1 and the router gets no \
         gradient; use raw weights or at least two choices"
    )]
    NoRouterGradient,
    /// A router's name that the registry lacks.
    #[error("router: wanted one of {known}, found {found}")]
    UnknownRouter {
        /// The name given.
        found: String,
        /// All names.
        known: String,
    },
    /// An option of a router that is unknown, of another type or out of range.
    #[error("router {router}: option {key}: {message}")]
    Option {
        /// The router's name.
        router: &'static str,
        /// The option.
        key: String,
        /// What was wanted and found.
        message: String,
    },
    /// A combination that is known to be wrong.
    #[error("router {router}: {reason}")]
    Refused {
        /// The router's name.
        router: &'static str,
        /// Why, and what to do instead.
        reason: String,
    },
}
