//! Reading and writing an encoder-decoder in Hugging Face's layout.

use super::{EncoderDecoder, EncoderDecoderConfig, StackConfig};
use crate::ModelError;
use crate::checkpoint::{NamedTensor, StoredAs, read_index, stage_json};
use crate::families::TensorMap;
use crate::files::Staged;
use crate::safetensors::{SafetensorsFile, TensorData, TensorToWrite, stage_safetensors};
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Param, Tensor};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// Names under which writers store the embedding once more.
const COPIES: [&str; 3] = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"];
const EMBEDDING: &str = "shared.weight";

/// Every tensor of a checkpoint of this configuration.
fn tensors(config: &EncoderDecoderConfig) -> Vec<TensorMap> {
    let mut all = vec![map(EMBEDDING.into(), "embedding".into(), 0, &[config.vocab_size, config.hidden])];
    for (name, stack, is_decoder) in [("encoder", config.encoder, false), ("decoder", config.decoder, true)] {
        for layer in 0..stack.n_layers {
            all.extend(block(config, stack, layer, is_decoder, name));
        }
        let distances = format!("{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
        all.push(map(distances, format!("{name}.distances"), 0, &[config.buckets, config.n_heads]));
        let norm = format!("{name}.final_layer_norm.weight");
        all.push(map(norm, format!("{name}.final_norm"), 0, &[config.hidden]));
    }
    if !config.tie_embeddings {
        all.push(map("lm_head.weight".into(), "head".into(), 0, &[config.vocab_size, config.hidden]));
    }
    all
}

fn map(file_name: String, param: String, first: usize, shape: &[usize]) -> TensorMap {
    let rows = if shape.len() < 2 { 1 } else { shape[0] };
    TensorMap::whole(file_name, shape, param, first..first + rows)
}

fn block(
    config: &EncoderDecoderConfig,
    stack: StackConfig,
    layer: usize,
    is_decoder: bool,
    name: &str,
) -> Vec<TensorMap> {
    let (hidden, width, heads) = (config.hidden, config.width, config.n_heads * config.head_dim);
    let (theirs, ours) = (format!("{name}.block.{layer}.layer"), format!("{name}.{layer}"));
    let mut all = Vec::new();
    let mut attention = |place: usize, kind: &str, part: &str, norm: &str| {
        for (letter, rows, cols) in
            [("q", heads, hidden), ("k", heads, hidden), ("v", heads, hidden), ("o", hidden, heads)]
        {
            let file_name = format!("{theirs}.{place}.{kind}.{letter}.weight");
            all.push(map(file_name, format!("{ours}.{part}.{letter}"), 0, &[rows, cols]));
        }
        all.push(map(format!("{theirs}.{place}.layer_norm.weight"), format!("{ours}.{norm}"), 0, &[hidden]));
    };
    attention(0, "SelfAttention", "attention", "norm");
    if is_decoder {
        attention(1, "EncDecAttention", "cross", "cross_norm");
    }
    let theirs = format!("{theirs}.{}", if is_decoder { 2 } else { 1 });
    all.push(map(format!("{theirs}.layer_norm.weight"), format!("{ours}.ffn_norm"), 0, &[hidden]));
    let mut network = |place: &str, expert: usize| {
        let [up, down] = ["wi", "wo"].map(|part| format!("{theirs}.mlp.{place}{part}.weight"));
        all.push(map(up, format!("{ours}.up"), expert * width, &[width, hidden]));
        all.push(map(down, format!("{ours}.down"), expert * hidden, &[hidden, width]));
    };
    if stack.is_sparse(layer) {
        (0..config.n_experts).for_each(|expert| network(&format!("experts.expert_{expert}."), expert));
        let router = format!("{theirs}.mlp.router.classifier.weight");
        all.push(map(router, format!("{ours}.router"), 0, &[config.n_experts, hidden]));
    } else {
        network("", 0);
    }
    all
}

/// Whether a tensor is the embedding once more.
pub(crate) fn is_copy(config: &EncoderDecoderConfig, name: &str) -> bool {
    COPIES.contains(&name) && (name != "lm_head.weight" || config.tie_embeddings)
}

/// The files of a folder's weights.
fn open_files(folder: &Path) -> Result<Vec<SafetensorsFile<'static>>, ModelError> {
    let (weights, index) = (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
    if index.exists() && !weights.exists() {
        return read_index(&index)?.into_keys().map(|shard| SafetensorsFile::open(&folder.join(shard))).collect();
    }
    Ok(vec![SafetensorsFile::open(&weights)?])
}

impl EncoderDecoder {
    /// Whether a folder holds a model of this kind.
    pub fn is_in(folder: &Path) -> bool {
        Self::is_told_by(&folder.join("config.json"))
    }

    /// Whether a `config.json` is one of this kind.
    pub(crate) fn is_told_by(config: &Path) -> bool {
        let Ok(bytes) = std::fs::read(config) else { return false };
        let config = serde_json::from_slice::<serde_json::Value>(&bytes);
        config.is_ok_and(|config| config.get("model_type").is_some_and(|kind| kind == super::MODEL_TYPE))
    }

    /// Opens a folder with `config.json` and `model.safetensors`, or the shards that an index names.
    ///
    /// # Errors
    /// What is missing, foreign, surplus or broken, by file, key and tensor.
    pub fn load(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let bytes = std::fs::read(&path).map_err(ModelError::io(&path))?;
        let config = EncoderDecoderConfig::read(&bytes, &path.display().to_string())?;
        let files = open_files(folder)?;
        let maps = tensors(&config);
        check_files(&files, &maps, &config)?;
        let mut values: BTreeMap<&str, Buffer<f32>> = BTreeMap::new();
        for map in &maps {
            // As much as all tensors of this weight hold; they are there and of their shape.
            values.entry(&map.param).or_insert_with(|| {
                let of_weight = maps.iter().filter(|other| other.param == map.param);
                Buffer::zeroed(of_weight.filter_map(TensorMap::elements).sum())
            });
        }
        for map in &maps {
            let view = find(&files, map)?;
            let cols = map.cols;
            let weight = values.get_mut(&map.param[..]).expect("made above");
            view.read_f32(&mut weight[map.rows.start * cols..map.rows.end * cols])?;
        }
        Self::build(&config, &mut |id, name, shape| {
            let value = values.remove(name).expect("the tensors make all weights");
            Ok(Param::new(id, name, Tensor::new(shape, value)))
        })
    }

    /// Something of every weight, the weight itself or its gradient, under the checkpoint's names and shapes; tensors of
    /// weights that `of` has nothing for are left out.
    pub fn named_tensors<'m>(&'m self, of: impl Fn(&'m Param) -> Option<&'m [f32]>) -> Vec<NamedTensor<'m>> {
        let params: BTreeMap<&str, &Param> = self.params().into_iter().map(|param| (param.name(), param)).collect();
        let part = |map: TensorMap| {
            let (data, cols) = (of(params[&map.param[..]])?, map.cols);
            let data = Cow::Borrowed(&data[map.rows.start * cols..map.rows.end * cols]);
            Some(NamedTensor { name: map.file_name, shape: map.file_shape, data })
        };
        tensors(&self.config).into_iter().filter_map(part).collect()
    }

    /// Writes `config.json` and `model.safetensors` into `folder`, which is made if need be; both are on the disk before the
    /// first takes its place.
    ///
    /// # Errors
    /// What the system says; what stood in the folder still does then.
    pub fn save(&self, folder: &Path, stored_as: StoredAs) -> Result<(), ModelError> {
        std::fs::create_dir_all(folder).map_err(ModelError::io(folder))?;
        let named = self.named_tensors(|param| Some(param.value().data()));
        let tensors: Vec<TensorToWrite> = (named.iter())
            .map(|NamedTensor { name, shape, data }| {
                let data = match stored_as {
                    StoredAs::F32 => TensorData::F32(data),
                    StoredAs::Bf16 => TensorData::BF16(data),
                };
                TensorToWrite { name: name.clone(), shape: shape.clone(), data }
            })
            .collect();
        let dtype = match stored_as {
            StoredAs::F32 => "float32",
            StoredAs::Bf16 => "bfloat16",
        };
        let weights = stage_safetensors(&folder.join("model.safetensors"), &tensors, 64)?;
        let config = stage_json(&folder.join("config.json"), &self.config.write(dtype))?;
        [weights, config].into_iter().try_for_each(Staged::publish)
    }
}

