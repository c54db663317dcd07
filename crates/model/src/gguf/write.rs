//! Writing GGUF files, whole or not at all, a piece of a tensor at a time.

use super::metadata::Kind;
use super::{ALIGNMENT, MAGIC, TYPES};
use crate::ModelError;
use crate::files::Staged;
use moebius_kernels::formats::Format;
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;

/// Numbers that are encoded and written at once, as many rows as that is.
const PIECE: usize = 1 << 20;

/// A key and its value.
pub type MetadataToWrite = (String, ValueToWrite);

/// A value of the metadata on its way to a file.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "each says its name")]
pub enum ValueToWrite {
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
}

/// Gives the numbers of some rows of a tensor.
pub type Values<'a> = Box<dyn Fn(Range<usize>, &mut [f32]) + 'a>;

/// A tensor on its way to a file.
pub struct WeightToWrite<'a> {
    /// Its name.
    pub name: String,
    /// Lengths of the dimensions, rows before columns.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub format: Format,
    /// Its numbers, by rows (counted over all dimensions but the last).
    pub values: Values<'a>,
}

impl WeightToWrite<'_> {
    fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    fn n_rows(&self) -> usize {
        self.shape[..self.shape.len().saturating_sub(1)].iter().product()
    }

    /// Its bytes; none if its rows are no whole blocks.
    fn size(&self) -> Option<usize> {
        self.format.bytes_of(self.columns())?.checked_mul(self.n_rows())
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let (columns, n_rows) = (self.columns(), self.n_rows());
        let step = (PIECE / columns.max(1)).max(1);
        let (mut numbers, mut bytes) = (Vec::new(), Vec::new());
        for first in (0..n_rows).step_by(step) {
            let rows = first..n_rows.min(first + step);
            numbers.resize(rows.len() * columns, 0.0);
            (self.values)(rows, &mut numbers);
            bytes.resize(self.format.bytes_of(numbers.len()).expect("rows of whole blocks"), 0);
            let encoded = self.format.encode(&numbers, &mut bytes);
            encoded
                .map_err(|error| io::Error::other(format!("tensor `{}`: {error} from row {first} on", self.name)))?;
            out.write_all(&bytes)?;
        }
        Ok(())
    }
}

/// Writes a file of version 3: metadata and tensors in the order given.
///
/// # Errors
/// What the system says, or the tensor that cannot be stored in its format; nothing is left behind then.
///
/// # Panics
/// If two keys or tensors have one name, or a tensor has more than four dimensions.
pub fn write_gguf(path: &Path, metadata: &[MetadataToWrite], tensors: &[WeightToWrite]) -> Result<(), ModelError> {
    stage_gguf(path, metadata, tensors)?.publish()
}

/// As [`write_gguf`], not yet in its place.
pub(super) fn stage_gguf(
    path: &Path,
    metadata: &[MetadataToWrite],
    tensors: &[WeightToWrite],
) -> Result<Staged, ModelError> {
    let header = header(&path.display().to_string(), metadata, tensors)?;
    let pad = |out: &mut dyn Write, length: usize| {
        out.write_all(&[0; ALIGNMENT][..length.next_multiple_of(ALIGNMENT) - length])
    };
    Staged::new(path, |out| {
        out.write_all(&header)?;
        pad(out, header.len())?;
        for tensor in tensors {
            tensor.write(out)?;
            pad(out, tensor.size().expect("checked in the header"))?;
        }
        Ok(())
    })
}

fn header(file: &str, metadata: &[MetadataToWrite], tensors: &[WeightToWrite]) -> Result<Vec<u8>, ModelError> {
    let mut out = MAGIC.to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    let mut names = std::collections::BTreeSet::new();
    for (key, value) in metadata {
        assert!(names.insert(&key[..]), "{key}: written twice");
        write_text(&mut out, key);
        write_value(&mut out, value);
    }
    names.clear();
    let mut offset = 0u64;
    for tensor in tensors {
        let WeightToWrite { name, shape, format, .. } = tensor;
        assert!(names.insert(&name[..]), "{name}: written twice");
        assert!((1..=4).contains(&shape.len()), "{name}: {} dimensions", shape.len());
        let Some(size) = tensor.size() else {
            let message = format!("{format} wants rows of a multiple of {}, found shape {shape:?}", format.block_len());
            return Err(ModelError::tensor(file, name, message));
        };
        write_text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&n| out.extend((n as u64).to_le_bytes()));
        let number = TYPES.iter().find(|(_, known)| known == format).map(|(number, _)| *number);
        out.extend(number.expect("every format has a number").to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += size.next_multiple_of(ALIGNMENT) as u64;
    }
    Ok(out)
}

fn write_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn write_value(out: &mut Vec<u8>, value: &ValueToWrite) {
    let kind = |out: &mut Vec<u8>, kind: Kind| out.extend((kind as u32).to_le_bytes());
    let array = |out: &mut Vec<u8>, element: Kind, count: usize| {
        kind(out, Kind::Array);
        kind(out, element);
        out.extend((count as u64).to_le_bytes());
    };
    match value {
        ValueToWrite::U32(number) => {
            kind(out, Kind::U32);
            out.extend(number.to_le_bytes());
        }
        ValueToWrite::I32(number) => {
            kind(out, Kind::I32);
            out.extend(number.to_le_bytes());
        }
        ValueToWrite::F32(number) => {
            kind(out, Kind::F32);
            out.extend(number.to_le_bytes());
        }
        ValueToWrite::Bool(flag) => {
            kind(out, Kind::Bool);
            out.push(u8::from(*flag));
        }
        ValueToWrite::Text(text) => {
            kind(out, Kind::Text);
            write_text(out, text);
        }
        ValueToWrite::Texts(texts) => {
            array(out, Kind::Text, texts.len());
            texts.iter().for_each(|text| write_text(out, text));
        }
        ValueToWrite::F32s(numbers) => {
            array(out, Kind::F32, numbers.len());
            numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
        }
        ValueToWrite::I32s(numbers) => {
            array(out, Kind::I32, numbers.len());
            numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
        }
    }
}
