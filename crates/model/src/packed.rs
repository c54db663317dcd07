//! Packed models: a folder whose weights stand as the products read them, mapped into memory when run.
//!
//! `packed.json` names the version and each weight's format; `packed.safetensors` holds the bytes. A layer's experts are
//! one tensor `[experts, bytes]`: each expert's gate and up, then its down, padded to whole pages, so that an expert is
//! one stretch of the file that starts on a page. All other matrices follow, then what is held in f32.

use crate::families;
use crate::files::Staged;
use crate::running::is_matrix;
use crate::safetensors::{Dtype, SafetensorsFile, TensorData, TensorToWrite, stage_safetensors_with};
use crate::{LoadProgress, Model, ModelConfig, ModelError};
use moebius_kernels::formats::Format;
use moebius_kernels::gemm::{Packed, Precision};
use moebius_kernels::memory::SharedBytes;
use moebius_kernels::quantised::{QuantisedMatrix, packed_bytes};
use moebius_tensor::{Frozen, Param, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The file that makes a folder a packed model.
pub const INDEX: &str = "packed.json";
const WEIGHTS: &str = "packed.safetensors";
const CONFIG: &str = "config.json";
/// The layout's version: the order of bytes in panels and units. It is the same on every machine.
const VERSION: u32 = 2;
/// Experts start on borders of this.
const PAGE: usize = 4096;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Index {
    version: u32,
    /// The format of each matrix, by the weight's name.
    formats: BTreeMap<String, String>,
}

/// Whether a folder holds a packed model.
pub fn is_packed(folder: &Path) -> bool {
    folder.join(INDEX).is_file()
}

/// Bytes of one matrix `[n, k]` in a format, if there are kernels for it.
fn matrix_bytes(format: Format, [n, k]: [usize; 2]) -> Option<usize> {
    match format {
        Format::F32 => Packed::packed_bytes(Precision::F32, k, n),
        Format::Bf16 => Packed::packed_bytes(Precision::Bf16, k, n),
        block => packed_bytes(block, n, k),
    }
}

/// The format of a weight's matrices, and each one's bytes.
fn pieces(matrices: &Frozen) -> (Format, Vec<&[u8]>) {
    match matrices {
        Frozen::Packed(matrices) => {
            let precision = matrices.first().map_or(Precision::F32, Packed::precision);
            let format = if precision == Precision::F32 { Format::F32 } else { Format::Bf16 };
            (format, matrices.iter().map(Packed::content).collect())
        }
        Frozen::Quantised(matrices) => {
            let format = matrices.first().map_or(Format::F32, QuantisedMatrix::format);
            (format, matrices.iter().map(QuantisedMatrix::bytes).collect())
        }
    }
}

/// The name of the tensor that holds a layer's experts, from the name of one of their weights.
fn experts_of(param: &str) -> Option<String> {
    let (layer, last) = param.rsplit_once('.')?;
    matches!(last, "gate_up" | "down").then(|| format!("{layer}.experts"))
}

/// Writes a model that was loaded to run into `folder`, which is made if need be; `packed.json` comes last. `progress`
/// hears of the weights' bytes as they are written.
///
/// # Errors
/// What the system says; what stood in the folder still does then.
pub fn save_packed(folder: &Path, model: &Model, progress: &mut dyn FnMut(LoadProgress)) -> Result<(), ModelError> {
    let is_new = !folder.exists();
    std::fs::create_dir_all(folder).map_err(ModelError::io(folder))?;
    let staged = stage(folder, model, progress).inspect_err(|_| {
        if is_new {
            // Empty, for what was staged is gone; should that fail, an empty folder harms nobody.
            let _ = std::fs::remove_dir(folder);
        }
    })?;
    staged.into_iter().try_for_each(Staged::publish)
}

fn stage(folder: &Path, model: &Model, progress: &mut dyn FnMut(LoadProgress)) -> Result<[Staged; 3], ModelError> {
    static ZEROS: [u8; PAGE] = [0; PAGE];
    let mut formats = BTreeMap::new();
    // By tensor: rows of pieces. Names of layers sort as text, which is as good as any other order.
    let (mut experts, mut others) = (BTreeMap::<String, Vec<Vec<&[u8]>>>::new(), Vec::new());
    let mut plain = Vec::new();
    for param in model.params() {
        let Some(matrices) = param.frozen_matrices() else {
            plain.push(TensorToWrite::f32(param.name(), param.shape(), param.value().data()));
            continue;
        };
        let (format, pieces) = pieces(matrices);
        formats.insert(param.name().to_string(), format.name().to_string());
        match experts_of(param.name()).filter(|_| param.shape().len() == 3) {
            Some(name) => {
                let rows = experts.entry(name).or_insert_with(|| vec![Vec::new(); pieces.len()]);
                rows.iter_mut().zip(pieces).for_each(|(row, piece)| row.push(piece));
            }
            None => others.push((param.name().to_string(), pieces)),
        }
    }
    let length = |pieces: &[&[u8]]| pieces.iter().map(|piece| piece.len()).sum::<usize>();
    let experts = experts.into_iter().map(|(name, mut rows)| {
        for row in &mut rows {
            row.push(&ZEROS[..length(row).next_multiple_of(PAGE) - length(row)]);
        }
        let shape = vec![rows.len(), rows.first().map_or(0, |row| length(row))];
        TensorToWrite { name, shape, data: TensorData::Bytes(rows.concat()) }
    });
    let others = others.into_iter().map(|(name, pieces)| {
        let shape = vec![pieces.len(), pieces.first().map_or(0, |piece| piece.len())];
        TensorToWrite { name, shape, data: TensorData::Bytes(pieces) }
    });
    let tensors: Vec<TensorToWrite> = experts.chain(others).chain(plain).collect();
    let weights = stage_safetensors_with(&folder.join(WEIGHTS), &tensors, PAGE, progress)?;
    let json = |name: &str, value: &serde_json::Value| {
        let mut text = serde_json::to_vec_pretty(value).expect("a value of texts and numbers");
        text.push(b'\n');
        Staged::new(&folder.join(name), |out| out.write_all(&text))
    };
    let config = json(CONFIG, &families::write_config(&model.config, "bfloat16"))?;
    let index = serde_json::to_value(Index { version: VERSION, formats }).expect("texts and numbers");
    Ok([weights, config, json(INDEX, &index)?])
}

impl Model {
    /// Opens a packed model: its matrices stay in the file and are read as they are used, by all processes from the same
    /// memory.
    ///
    /// # Errors
    /// What is missing, of another version, size or format, by file and tensor.
    pub fn open_packed(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join(CONFIG);
        let bytes = std::fs::read(&path).map_err(ModelError::io(&path))?;
        let config = families::read_config(&bytes, &path.display().to_string())?;
        let reader = Reader::open(folder)?;
        Self::build(&config, &mut |id, name, shape| {
            if !is_matrix(name, shape) {
                let view = reader.file.tensor(name)?;
                if view.shape != shape || view.dtype != Dtype::F32 {
                    let message = format!("wanted F32 of shape {shape:?}, found {} of {:?}", view.dtype, view.shape);
                    return Err(ModelError::tensor(view.file, view.name, message));
                }
                return Ok(Param::new(id, name, Tensor::new(shape, view.to_f32()?)));
            }
            Ok(Param::frozen(id, name, shape, reader.matrices(name, shape)?)?)
        })
    }
}

/// Tells of each weight of a packed model the name of its format, its numbers and its bytes, from the headers alone.
pub(crate) fn survey(
    folder: &Path,
    config: &ModelConfig,
    tell: &mut dyn FnMut(&str, usize, usize),
) -> Result<(), ModelError> {
    let reader = Reader::open(folder)?;
    let mut look = |_: usize, name: &str, shape: &[usize]| {
        let elements = shape.iter().product::<usize>();
        if is_matrix(name, shape) {
            let [.., n, k] = *shape else { unreachable!("a matrix has two dimensions") };
            let format = reader.format(name)?;
            tell(format.name(), elements, reader.bytes_of(name, format, [n, k])? * (elements / (n * k).max(1)));
        } else {
            tell(Format::F32.name(), elements, reader.file.tensor(name)?.bytes.len());
        }
        Ok(Param::shaped(name, shape))
    };
    Model::build(config, &mut look).map(|_| ())
}

/// Where a weight's matrices stand in the file.
struct Place {
    tensor: String,
    /// Bytes of each of the tensor's rows.
    row: usize,
    /// Where in a row the weight's matrix begins.
    before: usize,
}

/// An open packed model.
struct Reader {
    index: Index,
    index_name: String,
    file: SafetensorsFile<'static>,
}

impl Reader {
    fn open(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join(INDEX);
        let index_name = path.display().to_string();
        let bytes = std::fs::read(&path).map_err(ModelError::io(&path))?;
        let index: Index = serde_json::from_slice(&bytes)
            .map_err(|error| ModelError::file(&index_name, format!("wanted the index of a packed model: {error}")))?;
        if index.version != VERSION {
            let message = format!("wanted {VERSION}, found {}: pack the model again", index.version);
            return Err(ModelError::config(&index_name, "version", message));
        }
        Ok(Self { index, index_name, file: SafetensorsFile::open(&folder.join(WEIGHTS))? })
    }

    fn format(&self, param: &str) -> Result<Format, ModelError> {
        let Some(name) = self.index.formats.get(param) else {
            return Err(ModelError::config(&self.index_name, param, "no format is named"));
        };
        Format::from_name(name).ok_or_else(|| {
            ModelError::config(&self.index_name, param, format!("wanted a format that is known, found `{name}`"))
        })
    }

    /// The weight's matrices, as parts of the file.
    fn matrices(&self, param: &str, shape: &[usize]) -> Result<Frozen, ModelError> {
        let [.., n, k] = *shape else { unreachable!("a matrix has two dimensions") };
        let count = shape.iter().rev().skip(2).product::<usize>();
        let format = self.format(param)?;
        let bytes = self.bytes_of(param, format, [n, k])?;
        let Place { tensor, row, before } = self.place(param, shape, bytes)?;
        let view = self.file.tensor(&tensor)?;
        let fits = view.dtype == Dtype::U8 && view.shape == [count, row];
        if !fits || !view.bytes.as_ptr().addr().is_multiple_of(64) || !row.is_multiple_of(64) {
            let (dtype, found) = (view.dtype, view.shape);
            let message =
                format!("wanted {count} rows of {row} bytes on borders of 64, found {dtype} of shape {found:?}");
            return Err(ModelError::tensor(view.file, view.name, message));
        }
        let all = self.file.shared(&tensor).expect("a tensor of a mapped file");
        let part = |index: usize| all.part(index * row + before..index * row + before + bytes).expect("checked above");
        Ok(frozen(format, [n, k], (0..count).map(part)))
    }

    /// Where a weight's matrices of `bytes` bytes stand.
    fn place(&self, param: &str, shape: &[usize], bytes: usize) -> Result<Place, ModelError> {
        let [.., n, k] = *shape else { unreachable!("a matrix has two dimensions") };
        let Some(tensor) = experts_of(param).filter(|_| shape.len() == 3) else {
            return Ok(Place { tensor: param.to_string(), row: bytes, before: 0 });
        };
        // An expert's down `[hidden, width]` stands behind its gate and up `[2 * width, hidden]`.
        let is_down = param.ends_with("down");
        let (last, dims) = if is_down { ("gate_up", [2 * k, n]) } else { ("down", [k, n / 2]) };
        let beside = format!("{}{last}", tensor.trim_end_matches("experts"));
        let others = self.bytes_of(&beside, self.format(&beside)?, dims)?;
        let row = bytes.saturating_add(others).checked_next_multiple_of(PAGE).unwrap_or(usize::MAX);
        Ok(Place { tensor, row, before: if is_down { others } else { 0 } })
    }

    fn bytes_of(&self, param: &str, format: Format, dims: [usize; 2]) -> Result<usize, ModelError> {
        matrix_bytes(format, dims).ok_or_else(|| {
            let message = format!("no matrix {dims:?} is packed in {}", format.name());
            ModelError::config(&self.index_name, param, message)
        })
    }
}

fn frozen(format: Format, [n, k]: [usize; 2], parts: impl Iterator<Item = SharedBytes>) -> Frozen {
    let precision = match format {
        Format::F32 => Precision::F32,
        Format::Bf16 => Precision::Bf16,
        block => {
            let matrix = |part| QuantisedMatrix::from_packed(block, n, k, part).expect("bytes that were counted");
            return Frozen::Quantised(parts.map(matrix).collect());
        }
    };
    let matrix = |part| Packed::from_packed(precision, k, n, part).expect("bytes that were counted and are aligned");
    Frozen::Packed(parts.map(matrix).collect())
}
