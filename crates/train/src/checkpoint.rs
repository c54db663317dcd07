//! Checkpoints: all that exact resumption needs, in one folder that is whole or not there.
//!
//! `step-N/` is a Hugging Face folder (weights in f32) with two files more: `optimizer.safetensors`, the moments as
//! `first.NAME` and `second.NAME` by our parameter names, and `trainer.json`, the [`TrainState`], which names every
//! other file with its size and fingerprint and is checked against them before anything is used.

use std::collections::BTreeMap;
use std::path::Path;

use moebius_model::safetensors::{SafetensorsFile, TensorData, TensorToWrite, write_safetensors};
use moebius_model::{Model, ModelConfig};
use serde::{Deserialize, Serialize};

use crate::data::sampler::Position;
use crate::data::tokenizer::TextTokenizer;
use crate::digest::Digest;
use crate::optimizer::Optimizer;
use crate::recipe::ExportDtype;
use crate::{Recipe, Result, TrainError, files, model_folder};

/// Raised whenever an older `trainer.json` could not be resumed.
const FORMAT: u32 = 1;
const STATE: &str = "trainer.json";
const MOMENTS: &str = "optimizer.safetensors";

/// Where a run stands, besides weights and moments.
///
/// There is no random state: the initial weights are a function of the seed, the order of the data one of seed and
/// position, and nothing else draws.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Version of this format.
    pub format: u32,
    /// Steps done.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Where the sampler stands.
    pub position: Position,
    /// The lowest validation loss so far.
    pub best: Option<Best>,
    /// Fingerprint of the tokens and the tokenizer.
    pub corpus: Digest,
    /// The recipe that the run follows.
    pub recipe: Recipe,
}

/// The lowest validation loss of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// After this step.
    pub step: u64,
    /// In nats a token.
    pub loss: f64,
}

/// `trainer.json`: the state, and what the other files of the folder must be.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile {
    state: TrainState,
    files: BTreeMap<String, FileFacts>,
}

/// What a file must be.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileFacts {
    bytes: u64,
    fingerprint: Digest,
}

impl TrainState {
    /// The state before the first step.
    pub fn new(recipe: &Recipe, corpus: Digest) -> Self {
        let position = Position::default();
        Self { format: FORMAT, step: 0, tokens: 0, position, best: None, corpus, recipe: recipe.clone() }
    }
}

/// Writes a checkpoint: a temporary folder, fsync of all in it, rename.
///
/// # Errors
/// The system's: a full disk, an unwritable folder. Nothing half-written stays, older checkpoints are untouched.
pub fn save(
    path: &Path,
    state: &TrainState,
    model: &Model,
    optimizer: &Optimizer,
    tokenizer: &TextTokenizer,
) -> Result<()> {
    files::create_folder(path.parent().unwrap_or(Path::new(".")))?;
    files::write_folder_whole(path, |folder| {
        model_folder::fill(folder, model, tokenizer, ExportDtype::F32)?;
        write_moments(&folder.join(MOMENTS), model, optimizer)?;
        let mut facts = BTreeMap::new();
        for file in files::entries(folder)? {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            facts.insert(name, facts_of(&file)?);
        }
        let file = StateFile { state: state.clone(), files: facts };
        let json = serde_json::to_string_pretty(&file).expect("a state is plain data");
        files::write_whole(&folder.join(STATE), format!("{json}\n").as_bytes())
    })
}

/// Reads where the checkpoint in `folder` stands; looks at `trainer.json` alone.
///
/// # Errors
/// Not one of ours.
pub fn read_state(folder: &Path) -> Result<TrainState> {
    Ok(read_state_file(folder)?.state)
}

fn read_state_file(folder: &Path) -> Result<StateFile> {
    let path = folder.join(STATE);
    let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
    let refuse = |message: String| TrainError::Checkpoint { path: path.clone(), message };
    let file: StateFile = serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?;
    match file.state.format {
        FORMAT => Ok(file),
        other => Err(refuse(format!("wanted format {FORMAT}, found {other}"))),
    }
}

/// Loads weights and moments, every file checked against `trainer.json` first.
///
/// # Errors
/// A missing, torn or changed file; a model or moments that are not the recipe's.
pub fn load(folder: &Path, config: &ModelConfig, recipe: &Recipe) -> Result<(Model, Optimizer)> {
    for (name, wanted) in read_state_file(folder)?.files {
        let path = folder.join(&name);
        let found = facts_of(&path)?;
        let show = |facts: &FileFacts| format!("fingerprint {} over {} bytes", facts.fingerprint, facts.bytes);
        if found != wanted {
            let message = format!(
                "wanted {}, found {}: delete the folder to go on from an older one",
                show(&wanted),
                show(&found)
            );
            return Err(TrainError::Checkpoint { path, message });
        }
    }
    let model = model_folder::load(folder)?;
    if model.config != *config {
        let message = format!("wanted the recipe's model {config:?}, found {:?}", model.config);
        return Err(TrainError::Checkpoint { path: folder.join("config.json"), message });
    }
    let mut optimizer = Optimizer::new(&recipe.optimizer, &model.params());
    read_moments(&folder.join(MOMENTS), &model, &mut optimizer)?;
    Ok((model, optimizer))
}

fn facts_of(path: &Path) -> Result<FileFacts> {
    let bytes = std::fs::read(path).map_err(TrainError::io("read", path))?;
    Ok(FileFacts { bytes: bytes.len() as u64, fingerprint: Digest::of(&bytes) })
}

fn write_moments(path: &Path, model: &Model, optimizer: &Optimizer) -> Result<()> {
    let mut tensors = Vec::new();
    for (param, moments) in model.params().into_iter().zip(optimizer.moments()) {
        for (kind, data) in [("first", &moments.first), ("second", &moments.second)] {
            let (name, shape) = (format!("{kind}.{}", param.name()), param.shape().to_vec());
            tensors.push(TensorToWrite { name, shape, data: TensorData::F32(data) });
        }
    }
    Ok(write_safetensors(path, &tensors)?)
}

fn read_moments(path: &Path, model: &Model, optimizer: &mut Optimizer) -> Result<()> {
    let file = SafetensorsFile::open(path)?;
    for (param, moments) in model.params().into_iter().zip(optimizer.moments_mut()) {
        for (kind, data) in [("first", &mut moments.first), ("second", &mut moments.second)] {
            let name = format!("{kind}.{}", param.name());
            let tensor = file.tensor(&name)?;
            if tensor.shape != param.shape() {
                let message = format!("tensor `{name}`: wanted shape {:?}, found {:?}", param.shape(), tensor.shape);
                return Err(TrainError::Checkpoint { path: path.to_path_buf(), message });
            }
            tensor.read_f32(data)?;
        }
    }
    Ok(())
}
