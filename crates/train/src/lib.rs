//! Data, optimiser, schedule, trainer, checkpoint and resume.
//!
//! A run goes through these modules in this order: [`recipe`] says what is wanted, [`data`] makes tokens and batches of
//! it, [`trainer`] takes the steps with [`schedule`] and [`optimizer`], [`evaluate`] looks at held-back text,
//! [`metrics`] and [`plot`] record, [`checkpoint`] saves and resumes, [`progress`] tells whoever watches.
//!
//! ```no_run
//! use std::sync::atomic::AtomicBool;
//! use moebius_train::{Recipe, Start, Trainer, Silent};
//!
//! let recipe = Recipe::load("recipes/tiny.toml".as_ref())?;
//! let mut trainer = Trainer::prepare(recipe, "runs/tiny".as_ref(), Start::Fresh, &mut Silent)?;
//! let outcome = trainer.run(&AtomicBool::new(false), &mut Silent)?;
//! # Ok::<(), moebius_train::TrainError>(())
//! ```
#![forbid(unsafe_code)]

pub mod average;
pub mod checkpoint;
pub mod collapse;
pub mod compare;
pub mod data;
pub mod digest;
mod error;
pub mod evaluate;
mod files;
mod hash_tables;
pub mod learn;
pub mod metrics;
pub mod model_folder;
pub mod optimizer;
pub mod plot;
pub mod progress;
pub mod recipe;
pub mod report;
pub mod run_folder;
pub mod samples;
pub mod schedule;
pub mod spikes;
pub mod tensorboard;
pub mod trainer;
pub mod vision;

pub use error::{Result, TrainError};
pub use progress::{Event, Progress, Silent};
pub use recipe::Recipe;
pub use run_folder::{RunFolder, Start};
pub use trainer::{Outcome, Trainer};
