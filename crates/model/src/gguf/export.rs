//! A model as a GGUF file that llama.cpp runs.

use super::architecture::{Architecture, KeyKind, Place, row_of_halves};
use super::model::head_dim;
use super::vocabulary::vocabulary_metadata;
use super::write::{MetadataToWrite, ValueToWrite, Values, WeightToWrite, write_gguf};
use crate::config::{LayerConfig, RopeScaling};
use crate::families::{self, TensorMap};
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
/// A family or a window that llama.cpp's architectures lack, a tokenizer other than byte-level BPE, a weight that is not
/// finite, what the system says.
pub fn write_model(path: &Path, model: &Model, settings: &ExportSettings) -> Result<(), ModelError> {
    let file = path.display().to_string();
    let config = &model.config;
    let Some(architecture) = Architecture::of_family(&config.family) else {
        let message = format!("no GGUF architecture is known for family `{}`", config.family);
        return Err(ModelError::file(file, message));
    };
    let windows = config.layers.iter().filter_map(|layer| layer.mixer.attention()?.reach.window());
    if let Some(window) = windows.min().filter(|&window| window < config.max_positions) {
        let message = format!("wanted none for the architecture {}, found {window}", architecture.name);
        return Err(ModelError::config(&file, "sliding_window", message));
    }
    let is_scaled = |layer: &LayerConfig| {
        let rope = layer.mixer.attention().and_then(|attention| attention.rope.as_ref());
        rope.is_some_and(|rope| rope.scaling != RopeScaling::None)
    };
    if config.layers.iter().any(is_scaled) {
        let message = format!("wanted none for the architecture {}", architecture.name);
        return Err(ModelError::config(&file, "rope_scaling", message));
    }
    if config.layers.iter().any(|layer| layer.mixer.attention().is_some_and(|attention| attention.clip.is_some())) {
        let message = format!("wanted none for the architecture {}", architecture.name);
        return Err(ModelError::config(&file, "clip_qkv", message));
    }
    let mut metadata = model_metadata(architecture, config, settings);
    metadata.extend(vocabulary_metadata(settings.tokenizer, config)?);
    if let Some(template) = settings.chat_template {
        metadata.push(("tokenizer.chat_template".into(), ValueToWrite::Text(template.into())));
    }
    write_gguf(path, &metadata, &weights(&file, architecture, model, settings.format)?)
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
    let whole = |key: String, value: usize| (key, ValueToWrite::U32(value as u32));
    let mut all = vec![text("general.architecture", architecture.name), text("general.type", "model")];
    all.extend(settings.name.map(|name| text("general.name", name)));
    all.push(("general.file_type".into(), ValueToWrite::U32(file_type(settings.format))));
    all.push(("general.quantization_version".into(), ValueToWrite::U32(2)));
    let written = families::write_config(config, "float32");
    let key = |suffix: &str| format!("{}.{suffix}", architecture.name);
    for (suffix, theirs, kind) in architecture.keys(config.moe().is_some()) {
        // A window as long as the context is none.
        if suffix == "attention.sliding_window" {
            continue;
        }
        let Some(number) = written.get(theirs).and_then(serde_json::Value::as_f64) else { continue };
        let value = match kind {
            KeyKind::Whole | KeyKind::OptionalWhole => ValueToWrite::U32(number as u32),
            KeyKind::Number | KeyKind::OptionalNumber => ValueToWrite::F32(number as f32),
        };
        all.push((key(suffix), value));
    }
    all.push(whole(key("attention.value_length"), head_dim(config)));
    all.push(whole(key("rope.dimension_count"), head_dim(config)));
    all.push(whole(key("vocab_size"), config.vocab_size));
    all
}

/// A tensor of the file: the weights, or parts of weights, that it holds one after another.
struct Stack<'m> {
    place: Place,
    parts: Vec<(TensorMap, &'m [f32])>,
}

fn weights<'m>(
    file: &str,
    architecture: &Architecture,
    model: &'m Model,
    format: Format,
) -> Result<Vec<WeightToWrite<'m>>, ModelError> {
    let params: BTreeMap<&str, &Param> = model.params().into_iter().map(|param| (param.name(), param)).collect();
    let mut stacks: Vec<Stack> = Vec::new();
    let mut by_name: BTreeMap<String, usize> = BTreeMap::new();
    for map in families::tensors(&model.config) {
        let Some(place) = architecture.place(&map.file_name) else {
            let message = format!("the architecture {} has no place for it", architecture.name);
            return Err(ModelError::tensor(file, &map.file_name, message));
        };
        let data = params[&map.param[..]].value().data();
        let index = *by_name.entry(place.name.clone()).or_insert(stacks.len());
        if index == stacks.len() {
            stacks.push(Stack { place, parts: Vec::new() });
        } else {
            // Experts come in their order.
            assert_eq!(place.part, Some(stacks[index].parts.len()), "{}", map.file_name);
        }
        stacks[index].parts.push((map, data));
    }
    let (head_dim, tied) = (head_dim(&model.config), model.config.tie_embeddings);
    Ok(stacks.into_iter().map(|stack| weight(stack, head_dim, tied, format)).collect())
}

fn weight<'m>(stack: Stack<'m>, head_dim: usize, tied: bool, format: Format) -> WeightToWrite<'m> {
    let part = &stack.parts[0].0.file_shape;
    let count = stack.place.part.map(|_| stack.parts.len());
    let shape: Vec<usize> = count.into_iter().chain(part.iter().copied()).collect();
    let is_head = stack.place.name == "output.weight" || tied && stack.place.name == "token_embd.weight";
    let format = stored_format(format, &stack.place.name, &shape, is_head);
    let name = stack.place.name.clone();
    let columns = shape.last().copied().unwrap_or(1);
    // A bias is one row whose numbers are rotated as a matrix's rows are.
    let values: Values = if shape.len() == 1 && stack.place.interleaved {
        Box::new(move |_, out| {
            let data = stack.parts[0].1;
            out.iter_mut().enumerate().for_each(|(i, out)| *out = data[row_of_halves(i, head_dim)]);
        })
    } else {
        let rows_of_part = shape[..shape.len() - 1].iter().product::<usize>() / stack.parts.len();
        Box::new(move |rows, out| {
            for (row, out) in rows.zip(out.chunks_exact_mut(columns)) {
                let (map, data) = &stack.parts[row / rows_of_part];
                let inner = row % rows_of_part;
                let inner = if stack.place.interleaved { row_of_halves(inner, head_dim) } else { inner };
                let from = (map.rows.start + inner) * columns;
                out.copy_from_slice(&data[from..from + columns]);
            }
        })
    };
    WeightToWrite { name, shape, format, values }
}

/// The format of one tensor; see [`ExportSettings::format`].
fn stored_format(wanted: Format, name: &str, shape: &[usize], is_head: bool) -> Format {
    if shape.len() == 1 || name.contains("ffn_gate_inp") {
        return Format::F32;
    }
    let bits = |format: Format| format.block_bytes() as f64 / format.block_len() as f64;
    let wanted = if is_head && bits(wanted) < bits(Format::Q6_K) { Format::Q6_K } else { wanted };
    let columns = shape.last().copied().unwrap_or(1);
    let fits = |format: &Format| columns.is_multiple_of(format.block_len());
    [wanted, Format::Q8_0].into_iter().find(fits).unwrap_or(Format::F32)
}
