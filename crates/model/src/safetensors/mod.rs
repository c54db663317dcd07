//! The safetensors format: eight bytes of header length, a JSON header, the tensors' bytes.
//!
//! Files come from anyone, so every number in the header is checked before it is used, and errors name file and tensor.
//! (The `safetensors` crate checks too, but its errors name neither.)

mod header;
mod write;

pub use header::Dtype;
pub use write::{TensorData, TensorToWrite, write_safetensors};
pub(crate) use write::{stage_safetensors, stage_safetensors_with};

use crate::ModelError;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use header::Entry;
use moebius_kernels::memory::{Buffer, MappedFile, SharedBytes};
use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

/// An open file: the checked header and the bytes.
pub struct SafetensorsFile<'a> {
    name: String,
    bytes: Bytes<'a>,
    data_start: usize,
    entries: Vec<Entry>,
    /// Places in `entries`, in the order of names.
    by_name: Vec<usize>,
}

enum Bytes<'a> {
    Mapped(Arc<MappedFile>),
    Borrowed(Cow<'a, [u8]>),
}

/// One tensor of a file.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'f> {
    /// The file's name, for errors.
    pub file: &'f str,
    /// The tensor's name.
    pub name: &'f str,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Lengths of the dimensions.
    pub shape: &'f [usize],
    /// Little-endian elements, row-major.
    pub bytes: &'f [u8],
}

impl SafetensorsFile<'static> {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// What the system says, or what is wrong with the header.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let mapped = MappedFile::open(path).map_err(ModelError::io(path))?;
        Self::new(path.display().to_string(), Bytes::Mapped(Arc::new(mapped)))
    }
}

impl<'a> SafetensorsFile<'a> {
    /// Checks bytes in memory; `name` stands in errors.
    ///
    /// # Errors
    /// What is wrong with the header.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'a, [u8]>>) -> Result<Self, ModelError> {
        Self::new(name.into(), Bytes::Borrowed(bytes.into()))
    }

    fn new(name: String, bytes: Bytes<'a>) -> Result<Self, ModelError> {
        let (data_start, entries) = header::read(&name, bytes.get())?;
        let mut by_name: Vec<usize> = (0..entries.len()).collect();
        by_name.sort_unstable_by_key(|&place| &entries[place].name);
        Ok(Self { name, bytes, data_start, entries, by_name })
    }

    /// The file's name, for errors.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All tensors, in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.entries.iter().map(|entry| self.view(entry))
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let place = self.by_name.binary_search_by_key(&name, |&place| &self.entries[place].name).ok()?;
        Some(self.view(&self.entries[self.by_name[place]]))
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// That it is missing.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        self.get(name).ok_or_else(|| ModelError::tensor(&self.name, name, "missing"))
    }

    /// A tensor's bytes, to be held on their own; none if the file is not mapped or has no such tensor.
    pub fn shared(&self, name: &str) -> Option<SharedBytes> {
        let Bytes::Mapped(map) = &self.bytes else { return None };
        let place = self.by_name.binary_search_by_key(&name, |&place| &self.entries[place].name).ok()?;
        let bytes = &self.entries[self.by_name[place]].bytes;
        SharedBytes::of_file(map, self.data_start + bytes.start..self.data_start + bytes.end)
    }

    fn view<'f>(&'f self, entry: &'f Entry) -> TensorView<'f> {
        let bytes = &self.bytes.get()[self.data_start + entry.bytes.start..self.data_start + entry.bytes.end];
        TensorView { file: &self.name, name: &entry.name, dtype: entry.dtype, shape: &entry.shape, bytes }
    }
}

impl Bytes<'_> {
    fn get(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Borrowed(bytes) => bytes,
        }
    }
}

impl TensorView<'_> {
    /// The elements as f32, from f32, f16 or bf16.
    ///
    /// # Errors
    /// Another dtype.
    pub fn to_f32(&self) -> Result<Buffer<f32>, ModelError> {
        let mut out = Buffer::scratch(self.shape.iter().product());
        self.read_f32(&mut out)?;
        Ok(out)
    }

    /// As [`TensorView::to_f32`], into `out`.
    ///
    /// # Errors
    /// Another dtype.
    ///
    /// # Panics
    /// If `out` has another length.
    pub fn read_f32(&self, out: &mut [f32]) -> Result<(), ModelError> {
        assert_eq!(out.len(), self.shape.iter().product::<usize>(), "{}", self.name);
        match self.dtype {
            Dtype::F32 => {
                let values = self.bytes.chunks_exact(4);
                out.iter_mut().zip(values).for_each(|(x, b)| *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            }
            Dtype::F16 => self.widen(out, f16::from_bits, |half, out| half.convert_to_f32_slice(out)),
            Dtype::BF16 => self.widen(out, bf16::from_bits, |half, out| half.convert_to_f32_slice(out)),
            other => {
                return Err(ModelError::tensor(
                    self.file,
                    self.name,
                    format!("wanted F32, F16 or BF16, found {other}"),
                ));
            }
        }
        Ok(())
    }

    fn widen<H>(&self, out: &mut [f32], from_bits: impl Fn(u16) -> H, convert: impl Fn(&[H], &mut [f32])) {
        let mut block = Vec::with_capacity(1024);
        for (bytes, out) in self.bytes.chunks(2048).zip(out.chunks_mut(1024)) {
            block.clear();
            block.extend(bytes.chunks_exact(2).map(|pair| from_bits(u16::from_le_bytes([pair[0], pair[1]]))));
            convert(&block, out);
        }
    }

    /// The elements as i64, from any integer type.
    ///
    /// # Errors
    /// Another dtype.
    pub fn to_i64(&self) -> Result<Vec<i64>, ModelError> {
        let of = |size: usize| self.bytes.chunks_exact(size);
        Ok(match self.dtype {
            Dtype::I64 => of(8).map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])).collect(),
            Dtype::I32 => of(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()).collect(),
            Dtype::U32 => of(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()).collect(),
            Dtype::I16 => of(2).map(|b| i16::from_le_bytes([b[0], b[1]]).into()).collect(),
            Dtype::U16 => of(2).map(|b| u16::from_le_bytes([b[0], b[1]]).into()).collect(),
            Dtype::U8 => self.bytes.iter().map(|&b| b.into()).collect(),
            other => {
                return Err(ModelError::tensor(self.file, self.name, format!("wanted whole numbers, found {other}")));
            }
        })
    }
}

#[cfg(test)]
mod tests;
