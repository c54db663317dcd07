//! [`Survey`]: what a model is, read from its configuration and the headers of its files alone.
//!
//! Shards are looked at one after the other and kept nowhere, so that the largest checkpoint costs a few megabytes.

use crate::checkpoint::{CONFIG, INDEX, WEIGHTS, visit_index};
use crate::encoder_decoder::{self, EncoderDecoder, EncoderDecoderConfig};
use crate::families::{self, Layout};
use crate::gguf::{GgufFile, GgufModel};
use crate::safetensors::{SafetensorsFile, TensorView};
use crate::{ModelConfig, ModelError, packed};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What a model is, and what its files hold. An encoder-decoder has a configuration of its own.
#[derive(Clone, Debug)]
pub struct Survey<C = ModelConfig> {
    /// What it is made of.
    pub config: C,
    /// Where that was read.
    pub source: SurveySource,
    /// The weights; none for a bare configuration.
    pub stored: Option<StoredWeights>,
}

/// Where a model is described.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SurveySource {
    /// A folder in Hugging Face's layout.
    Folder,
    /// A packed model.
    Packed,
    /// A GGUF file.
    Gguf,
    /// A `config.json` with no weights beside it that were looked for.
    Config,
}

/// The weights of some files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredWeights {
    /// Files that hold them.
    pub files: usize,
    /// By the name of their type or block format; scales of codes are a type of their own.
    pub types: BTreeMap<String, StoredType>,
    /// Parts that the model leaves out, by what they are: images, the prediction of further tokens, copies.
    pub left_out: BTreeMap<&'static str, StoredType>,
}

/// Weights of one type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoredType {
    /// Tensors there are; of a packed model, its weights.
    pub tensors: u64,
    /// Their numbers.
    pub elements: u64,
    /// Bytes they take.
    pub bytes: u64,
}

/// What a tensor is, by its name, if the model leaves it out.
type LeftOut<'l> = &'l dyn Fn(&str) -> Option<&'static str>;

impl StoredWeights {
    /// Bytes of all types.
    pub fn bytes(&self) -> u64 {
        self.types.values().map(|of| of.bytes).sum()
    }

    /// Those of a folder in Hugging Face's layout, if it has any.
    fn of_folder(folder: &Path, left_out: LeftOut<'_>) -> Result<Option<Self>, ModelError> {
        let (weights, index) = (folder.join(WEIGHTS), folder.join(INDEX));
        let mut stored = Self::default();
        if weights.exists() {
            stored.add_file(&SafetensorsFile::open(&weights)?, left_out);
        } else if index.exists() {
            for shard in shards(&index)? {
                stored.add_file(&SafetensorsFile::open(&folder.join(shard))?, left_out);
            }
        } else {
            return Ok(None);
        }
        Ok(Some(stored))
    }

    fn add(&mut self, name: &str, elements: usize, bytes: usize) {
        // Few names, many tensors: a name is copied once.
        if !self.types.contains_key(name) {
            self.types.insert(name.to_string(), StoredType::default());
        }
        self.types.get_mut(name).expect("put in above").add(elements, bytes);
    }

    fn add_file(&mut self, file: &SafetensorsFile<'_>, left_out: LeftOut<'_>) {
        self.files += 1;
        for TensorView { name, dtype, shape, bytes, .. } in file.tensors() {
            let elements = shape.iter().product();
            if let Some(what) = left_out(name) {
                self.left_out.entry(what).or_default().add(elements, bytes.len());
            } else if name.ends_with("_scale_inv") || name.ends_with("_scales") {
                self.add("scales", elements, bytes.len());
            } else if name.ends_with("_blocks") {
                self.add("MXFP4", 2 * elements, bytes.len());
            } else {
                self.add(dtype.name(), elements, bytes.len());
            }
        }
    }
}

impl StoredType {
    fn add(&mut self, elements: usize, bytes: usize) {
        self.tensors += 1;
        self.elements += elements as u64;
        self.bytes += bytes as u64;
    }
}

