//! Checkpoints: all that exact resumption needs, in one folder that is whole or not there.
//!
//! `step-N/` is a Hugging Face folder (weights in f32) with more files: `optimizer.safetensors`, the moments as
//! `first.NAME` and `second.NAME` by our parameter names, `average.safetensors` if the recipe averages, and
//! `trainer.json`, the [`TrainState`], which names every other file with its size and fingerprint and is checked against
//! them before anything is used.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use moebius_model::safetensors::{SafetensorsFile, TensorData, TensorToWrite, write_safetensors};
use moebius_model::{Model, ModelConfig};
use moebius_tensor::Param;
use serde::{Deserialize, Serialize};

use crate::average::Average;
use crate::data::sampler::Position;
use crate::data::tokenizer::TextTokenizer;
use crate::digest::{Digest, Hasher};
use crate::optimizer::Optimizer;
use crate::recipe::ExportDtype;
use crate::{Recipe, Result, TrainError, files, model_folder};

/// Raised whenever an older `trainer.json` could not be resumed.
const FORMAT: u32 = 2;
const STATE: &str = "trainer.json";
const MOMENTS: &str = "optimizer.safetensors";
const AVERAGE: &str = "average.safetensors";

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
    /// Where the samplers stand, one for each stream of the data.
    pub positions: Vec<Position>,
    /// The lowest validation loss so far.
    pub best: Option<Best>,
    /// Validations since then.
    pub stale: u64,
    /// What the run has seen lately, by which spikes and collapses are judged.
    pub watch: Watch,
    /// Fingerprint of the tokens and the tokenizer.
    pub corpus: Digest,
    /// The recipe that the run follows.
    pub recipe: Recipe,
}

/// What spikes and collapses are judged by.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watch {
    /// The last training losses, oldest first.
    pub losses: Vec<f64>,
    /// Rollbacks so far.
    pub rollbacks: u64,
    /// Assignments of each layer's experts since they were last judged.
    pub loads: Vec<Vec<u64>>,
}

/// The lowest validation loss of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// After this step.
    pub step: u64,
    /// In nats a token.
    pub loss: f64,
    /// Whether it is the average of the weights that has it.
    pub averaged: bool,
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
        Self {
            format: FORMAT,
            step: 0,
            tokens: 0,
            positions: Vec::new(),
            best: None,
            stale: 0,
            watch: Watch::default(),
            corpus,
            recipe: recipe.clone(),
        }
    }
}

/// What learns: everything that a checkpoint carries besides the [`TrainState`].
pub struct Learner {
    /// The weights.
    pub model: Model,
    /// The optimiser's state.
    pub optimizer: Optimizer,
    /// The average of the weights, if the recipe asks for one.
    pub average: Option<Average>,
}

impl Learner {
    /// A learner at the beginning.
    pub fn new(model: Model, recipe: &Recipe) -> Self {
        let optimizer = Optimizer::new(&recipe.optimizer, recipe.train.precision.into(), &model.params());
        let average = recipe.train.average.map(|decay| Average::new(decay, &model.params()));
        Self { model, optimizer, average }
    }
}

/// Writes a checkpoint: a temporary folder, fsync of all in it, rename.
///
/// # Errors
/// The system's: a full disk, an unwritable folder. Nothing half-written stays, older checkpoints are untouched.
pub fn save(path: &Path, state: &TrainState, learner: &Learner, tokenizer: &TextTokenizer) -> Result<()> {
    files::create_folder(path.parent().unwrap_or(Path::new(".")))?;
    files::write_folder_whole(path, |folder| {
        model_folder::fill(folder, &learner.model, tokenizer, ExportDtype::F32)?;
        write_moments(&folder.join(MOMENTS), learner)?;
        write_average(&folder.join(AVERAGE), learner)?;
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

/// Loads weights, moments and average, every file checked against `trainer.json` first.
///
/// # Errors
/// A missing, torn or changed file; a model or moments that are not the recipe's.
pub fn load(folder: &Path, config: &ModelConfig, recipe: &Recipe) -> Result<Learner> {
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
    let mut learner = Learner::new(model, recipe);
    read_moments(&folder.join(MOMENTS), &mut learner)?;
    read_average(&folder.join(AVERAGE), &mut learner)?;
    Ok(learner)
}

/// Reads a file piece by piece: the moments of a model are twice its size.
fn facts_of(path: &Path) -> Result<FileFacts> {
    let mut file = std::fs::File::open(path).map_err(TrainError::io("read", path))?;
    let (mut hasher, mut bytes, mut piece) = (Hasher::default(), 0, vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(FileFacts { bytes, fingerprint: hasher.finish() }),
            Ok(len) => {
                hasher.write(&piece[..len]);
                bytes += len as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(TrainError::io("read", path)(error)),
        }
    }
}

fn write_moments(path: &Path, learner: &Learner) -> Result<()> {
    let mut tensors = Vec::new();
    for (param, moments) in learner.model.params().into_iter().zip(learner.optimizer.moments()) {
        for (kind, data) in [("first", &moments.first), ("second", &moments.second)] {
            if !data.is_empty() {
                let (name, shape) = (format!("{kind}.{}", param.name()), param.shape().to_vec());
                tensors.push(TensorToWrite { name, shape, data: TensorData::F32(data) });
            }
        }
    }
    Ok(write_safetensors(path, &tensors)?)
}

fn read_moments(path: &Path, learner: &mut Learner) -> Result<()> {
    let file = SafetensorsFile::open(path)?;
    for (param, moments) in learner.model.params().into_iter().zip(learner.optimizer.moments_mut()) {
        for (kind, data) in [("first", &mut moments.first), ("second", &mut moments.second)] {
            if !data.is_empty() {
                read_tensor(path, &file, &format!("{kind}.{}", param.name()), param, data)?;
            }
        }
    }
    Ok(())
}

fn write_average(path: &Path, learner: &Learner) -> Result<()> {
    let Some(average) = &learner.average else { return Ok(()) };
    let named = learner.model.params().into_iter().zip(average.weights());
    let tensors = named.map(|(param, data)| {
        let (name, shape) = (param.name().to_owned(), param.shape().to_vec());
        TensorToWrite { name, shape, data: TensorData::F32(data) }
    });
    Ok(write_safetensors(path, &tensors.collect::<Vec<_>>())?)
}

fn read_average(path: &Path, learner: &mut Learner) -> Result<()> {
    let Some(average) = &mut learner.average else { return Ok(()) };
    let file = SafetensorsFile::open(path)?;
    for (param, data) in learner.model.params().into_iter().zip(average.weights_mut()) {
        read_tensor(path, &file, param.name(), param, data)?;
    }
    Ok(())
}

/// Reads the tensor `name`, which must have the shape of `param`.
fn read_tensor(path: &Path, file: &SafetensorsFile, name: &str, param: &Param, data: &mut [f32]) -> Result<()> {
    let tensor = file.tensor(name)?;
    if tensor.shape != param.shape() {
        let message = format!("tensor `{name}`: wanted shape {:?}, found {:?}", param.shape(), tensor.shape);
        return Err(TrainError::Checkpoint { path: path.to_path_buf(), message });
    }
    Ok(tensor.read_f32(data)?)
}
