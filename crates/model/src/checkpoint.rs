//! Checkpoints: folders in Hugging Face's layout, read whole (one file or shards) and written whole or not at all.

mod index;
mod quantised;

use crate::families::{self, Layout, TensorMap, View, group_by_file};
use crate::files::Staged;
use crate::gguf::{GgufFile, GgufModel};
use crate::safetensors::{SafetensorsFile, TensorData, TensorToWrite, stage_safetensors};
use crate::{Model, ModelConfig, ModelError};
use moebius_kernels::formats::Format;
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Param, Tensor};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub(crate) use index::{read_index, visit_index};
use quantised::{Parts, microscaled, plain_format};

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const WEIGHTS: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// An open checkpoint: its configuration, and where each tensor is.
pub struct Checkpoint<'a> {
    config: ModelConfig,
    layout: Layout,
    name: String,
    files: Vec<SafetensorsFile<'a>>,
    /// The one file that has everything, if it is of that kind.
    gguf: Option<GgufModel<'a>>,
}

impl Checkpoint<'static> {
    /// Opens a folder with `config.json` and `model.safetensors`, or the shards that `model.safetensors.index.json` names,
    /// or a GGUF file.
    ///
    /// # Errors
    /// What is missing, foreign or broken, by file.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        if folder.is_file() {
            return Self::from_gguf(GgufFile::open(folder)?);
        }
        if !folder.is_dir() {
            let message = if folder.exists() { "wanted a folder or a GGUF file" } else { "no such folder or file" };
            return Err(ModelError::file(folder.display().to_string(), message));
        }
        let path = folder.join(CONFIG);
        let bytes = std::fs::read(&path).map_err(ModelError::io(&path))?;
        let (config, layout) = families::read_with_layout(&bytes, &path.display().to_string())?;
        let index = folder.join(INDEX);
        let weights = folder.join(WEIGHTS);
        if index.exists() && !weights.exists() {
            return Self::open_shards((config, layout), folder, &index);
        }
        if crate::packed::is_packed(folder) && !weights.exists() {
            let message = "a packed model can only be run; wanted one in Hugging Face's layout, or GGUF";
            return Err(ModelError::file(folder.display().to_string(), message));
        }
        let files = vec![SafetensorsFile::open(&weights)?];
        Ok(Self { config, layout, name: weights.display().to_string(), files, gguf: None })
    }

    /// Opens the shards of an index, each of which must hold the tensors that the index says.
    fn open_shards((config, layout): (ModelConfig, Layout), folder: &Path, index: &Path) -> Result<Self, ModelError> {
        let (name, mut files) = (index.display().to_string(), Vec::new());
        for (shard, tensors) in read_index(index)? {
            let file = SafetensorsFile::open(&folder.join(shard))?;
            if let Some(missing) = tensors.iter().find(|tensor| file.get(tensor).is_none()) {
                return Err(ModelError::tensor(
                    file.name(),
                    missing,
                    format!("missing, although {name} says it is there"),
                ));
            }
            files.push(file);
        }
        Ok(Self { config, layout, name, files, gguf: None })
    }
}

