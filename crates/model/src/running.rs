//! Loading a model that is only run: its matrices as the products read them, and in no other form.
//!
//! Matrices in a block format keep their bits; others become f32 or bf16, or are encoded in a block format. Routers, norms and biases stay f32. Weights are read and packed one matrix at a time, so that
//! memory holds the packed model and little besides.

use crate::checkpoint::Stored;
use crate::families::TensorMap;
use crate::{Checkpoint, Model, ModelError};
use moebius_kernels::formats::Format;
use moebius_kernels::gemm::{Mat, Packed, Precision};
use moebius_kernels::memory::{Buffer, SharedBytes};
use moebius_kernels::quantised::{PACKED_FORMATS, QuantisedMatrix, packed_bytes};
use moebius_tensor::{Frozen, Param, Tensor};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// What the matrices of a model that is run are held in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RunFormat {
    /// Block formats as they are stored; everything else in bf16.
    #[default]
    AsStored,
    /// All in f32.
    F32,
    /// All in bf16.
    Bf16,
    /// All in a block format; the embedding and the head, on which most depends, in at least six bits; matrices whose
    /// rows its blocks do not divide in bf16.
    Block(Format),
}

/// The names of all [`RunFormat`]s.
fn names() -> Vec<&'static str> {
    let blocks = PACKED_FORMATS.into_iter().map(Format::name);
    ["stored", "f32", "bf16"].into_iter().chain(blocks).collect()
}

impl fmt::Display for RunFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AsStored => "stored",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Block(format) => format.name(),
        })
    }
}

impl FromStr for RunFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if !names().contains(&name) {
            return Err(format!("wanted one of {}", names().join(", ")));
        }
        Ok(match name {
            "stored" => Self::AsStored,
            "f32" => Self::F32,
            "bf16" => Self::Bf16,
            block => Self::Block(Format::from_name(block).expect("a format of the list")),
        })
    }
}

impl RunFormat {
    /// Bits that a weight takes, about: embedding and head may take more, stored formats fewer.
    pub fn bits(self) -> f64 {
        match self {
            Self::F32 => 32.0,
            Self::AsStored | Self::Bf16 => 16.0,
            Self::Block(format) => {
                let bytes = packed_bytes(format, 16, 256).unwrap_or(2 * 16 * 256);
                8.0 * bytes as f64 / (16.0 * 256.0)
            }
        }
    }

    /// What a matrix `[n, k]` of a weight is held in, if not in what it is stored in.
    fn target(self, param: &str, k: usize) -> Target {
        match self {
            Self::F32 => Target::Plain(Precision::F32),
            Self::AsStored | Self::Bf16 => Target::Plain(Precision::Bf16),
            Self::Block(format) => {
                let format = match (is_delicate(param), format.block_len()) {
                    (false, _) => format,
                    (true, 32) => Format::Q8_0,
                    (true, _) => Format::Q6_K,
                };
                if packed_bytes(format, 1, k).is_some() {
                    Target::Block(format)
                } else {
                    Target::Plain(Precision::Bf16)
                }
            }
        }
    }
}

enum Target {
    Plain(Precision),
    Block(Format),
}

/// Whether a weight turns tokens into numbers or back.
fn is_delicate(param: &str) -> bool {
    matches!(param, "embedding" | "head")
}

/// Whether a weight is a matrix, or a stack of them, of which only products (or rows) are asked.
pub(crate) fn is_matrix(param: &str, shape: &[usize]) -> bool {
    let last = param.rsplit('.').next().unwrap_or(param);
    shape.len() >= 2 && MATRICES.contains(&last)
}

/// What the names of matrices end in.
const MATRICES: [&str; 20] = [
    "q",
    "k",
    "v",
    "o",
    "qkv",
    "qkvz",
    "kv",
    "z",
    "in",
    "gate_up",
    "down",
    "embedding",
    "head",
    "q_a",
    "q_nope",
    "q_rope",
    "kv_a",
    "k_rope",
    "k_up",
    "v_up",
];

/// What of a model is packed already, told while it is loaded, or what of it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Weights packed, or bytes written.
    pub done: usize,
    /// Weights or bytes there are.
    pub total: usize,
}

impl Model {
    /// Loads a model to be run, its matrices in `format`. It cannot be trained or saved.
    ///
    /// # Errors
    /// As [`Model::load`]; weights that a block format cannot encode.
    pub fn load_to_run(
        checkpoint: &Checkpoint,
        format: RunFormat,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let maps = checkpoint.checked_maps()?;
        let total = maps.iter().filter_map(TensorMap::elements).sum();
        let mut by_param: BTreeMap<&str, Vec<&TensorMap>> = BTreeMap::new();
        maps.iter().for_each(|map| by_param.entry(&map.param).or_default().push(map));
        by_param.values_mut().for_each(|maps| maps.sort_by_key(|map| map.rows.start));
        let mut done = 0;
        let model = Self::build(checkpoint.config(), &mut |id, name, shape| {
            let weight = Weight { checkpoint, maps: &by_param[name], cols: *shape.last().expect("a shape") };
            let param = if is_matrix(name, shape) {
                Param::frozen(id, name, shape, weight.matrices(name, shape, format)?)?
            } else {
                let mut value = Buffer::scratch(shape.iter().product());
                weight.decode(0..value.len() / weight.cols.max(1), &mut value)?;
                Param::new(id, name, Tensor::new(shape, value))
            };
            done += param.n_elements();
            progress(LoadProgress { done, total });
            Ok(param)
        })?;
        moebius_kernels::memory::release_pool();
        Ok(model)
    }
}

