//! A model as a GGUF file that llama.cpp runs.

use super::GgufFile;
use super::architecture::Architecture;
use super::facts::{check_said, config_metadata, rope};
use super::model::placed_tensors;
use super::positions::position_weights;
use super::tensors::Layout;
use super::vocabulary::vocabulary_metadata;
use super::write::{MetadataToWrite, ValueToWrite, Values, WeightToWrite, stage_gguf};
use crate::families::{TensorMap, group_by_file};
use crate::{Model, ModelConfig, ModelError};
use moebius_kernels::formats::Format;
use moebius_tensor::Param;
use std::collections::BTreeMap;
use std::path::Path;

/// How a model is written.
#[derive(Clone, Copy, Debug)]
pub struct ExportSettings<'a> {
    /// The format of matrices. Vectors and routers stay f32; the head (or the embedding that serves as one) has at
    /// least the six bits of Q6_K; matrices whose rows are no whole blocks take Q8_0, and failing that f32.
    pub format: Format,
    /// What the model is called.
    pub name: Option<&'a str>,
    /// The model's `tokenizer.json`; without one the file has no vocabulary and takes token ids only.
    pub tokenizer: Option<&'a [u8]>,
    /// The template (Jinja) that makes a prompt of a conversation.
    pub chat_template: Option<&'a str>,
}

/// Writes a model whole or not at all.
///
/// # Errors
/// A family that llama.cpp's architectures lack, arithmetic that its architecture does otherwise (the key is named), a
/// tokenizer other than byte-level BPE, a weight that is not finite, what the system says.
pub fn write_model(path: &Path, model: &Model, settings: &ExportSettings) -> Result<(), ModelError> {
    let file = path.display().to_string();
    let config = &model.config;
    let Some(architecture) = Architecture::of_family(&config.family) else {
        let message = format!("no GGUF architecture is known for family `{}`", config.family);
        return Err(ModelError::file(file, message));
    };
    let weights = weights(&file, architecture, model, settings.format)?;
    let mut metadata = model_metadata(architecture, config, settings);
    metadata.extend(vocabulary_metadata(settings.tokenizer, config)?);
    if let Some(template) = settings.chat_template {
        metadata.push(("tokenizer.chat_template".into(), ValueToWrite::Text(template.into())));
    }
    let staged = stage_gguf(path, &metadata, &weights)?;
    check_said(&GgufFile::open(staged.path())?, &file, config)?;
    staged.publish()
}

/// What llama.cpp calls a file of mostly this format (`enum llama_ftype`).
fn file_type(format: Format) -> u32 {
    match format {
        Format::F32 => 0,
        Format::F16 => 1,
        Format::Q4_0 => 2,
        Format::Q4_1 => 3,
        Format::Q8_0 => 7,
        Format::Q5_0 => 8,
        Format::Q5_1 => 9,
        Format::Q2_K => 10,
        Format::Q3_K => 11,
        Format::Q4_K => 14,
        Format::Q5_K => 16,
        Format::Q6_K => 18,
        Format::IQ4_NL => 25,
        Format::IQ4_XS => 30,
        Format::Bf16 => 32,
        Format::MXFP4 => 38,
    }
}

fn model_metadata(
    architecture: &Architecture,
    config: &ModelConfig,
    settings: &ExportSettings,
) -> Vec<MetadataToWrite> {
    let text = |key: &str, value: &str| (key.to_string(), ValueToWrite::Text(value.into()));
    let mut all = vec![text("general.architecture", architecture.name), text("general.type", "model")];
    all.extend(settings.name.map(|name| text("general.name", name)));
    all.push(("general.file_type".into(), ValueToWrite::U32(file_type(settings.format))));
    all.push(("general.quantization_version".into(), ValueToWrite::U32(2)));
    all.extend(config_metadata(architecture, config));
    all
}

fn weights<'m>(
    file: &str,
    architecture: &Architecture,
    model: &'m Model,
    format: Format,
) -> Result<Vec<WeightToWrite<'m>>, ModelError> {
    let config = &model.config;
    let params: BTreeMap<&str, &Param> = model.params().into_iter().map(|param| (param.name(), param)).collect();
    let maps = placed_tensors(architecture, Layout::written(architecture), config, file)?;
    let weight = |maps: Vec<TensorMap>| {
        let (name, shape) = (maps[0].file_name.clone(), maps[0].file_shape.clone());
        let is_head = name == "output.weight" || config.tie_embeddings && name == "token_embd.weight";
        let format = stored_format(format, &name, &shape, is_head);
        let cols = shape.last().copied().unwrap_or(1);
        let rows = rows_of(&maps, &params, cols);
        let values: Values = Box::new(move |wanted, out| {
            let rows = rows[wanted].iter().zip(out.chunks_exact_mut(cols));
            rows.for_each(|(row, out)| out.copy_from_slice(row));
        });
        WeightToWrite { name, shape, format, values }
    };
    let factors = rope(config).map(position_weights).unwrap_or_default();
    Ok(factors.into_iter().chain(group_by_file(maps).into_iter().map(weight)).collect())
}

/// The rows of a tensor, each a row of a weight: what is written has no other parts.
fn rows_of<'m>(maps: &[TensorMap], params: &BTreeMap<&str, &'m Param>, cols: usize) -> Vec<&'m [f32]> {
    let count = maps[0].file_shape.iter().product::<usize>() / cols;
    let mut rows: Vec<&[f32]> = vec![&[]; count];
    for map in maps {
        let data = params[&map.param[..]].value().data();
        for (at, data) in data[map.rows.start * cols..map.rows.end * cols].chunks_exact(cols).enumerate() {
            rows[(map.view.first + at * map.view.row_stride) / cols] = data;
        }
    }
    assert!(rows.iter().all(|row| row.len() == cols), "{}: rows without weights", maps[0].file_name);
    rows
}

/// The format of one tensor; see [`ExportSettings::format`].
fn stored_format(wanted: Format, name: &str, shape: &[usize], is_head: bool) -> Format {
    if shape.len() == 1 || name.contains("ffn_gate_inp") || name.ends_with(".bias") {
        return Format::F32;
    }
    let bits = |format: Format| format.block_bytes() as f64 / format.block_len() as f64;
    let wanted = if is_head && bits(wanted) < bits(Format::Q6_K) { Format::Q6_K } else { wanted };
    let columns = shape.last().copied().unwrap_or(1);
    let fits = |format: &Format| columns.is_multiple_of(format.block_len());
    [wanted, Format::Q8_0].into_iter().find(fits).unwrap_or(Format::F32)
}
