//! Training vision transformers on labelled images: image folders and IDX files, by recipe.
//!
//! A run goes as a language model's does ([`crate::trainer`]): [`recipe`] says what is wanted, [`data`] reads the images,
//! [`VisionTrainer`] takes the steps and measures accuracy on held-back images, checkpoints are resumed to the bit.

mod checkpoint;
pub mod data;
mod folders;
mod idx;
pub mod recipe;
mod trainer;

pub use recipe::VisionRecipe;
pub use trainer::{VisionEvent, VisionOutcome, VisionStep, VisionTrainer, VisionValidation};