impl Survey {
    /// Looks at a folder in Hugging Face's layout, a packed model, a GGUF file, or a configuration (a file whose name ends
    /// in `.json`, or a folder with nothing but `config.json`). Of the weights only headers are read.
    ///
    /// # Errors
    /// What is missing, foreign or broken, by file.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if path.is_dir() {
            return Self::of_folder(path);
        }
        if path.extension().is_some_and(|extension| extension == "json") {
            return Ok(Self { config: read_config(path)?.0, source: SurveySource::Config, stored: None });
        }
        if !path.is_file() {
            return Err(ModelError::file(path.display().to_string(), "no such folder or file"));
        }
        let file = GgufFile::open(path)?;
        let mut stored = StoredWeights { files: file.n_parts(), ..StoredWeights::default() };
        for tensor in file.tensors() {
            stored.add(tensor.format.name(), tensor.shape.iter().product(), tensor.bytes.len());
        }
        Ok(Self { config: GgufModel::new(file)?.0, source: SurveySource::Gguf, stored: Some(stored) })
    }

    /// Looks at a model in memory.
    ///
    /// # Errors
    /// As [`Survey::open`].
    pub fn from_bytes(config: &[u8], weights: &[u8]) -> Result<Self, ModelError> {
        let mut stored = StoredWeights::default();
        let (config, layout) = families::read_with_layout(config, CONFIG)?;
        stored.add_file(&SafetensorsFile::from_bytes(WEIGHTS, weights)?, &|name| {
            layout.left_out(name).map(|part| part.what)
        });
        Ok(Self { config, source: SurveySource::Folder, stored: Some(stored) })
    }

    fn of_folder(folder: &Path) -> Result<Self, ModelError> {
        let (config, layout) = read_config(&folder.join(CONFIG))?;
        if let Some(stored) = StoredWeights::of_folder(folder, &|name| layout.left_out(name).map(|part| part.what))? {
            return Ok(Self { config, source: SurveySource::Folder, stored: Some(stored) });
        }
        if !packed::is_packed(folder) {
            return Ok(Self { config, source: SurveySource::Config, stored: None });
        }
        let mut stored = StoredWeights { files: 1, ..StoredWeights::default() };
        packed::survey(folder, &config, &mut |format, elements, bytes| stored.add(format, elements, bytes))?;
        Ok(Self { config, source: SurveySource::Packed, stored: Some(stored) })
    }
}

impl Survey<EncoderDecoderConfig> {
    /// As [`Survey::open`], of an encoder-decoder's folder or configuration; `None` of anything else.
    ///
    /// # Errors
    /// What is missing or broken, by file.
    pub fn open_encoder_decoder(path: &Path) -> Result<Option<Self>, ModelError> {
        let file = match path.is_dir() {
            true => path.join(CONFIG),
            false if path.extension().is_some_and(|extension| extension == "json") => path.to_path_buf(),
            false => return Ok(None),
        };
        if !EncoderDecoder::is_told_by(&file) {
            return Ok(None);
        }
        let bytes = std::fs::read(&file).map_err(ModelError::io(&file))?;
        let config = EncoderDecoderConfig::read(&bytes, &file.display().to_string())?;
        let copy = |name: &str| encoder_decoder::is_copy(&config, name).then_some("copies of the embedding");
        let stored = if path.is_dir() { StoredWeights::of_folder(path, &copy)? } else { None };
        let source = if stored.is_some() { SurveySource::Folder } else { SurveySource::Config };
        Ok(Some(Self { config, source, stored }))
    }
}

fn read_config(path: &Path) -> Result<(ModelConfig, Layout), ModelError> {
    families::read_with_layout(&std::fs::read(path).map_err(ModelError::io(path))?, &path.display().to_string())
}

/// The shards that an index names.
fn shards(index: &Path) -> Result<BTreeSet<String>, ModelError> {
    let mut all = BTreeSet::new();
    visit_index(index, &mut |_, shard| {
        if !all.contains(shard) {
            all.insert(shard.to_string());
        }
    })?;
    Ok(all)
}
