//! Configurations, families, checkpoints, the decoder and its cache.
//!
//! A published model is data here: a file in `families/` maps its `config.json` to [`ModelConfig`] and its tensor names
//! to our weights; the arithmetic stands once, in [`Model`]. Training and inference run the same forward pass.
//!
//! Shapes in this crate: `tokens` rows of a ragged [`Batch`], `hidden` the width of the model, `vocab` its words.
#![forbid(unsafe_code)]

mod attention;
mod batch;
mod cache;
pub mod checkpoint;
pub mod config;
pub mod cost;
mod decoder;
mod delta_net;
pub mod encoder_decoder;
mod error;
pub mod families;
mod feed_forward;
pub mod files;
pub mod gguf;
mod head_mixture;
mod inventory;
mod latent;
mod layer;
mod loss;
mod mamba;
mod methods;
mod mixer;
mod norm;
mod observer;
pub mod packed;
mod position;
mod running;
pub mod safetensors;
pub mod shapes;
mod short_convolution;
mod survey;
pub mod vision;
mod weights;

pub use batch::Batch;
pub use cache::{KvCache, Numerics};
pub use checkpoint::{Checkpoint, named_tensors, save_model, save_model_as};
pub use config::{Ffn, ModelConfig, QkNorm, UniformDecoder};
pub use cost::{Cost, ExpertUse};
pub use decoder::{Model, ParameterCount};
pub use encoder_decoder::EncoderDecoder;
pub use error::ModelError;
pub use files::atomic_write;
pub use inventory::{CacheBytes, Inventory, LayerKind};
pub use loss::{Counted, Loss, LossSettings};
pub use observer::{Observer, Silent};
pub use running::{LoadProgress, RunFormat};
pub use safetensors::Dtype;
pub use survey::{StoredType, StoredWeights, Survey, SurveySource};