fn find<'f>(
    files: &'f [SafetensorsFile<'static>],
    map: &TensorMap,
) -> Result<crate::safetensors::TensorView<'f>, ModelError> {
    files.iter().find_map(|file| file.get(&map.file_name)).ok_or_else(|| {
        let name = files.first().map_or("", SafetensorsFile::name);
        ModelError::tensor(name, &map.file_name, format!("missing; wanted shape {:?}", map.file_shape))
    })
}

/// Each tensor is there and of its shape; there is no other, but copies of a tied embedding.
fn check_files(
    files: &[SafetensorsFile<'static>],
    maps: &[TensorMap],
    config: &EncoderDecoderConfig,
) -> Result<(), ModelError> {
    let wanted: BTreeMap<&str, &TensorMap> = maps.iter().map(|map| (&map.file_name[..], map)).collect();
    for map in maps {
        let view = find(files, map)?;
        if view.shape != map.file_shape {
            let message = format!("wanted shape {:?}, found {:?}", map.file_shape, view.shape);
            return Err(ModelError::tensor(view.file, view.name, message));
        }
    }
    let embedding = find(files, wanted[EMBEDDING])?;
    for tensor in files.iter().flat_map(SafetensorsFile::tensors) {
        if wanted.contains_key(tensor.name) {
            continue;
        }
        if !is_copy(config, tensor.name) {
            let message = format!("the {} configuration has no such tensor", super::MODEL_TYPE);
            return Err(ModelError::tensor(tensor.file, tensor.name, message));
        }
        if (tensor.shape, tensor.dtype, tensor.bytes) != (embedding.shape, embedding.dtype, embedding.bytes) {
            let message = format!("wanted what {EMBEDDING} holds, found other numbers");
            return Err(ModelError::tensor(tensor.file, tensor.name, message));
        }
    }
    Ok(())
}