/// Writes the numbers of some rows.
pub(crate) type Fill<'f> = dyn FnMut(Range<usize>, &mut [f32]) -> Result<(), ModelError> + 'f;
/// Writes the packed bytes of a matrix.
type Pack<'p> = dyn FnMut(usize, &mut [u8]) -> Result<(), ModelError> + 'p;

/// The matrices of a weight in what `format` says, each from numbers that `fill` writes, given its rows.
pub(crate) fn pack_matrices(
    name: &str,
    shape: &[usize],
    format: RunFormat,
    fill: &mut Fill<'_>,
) -> Result<Frozen, ModelError> {
    let [.., out, inner] = *shape else { unreachable!("a matrix has two dimensions") };
    let count = shape.iter().rev().skip(2).product::<usize>();
    let mut value = Buffer::<f32>::scratch(out * inner);
    let rows = |index: usize| index * out..(index + 1) * out;
    match format.target(name, inner) {
        Target::Plain(precision) => {
            let pack = |index| {
                fill(rows(index), &mut value)?;
                Ok(Packed::pack(precision, Mat::new(&value, out, inner).t()))
            };
            (0..count).map(pack).collect::<Result<_, ModelError>>().map(Frozen::Packed)
        }
        Target::Block(format) => {
            let mut blocks = Buffer::<u8>::scratch(format.bytes_of(out * inner).expect("whole blocks"));
            let mut pack = |index, packed: &mut [u8]| {
                fill(rows(index), &mut value)?;
                let encoded = format.encode(&value, &mut blocks);
                encoded.map_err(|error| ModelError::tensor("weights to be packed", name, error.to_string()))?;
                QuantisedMatrix::pack_into(format, out, inner, &blocks, packed);
                Ok(())
            };
            quantised_matrices(format, count, [out, inner], &mut pack)
        }
    }
}

/// Matrices that `pack` writes one after the other into one stretch of memory: large pages hold several of them, and
/// reading one leads on to the next.
fn quantised_matrices(
    format: Format,
    count: usize,
    [out, inner]: [usize; 2],
    pack: &mut Pack<'_>,
) -> Result<Frozen, ModelError> {
    let bytes = packed_bytes(format, out, inner).expect("a format with kernels");
    let mut packed = Buffer::<u8>::zeroed(count * bytes);
    packed.chunks_exact_mut(bytes.max(1)).enumerate().try_for_each(|(index, packed)| pack(index, packed))?;
    let packed = SharedBytes::from(packed);
    let matrix = |index: usize| {
        let part = packed.part(index * bytes..(index + 1) * bytes).expect("inside");
        QuantisedMatrix::from_packed(format, out, inner, part).expect("as many bytes as packed")
    };
    Ok(Frozen::Quantised((0..count).map(matrix).collect()))
}

/// The tensors of a checkpoint that make one weight, in the order of their rows.
struct Weight<'c> {
    checkpoint: &'c Checkpoint<'c>,
    maps: &'c [&'c TensorMap],
    cols: usize,
}

impl<'c> Weight<'c> {
    /// Each matrix packed: all in one format, for the products of a layer's experts go together.
    fn matrices(&self, name: &str, shape: &[usize], format: RunFormat) -> Result<Frozen, ModelError> {
        let [.., out, inner] = *shape else { unreachable!("a matrix has two dimensions") };
        let count = shape.iter().rev().skip(2).product::<usize>();
        let rows = |index: usize| index * out..(index + 1) * out;
        if format == RunFormat::AsStored
            && let Some(stored) = self.common_format(count * out)?
            && packed_bytes(stored, out, inner).is_some()
        {
            let mut pack = |index, packed: &mut [u8]| {
                let parts = self.parts(rows(index))?;
                let joined;
                let bytes = match &parts[..] {
                    [part] => &part.bytes[..],
                    parts => {
                        joined = parts.iter().map(|part| &part.bytes[..]).collect::<Vec<_>>().concat();
                        &joined
                    }
                };
                QuantisedMatrix::pack_into(stored, out, inner, bytes, packed);
                Ok(())
            };
            return quantised_matrices(stored, count, [out, inner], &mut pack);
        }
        pack_matrices(name, shape, format, &mut |rows, out| self.decode(rows, out))
    }

    /// The format that all of the first `rows` rows are stored in.
    fn common_format(&self, rows: usize) -> Result<Option<Format>, ModelError> {
        let maps = self.maps.iter().filter(|map| map.rows.start < rows);
        let formats =
            maps.map(|map| self.checkpoint.stored_format(map)).collect::<Result<Vec<Format>, ModelError>>()?;
        let first = formats.first().copied();
        Ok(first.filter(|&format| formats.iter().all(|other| *other == format)))
    }

    /// What is stored of some rows.
    fn parts(&self, rows: Range<usize>) -> Result<Vec<Stored<'c>>, ModelError> {
        let mut parts = Vec::new();
        for map in self.maps {
            let (start, end) = (map.rows.start.max(rows.start), map.rows.end.min(rows.end));
            if start < end {
                let Stored { format, bytes } = self.checkpoint.stored(map)?;
                let row_bytes = bytes.len() / map.rows.len();
                let range = (start - map.rows.start) * row_bytes..(end - map.rows.start) * row_bytes;
                let bytes = match bytes {
                    Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[range]),
                    Cow::Owned(bytes) => Cow::Owned(bytes[range].to_vec()),
                };
                parts.push(Stored { format, bytes });
            }
        }
        Ok(parts)
    }

    /// Some rows as f32.
    fn decode(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError> {
        let mut done = 0;
        for Stored { format, bytes } in self.parts(rows)? {
            let count = bytes.len() / format.block_bytes() * format.block_len();
            format.decode(&bytes, &mut out[done..done + count]);
            done += count;
        }
        assert_eq!(done, out.len(), "the tensors of a weight make all of it");
        Ok(())
    }
}
