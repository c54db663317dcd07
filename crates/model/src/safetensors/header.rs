//! The header: parsed with care, checked whole, before any byte behind it is touched.

use crate::ModelError;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use std::fmt;
use std::ops::Range;

/// Headers beyond this are refused; the largest published ones have a few megabytes.
const LARGEST_HEADER: usize = 100 << 20;

/// Type of a tensor's elements, in the format's spelling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[allow(missing_docs, reason = "each says its name")]
pub enum Dtype {
    BOOL,
    U8,
    I8,
    #[serde(rename = "F8_E5M2")]
    F8E5M2,
    #[serde(rename = "F8_E4M3")]
    F8E4M3,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    F64,
    I64,
    U64,
}

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::BOOL | Self::U8 | Self::I8 | Self::F8E5M2 | Self::F8E4M3 => 1,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }
}

impl Dtype {
    /// Its name in the format's spelling.
    pub fn name(self) -> &'static str {
        match self {
            Self::BOOL => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E4M3 => "F8_E4M3",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F32 => "F32",
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::U64 => "U64",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor's place in its file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Counted from the end of the header.
    pub(super) bytes: Range<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's entries in order, duplicates included (a map would hide them).
struct RawHeader(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<RawHeader, M::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Where the data begins, and the tensors in the order of their bytes.
pub(super) fn read(file: &str, bytes: &[u8]) -> Result<(usize, Vec<Entry>), ModelError> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let message = format!("wanted a safetensors file of at least 8 bytes, found {}", bytes.len());
        return Err(ModelError::file(file, message));
    };
    let wanted = u64::from_le_bytes(*length);
    let header = usize::try_from(wanted).ok().filter(|&wanted| wanted <= LARGEST_HEADER).and_then(|n| rest.get(..n));
    let Some(header) = header else {
        let message = format!("its first 8 bytes ask for a header of {wanted} bytes, {} follow", rest.len());
        return Err(ModelError::file(file, message));
    };
    let header_text = std::str::from_utf8(header).map_err(|error| {
        ModelError::file(file, format!("the header is not UTF-8 at its byte {}", error.valid_up_to()))
    })?;
    let RawHeader(raw) = serde_json::from_str(header_text)
        .map_err(|error| ModelError::file(file, format!("the header is no list of tensors: {error}")))?;
    let data = rest.len() - header.len();
    let mut entries =
        raw.into_iter().map(|(name, entry)| check(file, name, entry, data)).collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(|entry| (entry.bytes.start, entry.bytes.end));
    check_together(file, &entries, data)?;
    Ok((8 + header.len(), entries))
}

/// Checks one entry by itself against the `data` bytes there are.
fn check(file: &str, name: String, raw: RawEntry, data: usize) -> Result<Entry, ModelError> {
    let error = |message: String| Err(ModelError::tensor(file, &name, message));
    let shape: Option<Vec<usize>> = raw.shape.iter().map(|&n| usize::try_from(n).ok()).collect();
    let wanted = shape
        .as_ref()
        .and_then(|shape| shape.iter().try_fold(raw.dtype.size(), |product: usize, &n| product.checked_mul(n)));
    let (Some(shape), Some(wanted)) = (shape, wanted) else {
        return error(format!("its shape {:?} overflows", raw.shape));
    };
    let (start, end) = raw.data_offsets;
    if start > end || end > data as u64 {
        return error(format!("wanted bytes within the {data} of the file's data, found {start} to {end}"));
    }
    let found = (end - start) as usize;
    if found != wanted {
        let dtype = raw.dtype;
        return error(format!("{dtype} of shape {shape:?} wants {wanted} bytes, its offsets hold {found}"));
    }
    Ok(Entry { name, dtype: raw.dtype, shape, bytes: start as usize..end as usize })
}

/// Checks that entries in order of their bytes fill the data without holes and overlaps, and that no name comes twice.
fn check_together(file: &str, entries: &[Entry], data: usize) -> Result<(), ModelError> {
    let mut end = 0;
    for entry in entries {
        let start = entry.bytes.start;
        if start != end {
            let what = if start < end { "overlaps the tensor before it" } else { "leaves bytes unused before it" };
            return Err(ModelError::tensor(file, &entry.name, format!("wanted offset {end}, found {start}: {what}")));
        }
        end = entry.bytes.end;
    }
    if end != data {
        return Err(ModelError::file(file, format!("the tensors take {end} bytes, {data} follow the header")));
    }
    let mut names: Vec<&str> = entries.iter().map(|entry| &entry.name[..]).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(ModelError::tensor(file, pair[0], "stands in the header twice")),
        None => Ok(()),
    }
}
