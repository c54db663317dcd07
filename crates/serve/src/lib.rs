//! The HTTP server: OpenAI's interface for a model that the engine runs, and a look at its experts.
//!
//! Reading order: [`options`] says what can be chosen, [`state`] what requests share, [`routes`] which addresses there are and
//! what happens around every request, `api` has one file an interface and `parts` what they have in common, [`sse`] streams,
//! [`listen`] holds the connections, [`server`] starts and ends it all.
#![forbid(unsafe_code)]

mod api;
pub mod body;
pub mod error;
pub mod keys;
pub mod listen;
pub mod metrics;
pub mod options;
pub mod page;
mod parts;
pub mod routes;
pub mod server;
pub mod sse;
pub mod state;

pub use options::ServeOptions;
pub use server::{ServeError, Server};
pub use state::ServedModel;

/// What answers name as the thing that computed them.
pub const FINGERPRINT: &str = concat!("moebius-", env!("CARGO_PKG_VERSION"));
