//! Writing safetensors files, whole or not at all.

use super::Dtype;
use crate::files::Staged;
use crate::{LoadProgress, ModelError};
use half::bf16;
use moebius_kernels::memory::Buffer;
use serde_json::{Map, json};
use std::io::Write;
use std::path::Path;

/// A tensor on its way to a file.
pub struct TensorToWrite<'a> {
    /// Its name.
    pub name: String,
    /// Lengths of the dimensions.
    pub shape: Vec<usize>,
    /// Its numbers.
    pub data: TensorData<'a>,
}

/// The numbers of a tensor and the type that they are written in.
pub enum TensorData<'a> {
    /// f32 as they are.
    F32(&'a [f32]),
    /// f32, rounded to the nearest bf16, ties to even.
    BF16(&'a [f32]),
    /// Whole numbers.
    I64(&'a [i64]),
    /// Whole numbers of 32 bits.
    U32(&'a [u32]),
    /// Whole numbers of 32 bits with a sign.
    I32(&'a [i32]),
    /// As [`TensorData::BF16`], but made while they are written: the function fills the numbers from a place on. As many
    /// as the tensor's shape says.
    MadeBF16(&'a dyn Fn(usize, &mut [f32])),
    /// Bytes, piece after piece.
    Bytes(Vec<&'a [u8]>),
}

/// Numbers that are made at a time.
const MADE_AT_ONCE: usize = 1 << 22;

impl TensorData<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::BF16(_) | Self::MadeBF16(_) => Dtype::BF16,
            Self::I64(_) => Dtype::I64,
            Self::U32(_) => Dtype::U32,
            Self::I32(_) => Dtype::I32,
            Self::Bytes(_) => Dtype::U8,
        }
    }

    /// How many numbers there are, unless the tensor's shape says it.
    fn len(&self) -> Option<usize> {
        match self {
            Self::F32(data) | Self::BF16(data) => Some(data.len()),
            Self::I64(data) => Some(data.len()),
            Self::U32(data) => Some(data.len()),
            Self::I32(data) => Some(data.len()),
            Self::MadeBF16(_) => None,
            Self::Bytes(pieces) => Some(pieces.iter().map(|piece| piece.len()).sum()),
        }
    }

    /// Writes `len` numbers.
    fn write(&self, len: usize, out: &mut dyn Write) -> std::io::Result<()> {
        match self {
            Self::F32(data) => write_each(out, data, |x| x.to_le_bytes()),
            Self::BF16(data) => write_each(out, data, |x| bf16::from_f32(x).to_le_bytes()),
            Self::I64(data) => write_each(out, data, |x| x.to_le_bytes()),
            Self::U32(data) => write_each(out, data, |x| x.to_le_bytes()),
            Self::I32(data) => write_each(out, data, |x| x.to_le_bytes()),
            Self::Bytes(pieces) => pieces.iter().try_for_each(|piece| out.write_all(piece)),
            Self::MadeBF16(make) => {
                let mut numbers = Buffer::<f32>::scratch(len.min(MADE_AT_ONCE));
                for first in (0..len).step_by(MADE_AT_ONCE) {
                    let numbers = &mut numbers[..(len - first).min(MADE_AT_ONCE)];
                    make(first, numbers);
                    write_each(out, numbers, |x| bf16::from_f32(x).to_le_bytes())?;
                }
                Ok(())
            }
        }
    }
}

/// Writes elements as bytes, a block at a time: one by one they would cost a call each.
fn write_each<T: Copy, const N: usize>(
    out: &mut dyn Write,
    data: &[T],
    bytes_of: impl Fn(T) -> [u8; N],
) -> std::io::Result<()> {
    let mut block = Vec::with_capacity(4096 * N);
    for elements in data.chunks(4096) {
        block.clear();
        elements.iter().for_each(|&x| block.extend_from_slice(&bytes_of(x)));
        out.write_all(&block)?;
    }
    Ok(())
}

impl<'a> TensorToWrite<'a> {
    /// A tensor.
    pub fn new(name: impl Into<String>, shape: &[usize], data: TensorData<'a>) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), data }
    }

    /// A tensor of f32.
    pub fn f32(name: impl Into<String>, shape: &[usize], data: &'a [f32]) -> Self {
        Self::new(name, shape, TensorData::F32(data))
    }
}

/// Writes tensors in the order given, the data from a 64-byte border on.
///
/// # Errors
/// What the system says; nothing is left behind then.
///
/// # Panics
/// If a tensor's shape and number of elements differ, or two have one name.
pub fn write_safetensors(path: &Path, tensors: &[TensorToWrite]) -> Result<(), ModelError> {
    stage_safetensors(path, tensors, 64)?.publish()
}

/// As [`write_safetensors`], the data from a multiple of `border` on, without putting the file in its place yet.
pub(crate) fn stage_safetensors(path: &Path, tensors: &[TensorToWrite], border: usize) -> Result<Staged, ModelError> {
    stage_safetensors_with(path, tensors, border, &mut |_| ())
}

/// As [`stage_safetensors`], telling of the data's bytes as they are written.
pub(crate) fn stage_safetensors_with(
    path: &Path,
    tensors: &[TensorToWrite],
    border: usize,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Staged, ModelError> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    for TensorToWrite { name, shape, data } in tensors {
        let elements = shape.iter().product::<usize>();
        assert!(data.len().is_none_or(|len| len == elements), "{name}: elements of shape {shape:?}");
        let start = end;
        end += elements * data.dtype().size();
        let entry = json!({"dtype": data.dtype().to_string(), "shape": shape, "data_offsets": [start, end]});
        assert!(header.insert(name.clone(), entry).is_none(), "{name}: written twice");
    }
    let mut header = serde_json::to_vec(&header).expect("a header of texts and numbers");
    header.resize((8 + header.len()).next_multiple_of(border) - 8, b' ');
    Staged::new(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        let mut out = Telling { out, progress, done: 0, total: end };
        tensors.iter().try_for_each(|tensor| tensor.data.write(tensor.shape.iter().product(), &mut out))
    })
}

/// Bytes that are written at least between two words about it.
const TOLD_AT_ONCE: usize = 16 << 20;

/// Tells how many bytes went through.
struct Telling<'w> {
    out: &'w mut dyn Write,
    progress: &'w mut dyn FnMut(LoadProgress),
    done: usize,
    total: usize,
}

impl Write for Telling<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // A tensor may be gigabytes in one piece.
        let written = self.out.write(&bytes[..bytes.len().min(TOLD_AT_ONCE)])?;
        let before = self.done;
        self.done += written;
        if before / TOLD_AT_ONCE != self.done / TOLD_AT_ONCE || self.done == self.total {
            (self.progress)(LoadProgress { done: self.done, total: self.total });
        }
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}
