//! Several recipes on the same tokens in the same order, over several seeds: who reaches the lower loss, by how much, and
//! how sure that is.
//!
//! [`plan`] checks that the recipes can be compared and names their runs, [`runs`] makes those that are not there yet,
//! [`analysis`] reads their logs, [`report`] tells. A run is known by the content of its recipe and its seed, so one that
//! is there is never made again, and one that was interrupted goes on.

pub mod analysis;
pub mod plan;
pub mod report;
pub mod runs;

pub use analysis::{Comparison, compare};
pub use plan::{Plan, PlannedRun};
pub use runs::{Finished, make};