impl<'a> Checkpoint<'a> {
    /// A checkpoint in memory.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_bytes(config: &[u8], weights: &'a [u8]) -> Result<Self, ModelError> {
        let (config, layout) = families::read_with_layout(config, CONFIG)?;
        let files = vec![SafetensorsFile::from_bytes(WEIGHTS, weights)?];
        Ok(Self { config, layout, name: WEIGHTS.into(), files, gguf: None })
    }

    /// A checkpoint that is a GGUF file.
    ///
    /// # Errors
    /// An architecture that is not known, keys missing, out of range or contradictory, or that ask for arithmetic we
    /// lack.
    pub fn from_gguf(file: GgufFile<'a>) -> Result<Self, ModelError> {
        let name = file.name().to_string();
        let (config, gguf) = GgufModel::new(file)?;
        Ok(Self { config, layout: Layout::default(), name, files: Vec::new(), gguf: Some(gguf) })
    }

    /// Its configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The family's tensors, each of which is there, of its shape and of a type that can be read.
    pub(crate) fn checked_maps(&self) -> Result<Vec<TensorMap>, ModelError> {
        if let Some(gguf) = &self.gguf {
            return gguf.checked_maps(&self.config);
        }
        let maps = self.maps();
        self.check_surplus(&maps)?;
        maps.iter().try_for_each(|map| self.check(map))?;
        Ok(maps)
    }

    /// Reads all weights by our names, as f32.
    pub(crate) fn load(&self) -> Result<BTreeMap<String, Tensor>, ModelError> {
        let maps = self.checked_maps()?;
        let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
        for map in &maps {
            let elements = map.elements().ok_or_else(|| {
                ModelError::tensor(&self.name, &map.file_name, format!("its shape {:?} overflows", map.file_shape))
            })?;
            *sizes.entry(&map.param).or_default() += elements;
        }
        // Only now, with every tensor there and of its shape, is memory taken.
        let mut values: BTreeMap<String, Buffer<f32>> =
            sizes.into_iter().map(|(param, size)| (param.to_string(), Buffer::scratch(size))).collect();
        for map in &maps {
            let (stored, cols) = (self.stored(map)?, map.cols);
            let buffer = values.get_mut(&map.param).expect("made above");
            stored.format.decode(&stored.bytes, &mut buffer[map.rows.start * cols..map.rows.end * cols]);
        }
        Ok(values.into_iter().map(|(name, data)| (name, Tensor::new(&[data.len()], data))).collect())
    }

    /// What is stored of a tensor of [`Checkpoint::checked_maps`].
    pub(crate) fn stored(&self, map: &TensorMap) -> Result<Stored<'_>, ModelError> {
        if let Some(gguf) = &self.gguf {
            return gguf.stored(map);
        }
        match self.parts(map).ok_or_else(|| self.missing(map))? {
            Parts::Microscaled(parts) => Ok(microscaled(map, parts)),
            Parts::Fp8(parts) => self.fp8(map, parts),
            Parts::Plain(view) => {
                let format = plain_format(&view)?;
                Ok(Stored { format, bytes: map.gather(view.bytes, format.block_bytes()) })
            }
        }
    }

    /// The format that a tensor of [`Checkpoint::checked_maps`] is stored in.
    pub(crate) fn stored_format(&self, map: &TensorMap) -> Result<Format, ModelError> {
        if let Some(gguf) = &self.gguf {
            return gguf.stored_format(map);
        }
        Ok(match self.parts(map).ok_or_else(|| self.missing(map))? {
            Parts::Microscaled(_) => Format::MXFP4,
            Parts::Fp8(_) => Format::F32,
            Parts::Plain(view) => plain_format(&view)?,
        })
    }

    /// The family's tensors, by the names and in the shapes of the files.
    fn maps(&self) -> Vec<TensorMap> {
        let mut maps = families::tensors(&self.config);
        let mut names = self.files.iter().flat_map(SafetensorsFile::tensors).map(|tensor| tensor.name);
        let is_fused = names.any(|name| name.ends_with(".experts.gate_up_proj"));
        for map in &mut maps {
            if let Cow::Owned(name) = self.layout.file_name(&map.file_name) {
                map.file_name = name;
            }
            if let Some(fused) = self.fused(map).filter(|_| is_fused) {
                *map = fused;
            }
        }
        maps
    }

    /// A matrix of one expert where all experts of a layer stand together, as transformers holds them: gates and ups
    /// `[experts, 2 * width, hidden]`, downs `[experts, hidden, width]`.
    fn fused(&self, map: &TensorMap) -> Option<TensorMap> {
        let (layer, expert) = map.file_name.split_once(".experts.")?;
        let (expert, part) = expert.split_once('.')?;
        let (expert, n_experts) = (expert.parse::<usize>().ok()?, self.config.moe()?.n_experts);
        let (name, place, together) = match part {
            "gate_proj.weight" => ("gate_up_proj", 2 * expert, 2),
            "up_proj.weight" => ("gate_up_proj", 2 * expert + 1, 2),
            "down_proj.weight" => ("down_proj", expert, 1),
            _ => return None,
        };
        let [rows, cols] = map.file_shape[..] else { return None };
        Some(TensorMap {
            file_name: format!("{layer}.experts.{name}"),
            file_shape: vec![n_experts, together * rows, cols],
            view: View { first: place * rows * cols, ..map.view },
            ..map.clone()
        })
    }

    /// Parts of the published model that are left out (images, the prediction of further tokens): what each is, and its
    /// tensors.
    pub fn left_out(&self) -> BTreeMap<&'static str, usize> {
        let mut parts = BTreeMap::new();
        for tensor in self.files.iter().flat_map(SafetensorsFile::tensors) {
            if let Some(part) = self.layout.left_out(tensor.name) {
                *parts.entry(part.what).or_default() += 1;
            }
        }
        parts
    }

    fn check_surplus(&self, maps: &[TensorMap]) -> Result<(), ModelError> {
        let mut wanted: BTreeSet<&str> = BTreeSet::new();
        for map in maps {
            wanted.extend(self.parts(map).iter().flat_map(Parts::names));
        }
        let head = self.layout.file_name("lm_head.weight");
        if self.config.tie_embeddings {
            // Some writers store the tied head once more.
            wanted.insert(&head);
        }
        let mut seen = BTreeSet::new();
        for tensor in self.files.iter().flat_map(SafetensorsFile::tensors) {
            // Old checkpoints carry the rotary frequencies, which follow from the configuration.
            let is_known = wanted.contains(tensor.name) || tensor.name.ends_with(".rotary_emb.inv_freq");
            if !is_known && self.layout.left_out(tensor.name).is_none() {
                let hint = if tensor.name.contains("_scale") {
                    "; FP8 is read where config.json has weight_block_size and each matrix its weight_scale_inv"
                } else {
                    ""
                };
                let message = format!("the {} configuration has no such tensor{hint}", self.config.family);
                return Err(ModelError::tensor(tensor.file, tensor.name, message));
            }
            if !seen.insert(tensor.name) {
                return Err(ModelError::tensor(tensor.file, tensor.name, "stands in two shards"));
            }
        }
        self.check_tied_head(&head)
    }

    /// A tied head that is stored once more must be the embedding: else one of the two is not what its maker wanted.
    fn check_tied_head(&self, head: &str) -> Result<(), ModelError> {
        let find = |name: &str| self.files.iter().find_map(|file| file.get(name));
        let Some(head) = find(head).filter(|_| self.config.tie_embeddings) else { return Ok(()) };
        let name = self.layout.file_name("model.embed_tokens.weight");
        match find(&name) {
            Some(embedding)
                if (head.shape, head.dtype, head.bytes) != (embedding.shape, embedding.dtype, embedding.bytes) =>
            {
                let message = format!("wanted what {name} holds, for tie_word_embeddings is true; found other numbers");
                Err(ModelError::tensor(head.file, head.name, message))
            }
            _ => Ok(()),
        }
    }
}

