//! GGUF, llama.cpp's file format (ggml's `docs/gguf.md`): typed metadata, a table of tensors, their bytes.
//!
//! Files come from anyone, so every count, length, offset and type is checked against the file before it is used, and
//! errors name file and key or tensor. Nothing but the tables is read when a file is opened; arrays of the metadata and
//! the tensors' bytes are where the file is mapped.

mod architecture;
mod config;
mod export;
mod facts;
mod header;
mod metadata;
mod model;
mod positions;
mod split;
mod tensors;
mod vocabulary;
mod write;

pub use export::{ExportSettings, write_model};
pub use metadata::{Array, Metadata, Value};
pub(crate) use model::GgufModel;
pub use write::{MetadataToWrite, ValueToWrite, Values, WeightToWrite, write_gguf};

use crate::ModelError;
use header::{Entry, Header};
use moebius_kernels::formats::Format;
use moebius_kernels::memory::MappedFile;
use std::borrow::Cow;
use std::path::Path;

/// What every file begins with.
const MAGIC: &[u8; 4] = b"GGUF";
/// Where tensors begin, if the file does not say otherwise.
const ALIGNMENT: usize = 32;
/// The key with which it does.
const ALIGNMENT_KEY: &str = "general.alignment";

/// The formats and the numbers that ggml gives them (`enum ggml_type`).
const TYPES: [(u32, Format); 16] = [
    (0, Format::F32),
    (1, Format::F16),
    (2, Format::Q4_0),
    (3, Format::Q4_1),
    (6, Format::Q5_0),
    (7, Format::Q5_1),
    (8, Format::Q8_0),
    (10, Format::Q2_K),
    (11, Format::Q3_K),
    (12, Format::Q4_K),
    (13, Format::Q5_K),
    (14, Format::Q6_K),
    (20, Format::IQ4_NL),
    (23, Format::IQ4_XS),
    (30, Format::Bf16),
    (39, Format::MXFP4),
];

/// An open file, or the files that one model was split into: the checked tables and the bytes.
pub struct GgufFile<'a> {
    /// One, or all parts in their order. The first says what the metadata are.
    parts: Vec<Part<'a>>,
    /// Part and place in its tensors, in the order of names.
    by_name: Vec<(usize, usize)>,
}

/// One file.
struct Part<'a> {
    name: String,
    bytes: Bytes<'a>,
    header: Header,
}

enum Bytes<'a> {
    Mapped(MappedFile),
    Borrowed(Cow<'a, [u8]>),
}

/// One tensor of a file.
#[derive(Clone, Copy, Debug)]
pub struct GgufTensor<'f> {
    /// The file's name, for errors.
    pub file: &'f str,
    /// The tensor's name.
    pub name: &'f str,
    /// How its numbers are stored.
    pub format: Format,
    /// Lengths of the dimensions, rows before columns (the reverse of ggml's order).
    pub shape: &'f [usize],
    /// Whole blocks, row by row.
    pub bytes: &'f [u8],
}

impl GgufFile<'static> {
    /// Maps a file and checks its tables. Of a model that llama.cpp split into several files, any of them stands for all,
    /// which are found beside it.
    ///
    /// # Errors
    /// What the system says, or what is wrong with the tables; a part that is missing or that belongs elsewhere.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::of_parts(split::open_all(path)?)
    }
}

impl<'a> GgufFile<'a> {
    /// Checks bytes in memory; `name` stands in errors.
    ///
    /// # Errors
    /// What is wrong with the tables; bytes that are one part of several.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'a, [u8]>>) -> Result<Self, ModelError> {
        let part = Part::new(name.into(), Bytes::Borrowed(bytes.into()))?;
        split::refuse(&part)?;
        Self::of_parts(vec![part])
    }

    /// Checks that no tensor stands in two parts.
    fn of_parts(parts: Vec<Part<'a>>) -> Result<Self, ModelError> {
        let name = |&(part, place): &(usize, usize)| &parts[part].header.tensors[place].name;
        let places = |part: usize| (0..parts[part].header.tensors.len()).map(move |place| (part, place));
        let mut by_name: Vec<(usize, usize)> = (0..parts.len()).flat_map(places).collect();
        by_name.sort_by_key(name);
        if let Some(pair) = by_name.windows(2).find(|pair| name(&pair[0]) == name(&pair[1])) {
            let [first, second] = [pair[0], pair[1]].map(|(part, _)| &parts[part].name);
            return Err(ModelError::tensor(second, name(&pair[1]), format!("stands in {first} too")));
        }
        Ok(Self { parts, by_name })
    }

    /// The file's name, or that of the first part, for errors.
    pub fn name(&self) -> &str {
        &self.parts[0].name
    }

    /// How many files there are.
    pub fn n_parts(&self) -> usize {
        self.parts.len()
    }

    /// What the file says about itself.
    pub fn metadata(&self) -> Metadata<'_> {
        self.parts[0].metadata()
    }

    /// All tensors, in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = GgufTensor<'_>> {
        self.parts.iter().flat_map(|part| part.header.tensors.iter().map(|entry| part.view(entry)))
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<GgufTensor<'_>> {
        let entry = |&(part, place): &(usize, usize)| &self.parts[part].header.tensors[place];
        let found = self.by_name.binary_search_by_key(&name, |place| &entry(place).name).ok()?;
        let place = &self.by_name[found];
        Some(self.parts[place.0].view(entry(place)))
    }
}

impl<'a> Part<'a> {
    fn new(name: String, bytes: Bytes<'a>) -> Result<Self, ModelError> {
        let header = header::read(&name, bytes.get())?;
        Ok(Self { name, bytes, header })
    }

    fn metadata(&self) -> Metadata<'_> {
        Metadata::new(&self.name, self.bytes.get(), &self.header.fields)
    }

    fn view<'f>(&'f self, entry: &'f Entry) -> GgufTensor<'f> {
        let bytes = &self.bytes.get()[entry.bytes.clone()];
        GgufTensor { file: &self.name, name: &entry.name, format: entry.format, shape: &entry.shape, bytes }
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

impl<'f> GgufTensor<'f> {
    /// Numbers of a row: the last dimension.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The bytes of `count` rows from row `first` on, counted over all dimensions but the last.
    ///
    /// # Panics
    /// If there are fewer rows.
    pub fn rows(&self, first: usize, count: usize) -> &'f [u8] {
        // Rows are whole blocks: the tables were checked.
        let row = self.format.bytes_of(self.columns()).expect("rows of whole blocks");
        &self.bytes[first * row..(first + count) * row]
    }

    /// All numbers as f32, into `out`.
    ///
    /// # Panics
    /// If `out` has another length.
    pub fn read_f32(&self, out: &mut [f32]) {
        self.format.decode(self.bytes, out);
    }
}

#[cfg(test)]
mod tests;
