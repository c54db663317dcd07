//! The tables in front of the tensors: read with care, checked whole, before any byte behind them is touched.

use super::metadata::{Field, Kind};
use super::{ALIGNMENT, ALIGNMENT_KEY, MAGIC, TYPES};
use crate::ModelError;
use moebius_kernels::formats::Format;
use std::ops::Range;

/// ggml's tensors have up to four dimensions.
const MOST_DIMENSIONS: u32 = 4;
/// Names and keys beyond this are refused; ggml's own limit is 64 for tensors and 65535 for keys.
const LONGEST_NAME: u64 = 1 << 16;

/// The tables of a file.
#[derive(Debug)]
pub(super) struct Header {
    /// In the order of keys.
    pub(super) fields: Vec<Field>,
    /// In the order of their bytes.
    pub(super) tensors: Vec<Entry>,
}

/// A tensor's place in its file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) format: Format,
    /// Rows before columns.
    pub(super) shape: Vec<usize>,
    /// Counted from the file's first byte.
    pub(super) bytes: Range<usize>,
}

/// Reads little-endian numbers and strings one after another, never beyond the end.
pub(super) struct Reader<'f> {
    file: &'f str,
    bytes: &'f [u8],
    at: usize,
}

impl<'f> Reader<'f> {
    pub(super) fn new(file: &'f str, bytes: &'f [u8], at: usize) -> Self {
        Self { file, bytes, at }
    }

    /// The next `count` bytes; `what` they are stands in the error.
    pub(super) fn take(&mut self, count: u64, what: &str) -> Result<&'f [u8], ModelError> {
        let rest = &self.bytes[self.at..];
        let taken = usize::try_from(count).ok().and_then(|count| rest.get(..count));
        let Some(taken) = taken else {
            let (at, there) = (self.at, rest.len());
            let message = format!("wanted {count} bytes of {what} at byte {at}, {there} are left");
            return Err(ModelError::file(self.file, message));
        };
        self.at += taken.len();
        Ok(taken)
    }

    /// The place of the next byte.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        let bytes = self.take(8, what)?;
        Ok(u64::from_le_bytes(std::array::from_fn(|i| bytes[i])))
    }

    /// A length and as many bytes.
    pub(super) fn text(&mut self, what: &str) -> Result<&'f [u8], ModelError> {
        let length = self.u64(what)?;
        self.take(length, what)
    }

    /// The name of a key or tensor.
    fn name(&mut self, what: &str) -> Result<String, ModelError> {
        let at = self.at;
        let length = self.u64(what)?;
        if length > LONGEST_NAME {
            let message = format!("wanted at most {LONGEST_NAME} bytes of {what} at byte {at}, found {length}");
            return Err(ModelError::file(self.file, message));
        }
        let bytes = self.take(length, what)?;
        let text = std::str::from_utf8(bytes).map_err(|error| {
            ModelError::file(self.file, format!("{what} at byte {at} is not UTF-8 at its byte {}", error.valid_up_to()))
        })?;
        Ok(text.to_string())
    }
}

/// Reads and checks the tables of a file.
pub(super) fn read(file: &str, bytes: &[u8]) -> Result<Header, ModelError> {
    let mut reader = Reader::new(file, bytes, 0);
    let magic = reader.take(4, "the mark `GGUF`")?;
    if magic != MAGIC {
        let message = format!("wanted a GGUF file, which begins with `GGUF`, found `{}`", magic.escape_ascii());
        return Err(ModelError::file(file, message));
    }
    let version = reader.u32("the version")?;
    if !matches!(version, 2 | 3) {
        let swapped = version.swap_bytes() <= 3;
        let found = if swapped { "a big-endian file".into() } else { format!("version {version}") };
        return Err(ModelError::file(file, format!("wanted GGUF of version 2 or 3, little-endian, found {found}")));
    }
    let n_tensors = reader.u64("the number of tensors")?;
    let n_fields = reader.u64("the number of metadata fields")?;
    // Each takes a few bytes at least, so a count that lies ends with the file before it has taken memory.
    let mut fields = Vec::new();
    for _ in 0..n_fields {
        fields.push(read_field(&mut reader)?);
    }
    fields.sort_by(|a, b| a.key.cmp(&b.key));
    if let Some(pair) = fields.windows(2).find(|pair| pair[0].key == pair[1].key) {
        return Err(ModelError::config(file, &pair[0].key, "stands in the metadata twice"));
    }
    let mut raw = Vec::new();
    for _ in 0..n_tensors {
        raw.push(read_entry(&mut reader)?);
    }
    let alignment = read_alignment(file, bytes, &fields)?;
    let start = reader.at.checked_next_multiple_of(alignment);
    let mut tensors = raw
        .into_iter()
        .map(|raw| place(file, raw, start, alignment, bytes.len()))
        .collect::<Result<Vec<Entry>, ModelError>>()?;
    tensors.sort_by_key(|entry| (entry.bytes.start, entry.bytes.end));
    check_together(file, &tensors)?;
    Ok(Header { fields, tensors })
}