/// Rows of weights as a checkpoint holds them.
pub(crate) struct Stored<'c> {
    pub(crate) format: Format,
    /// Whole blocks, row after row; a copy if the file has the rows in another order.
    pub(crate) bytes: Cow<'c, [u8]>,
}

/// A tensor under its checkpoint's name.
#[derive(Clone, Debug)]
pub struct NamedTensor<'m> {
    /// The checkpoint's name for it.
    pub name: String,
    /// Its shape there.
    pub shape: Vec<usize>,
    /// Its numbers, put together if it holds parts of several weights or in another order.
    pub data: Cow<'m, [f32]>,
}

/// Something of every weight, the weight itself or its gradient, under the checkpoint's names and shapes. `of` gives the
/// numbers of one of our weights; tensors of weights it has nothing for are left out.
pub fn named_tensors<'m>(model: &'m Model, of: impl Fn(&'m Param) -> Option<&'m [f32]>) -> Vec<NamedTensor<'m>> {
    tensors_as(&model.config, model, of)
}

/// As [`named_tensors`], in the layout of `config`.
fn tensors_as<'m>(
    config: &ModelConfig,
    model: &'m Model,
    of: impl Fn(&'m Param) -> Option<&'m [f32]>,
) -> Vec<NamedTensor<'m>> {
    let params: BTreeMap<&str, &Param> = model.params().into_iter().map(|param| (param.name(), param)).collect();
    let groups = group_by_file(families::tensors(config));
    let tensor = |maps: Vec<TensorMap>| {
        let data = match &maps[..] {
            [map] if map.is_whole() => {
                Cow::Borrowed(&of(params[&map.param[..]])?[map.rows.start * map.cols..map.rows.end * map.cols])
            }
            maps => {
                let mut data = vec![0.0; maps[0].file_shape.iter().product()];
                for map in maps {
                    let from = of(params[&map.param[..]])?;
                    for (row, numbers) in from[map.rows.start * map.cols..map.rows.end * map.cols]
                        .chunks_exact(map.cols.max(1))
                        .enumerate()
                    {
                        map.places(row).zip(numbers).for_each(|(place, &number)| data[place] = number);
                    }
                }
                Cow::Owned(data)
            }
        };
        let map = maps.into_iter().next()?;
        Some(NamedTensor { name: map.file_name, shape: map.file_shape, data })
    };
    groups.into_iter().filter_map(tensor).collect()
}

