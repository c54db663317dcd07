//! Checkpoints of a vision run: the model's folder, the optimiser's moments, and `trainer.json`.

use std::path::Path;

use moebius_model::safetensors::{SafetensorsFile, TensorData, TensorToWrite, write_safetensors};
use moebius_model::vision::VisionModel;
use serde::{Deserialize, Serialize};

use super::recipe::VisionRecipe;
use crate::data::sampler::Position;
use crate::digest::Digest;
use crate::optimizer::Optimizer;
use crate::{Result, TrainError, files};

const STATE: &str = "trainer.json";
const MOMENTS: &str = "optimizer.safetensors";
/// Raised whenever an older `trainer.json` could not be resumed.
const FORMAT: u32 = 1;

/// Where a run stands, besides weights and moments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VisionState {
    /// Version of this format.
    format: u32,
    /// Steps done.
    pub(super) step: u64,
    /// Images seen.
    pub(super) images: u64,
    /// Where the sampler stands.
    pub(super) position: Position,
    /// The highest accuracy so far.
    pub(super) best_accuracy: Option<f64>,
    /// Fingerprint of the images.
    pub(super) data: Digest,
    /// The recipe that the run follows.
    pub(super) recipe: VisionRecipe,
}

impl VisionState {
    /// The state before the first step.
    pub(super) fn new(recipe: &VisionRecipe, data: Digest) -> Self {
        let position = Position::default();
        Self { format: FORMAT, step: 0, images: 0, position, best_accuracy: None, data, recipe: recipe.clone() }
    }

    /// The same with the recipe as it is now: keys that are free may have changed.
    pub(super) fn of(self, recipe: &VisionRecipe) -> Self {
        Self { recipe: recipe.clone(), ..self }
    }
}

/// Writes a checkpoint whole or not at all.
pub(super) fn save(path: &Path, state: &VisionState, model: &VisionModel, optimizer: &Optimizer) -> Result<()> {
    files::create_folder(path.parent().unwrap_or(Path::new(".")))?;
    files::write_folder_whole(path, |folder| {
        model.save(folder)?;
        let mut tensors = Vec::new();
        for (param, moments) in model.params().into_iter().zip(optimizer.moments()) {
            let both = [("first", &moments.first), ("second", &moments.second)];
            // Methods with one moment have nothing to say about the second.
            for (kind, data) in both.into_iter().filter(|(_, data)| !data.is_empty()) {
                let (name, shape) = (format!("{kind}.{}", param.name()), param.shape().to_vec());
                tensors.push(TensorToWrite { name, shape, data: TensorData::F32(data) });
            }
        }
        write_safetensors(&folder.join(MOMENTS), &tensors)?;
        let json = serde_json::to_string_pretty(state).expect("a state is plain data");
        files::write_whole(&folder.join(STATE), format!("{json}\n").as_bytes())
    })
}

/// Reads where the checkpoint in `folder` stands.
pub(super) fn read_state(folder: &Path) -> Result<VisionState> {
    let path = folder.join(STATE);
    let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
    let refuse = |message: String| TrainError::Checkpoint { path: path.clone(), message };
    let state: VisionState = serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?;
    match state.format {
        FORMAT => Ok(state),
        other => Err(refuse(format!("wanted format {FORMAT}, found {other}"))),
    }
}

/// Reads weights and moments.
pub(super) fn load(folder: &Path, recipe: &VisionRecipe) -> Result<(VisionModel, Optimizer)> {
    let model = VisionModel::load(folder)?;
    let mut optimizer = Optimizer::new(&recipe.optimizer, recipe.train.precision.into(), &model.params());
    let path = folder.join(MOMENTS);
    let file = SafetensorsFile::open(&path)?;
    for (param, moments) in model.params().into_iter().zip(optimizer.moments_mut()) {
        let both = [("first", &mut moments.first), ("second", &mut moments.second)];
        for (kind, data) in both.into_iter().filter(|(_, data)| !data.is_empty()) {
            let name = format!("{kind}.{}", param.name());
            let tensor = file.tensor(&name)?;
            if tensor.shape != param.shape() {
                let message = format!("tensor `{name}`: wanted shape {:?}, found {:?}", param.shape(), tensor.shape);
                return Err(TrainError::Checkpoint { path, message });
            }
            tensor.read_f32(data)?;
        }
    }
    Ok((model, optimizer))
}