fn read_field(reader: &mut Reader) -> Result<Field, ModelError> {
    let key = reader.name("a key")?;
    let kind = read_kind(reader, &key)?;
    let (element, count) = if kind == Kind::Array {
        let element = read_kind(reader, &key)?;
        if element == Kind::Array {
            return Err(ModelError::config(reader.file, &key, "is an array of arrays, which no reader takes"));
        }
        (element, reader.u64("the length of an array")?)
    } else {
        (kind, 1)
    };
    let start = reader.at;
    match element.size() {
        Some(size) => {
            let bytes = count.checked_mul(size as u64).unwrap_or(u64::MAX);
            reader.take(bytes, &format!("the value of `{key}`"))?;
        }
        None => {
            for _ in 0..count {
                reader.text("a text of the metadata")?;
            }
        }
    }
    // The bytes are there, so the count fits.
    Ok(Field { key, kind, element, count: count as usize, bytes: start..reader.at })
}

fn read_kind(reader: &mut Reader, key: &str) -> Result<Kind, ModelError> {
    let number = reader.u32("the type of a value")?;
    Kind::from_number(number)
        .ok_or_else(|| ModelError::config(reader.file, key, format!("wanted a value of type 0 to 12, found {number}")))
}

fn read_alignment(file: &str, bytes: &[u8], fields: &[Field]) -> Result<usize, ModelError> {
    let metadata = super::Metadata::new(file, bytes, fields);
    let alignment = metadata.optional_u32(ALIGNMENT_KEY)?.map_or(ALIGNMENT, |alignment| alignment as usize);
    if !alignment.is_power_of_two() {
        return Err(ModelError::config(file, ALIGNMENT_KEY, format!("wanted a power of two, found {alignment}")));
    }
    Ok(alignment)
}

/// A tensor as the table has it.
struct RawEntry {
    name: String,
    dimensions: Vec<u64>,
    kind: u32,
    offset: u64,
}

fn read_entry(reader: &mut Reader) -> Result<RawEntry, ModelError> {
    let name = reader.name("a tensor's name")?;
    let count = reader.u32("the number of dimensions")?;
    if count > MOST_DIMENSIONS {
        let message = format!("wanted up to {MOST_DIMENSIONS} dimensions, found {count}");
        return Err(ModelError::tensor(reader.file, &name, message));
    }
    let dimensions = (0..count).map(|_| reader.u64("a dimension")).collect::<Result<Vec<u64>, ModelError>>()?;
    Ok(RawEntry { name, dimensions, kind: reader.u32("a tensor's type")?, offset: reader.u64("a tensor's offset")? })
}

/// Checks one tensor by itself, `start` being where the tensors begin and `end` the file's length.
fn place(file: &str, raw: RawEntry, start: Option<usize>, alignment: usize, end: usize) -> Result<Entry, ModelError> {
    let error = |message: String| Err(ModelError::tensor(file, &raw.name, message));
    let Some(&(_, format)) = TYPES.iter().find(|(number, _)| *number == raw.kind) else {
        return error(format!("its type is ggml's number {}, which is not known here", raw.kind));
    };
    let shape: Option<Vec<usize>> = raw.dimensions.iter().rev().map(|&n| usize::try_from(n).ok()).collect();
    let elements = shape.as_ref().and_then(|shape| shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n)));
    let (Some(shape), Some(elements)) = (shape, elements) else {
        return error(format!("its dimensions {:?} overflow", raw.dimensions));
    };
    let (columns, block_len) = (shape.last().copied().unwrap_or(1), format.block_len());
    if !columns.is_multiple_of(block_len) {
        return error(format!("{format} wants rows of a multiple of {block_len}, found {columns}"));
    }
    let Some(size) = format.bytes_of(elements) else {
        return error(format!("its dimensions {:?} overflow", raw.dimensions));
    };
    if !raw.offset.is_multiple_of(alignment as u64) {
        return error(format!("wanted an offset that is a multiple of {alignment}, found {}", raw.offset));
    }
    let first = usize::try_from(raw.offset).ok().and_then(|offset| start?.checked_add(offset));
    let bytes = first.and_then(|first| Some(first..first.checked_add(size)?)).filter(|bytes| bytes.end <= end);
    let Some(bytes) = bytes else {
        let (offset, start) = (raw.offset, start.unwrap_or(end));
        let message = format!("wanted {size} bytes at offset {offset} of the data, which begins at byte {start}");
        return error(format!("{message}; the file has {end}"));
    };
    Ok(Entry { name: raw.name, format, shape, bytes })
}

/// Checks that entries in order of their bytes do not overlap, and that no name comes twice.
fn check_together(file: &str, entries: &[Entry]) -> Result<(), ModelError> {
    for pair in entries.windows(2) {
        let (end, start) = (pair[0].bytes.end, pair[1].bytes.start);
        if start < end {
            let message =
                format!("wanted bytes behind those of `{}`, which end at {end}, found {start}: overlap", pair[0].name);
            return Err(ModelError::tensor(file, &pair[1].name, message));
        }
    }
    let mut names: Vec<&str> = entries.iter().map(|entry| &entry.name[..]).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(ModelError::tensor(file, pair[0], "stands in the table twice")),
        None => Ok(()),
    }
}