/// How weights are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StoredAs {
    /// f32: exact.
    #[default]
    F32,
    /// bf16, rounded to nearest even: half the size.
    Bf16,
}

/// Writes `config.json`, `generation_config.json` and `model.safetensors` into `folder`, which is made if need be. All
/// three are on the disk before the first takes its place.
///
/// # Errors
/// What the system says; what stood in the folder still does then, and nothing else.
pub fn save_model(folder: &Path, model: &Model, stored_as: StoredAs) -> Result<(), ModelError> {
    save_model_as(folder, model, &model.config, stored_as)
}

/// As [`save_model`], in the layout of another configuration with the same weights ([`families::published`]).
///
/// # Errors
/// As [`save_model`].
///
/// # Panics
/// If `config` has other weights.
pub fn save_model_as(
    folder: &Path,
    model: &Model,
    config: &ModelConfig,
    stored_as: StoredAs,
) -> Result<(), ModelError> {
    let named = tensors_as(config, model, |param| Some(param.value().data()));
    let tensors: Vec<TensorToWrite> = (named.iter())
        .map(|NamedTensor { name, shape, data }| {
            let data = match stored_as {
                StoredAs::F32 => TensorData::F32(data),
                StoredAs::Bf16 => TensorData::BF16(data),
            };
            TensorToWrite { name: name.clone(), shape: shape.clone(), data }
        })
        .collect();
    save_tensors(folder, config, &tensors, stored_as)
}

/// As [`save_model`], from the family's tensors.
pub(crate) fn save_tensors(
    folder: &Path,
    config: &ModelConfig,
    tensors: &[TensorToWrite],
    stored_as: StoredAs,
) -> Result<(), ModelError> {
    let is_new = !folder.exists();
    std::fs::create_dir_all(folder).map_err(ModelError::io(folder))?;
    let staged = stage_folder(folder, config, tensors, stored_as).inspect_err(|_| {
        if is_new {
            // Empty, for what was staged is gone; should that fail, an empty folder harms nobody.
            let _ = std::fs::remove_dir(folder);
        }
    })?;
    staged.into_iter().try_for_each(Staged::publish)
}

fn stage_folder(
    folder: &Path,
    config: &ModelConfig,
    tensors: &[TensorToWrite],
    stored_as: StoredAs,
) -> Result<[Staged; 3], ModelError> {
    let weights = stage_safetensors(&folder.join(WEIGHTS), tensors, 64)?;
    let generation = json!({
        "bos_token_id": config.bos_token,
        "eos_token_id": families::write_config(config, "")["eos_token_id"],
    });
    let generation = stage_json(&folder.join("generation_config.json"), &generation)?;
    let dtype = match stored_as {
        StoredAs::F32 => "float32",
        StoredAs::Bf16 => "bfloat16",
    };
    let config = stage_json(&folder.join(CONFIG), &families::write_config(config, dtype))?;
    // The configuration last: a folder that has one is complete.
    Ok([weights, generation, config])
}

pub(crate) fn stage_json(path: &Path, value: &Value) -> Result<Staged, ModelError> {
    let mut text = serde_json::to_vec_pretty(value).expect("a value of texts and numbers");
    text.push(b'\n');
    Staged::new(path, |out| out.write_all(&text))
}
