//! The metadata: keys with typed values, read where they stand in the file when they are asked for.

use super::header::Reader;
use crate::ModelError;
use std::ops::Range;

/// The type of a value, by ggml's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

const KINDS: [Kind; 13] = [
    Kind::U8,
    Kind::I8,
    Kind::U16,
    Kind::I16,
    Kind::U32,
    Kind::I32,
    Kind::F32,
    Kind::Bool,
    Kind::Text,
    Kind::Array,
    Kind::U64,
    Kind::I64,
    Kind::F64,
];

impl Kind {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        KINDS.get(usize::try_from(number).ok()?).copied()
    }

    /// Bytes of a value, if all of the type have as many.
    pub(super) fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Text | Self::Array => None,
        }
    }
}

/// A field's place in its file.
#[derive(Debug)]
pub(super) struct Field {
    pub(super) key: String,
    pub(super) kind: Kind,
    /// The type of the elements of an array, else that of the value.
    pub(super) element: Kind,
    /// Elements of an array, else 1.
    pub(super) count: usize,
    pub(super) bytes: Range<usize>,
}

/// What a file says about itself.
#[derive(Clone, Copy)]
pub struct Metadata<'f> {
    file: &'f str,
    bytes: &'f [u8],
    /// In the order of keys.
    fields: &'f [Field],
}

/// A value of the metadata.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'f> {
    /// A whole number of any width, with or without a sign.
    Whole(i128),
    /// A number of 32 bits.
    F32(f32),
    /// A number of 64 bits.
    F64(f64),
    /// A truth value.
    Flag(bool),
    /// A text.
    Text(&'f str),
    /// Several values of one type.
    Array(Array<'f>),
}

/// Several values of one type, still in the file.
#[derive(Clone, Copy)]
pub struct Array<'f> {
    metadata: Metadata<'f>,
    field: &'f Field,
}

impl std::fmt::Debug for Array<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{:?}; {}]", self.field.element, self.len())
    }
}

impl PartialEq for Array<'_> {
    fn eq(&self, other: &Self) -> bool {
        let bytes = |array: &Self| array.metadata.bytes[array.field.bytes.clone()].to_vec();
        self.field.element == other.field.element && bytes(self) == bytes(other)
    }
}

impl<'f> Metadata<'f> {
    pub(super) fn new(file: &'f str, bytes: &'f [u8], fields: &'f [Field]) -> Self {
        Self { file, bytes, fields }
    }

    /// An error about a key.
    pub fn error(&self, key: &str, message: impl Into<String>) -> ModelError {
        ModelError::config(self.file, key, message)
    }

    /// All keys, in their order.
    pub fn keys(&self) -> impl Iterator<Item = &'f str> {
        self.fields.iter().map(|field| &field.key[..])
    }

    /// Whether a key is there.
    pub fn has(&self, key: &str) -> bool {
        self.field(key).is_some()
    }

    fn field(&self, key: &str) -> Option<&'f Field> {
        let place = self.fields.binary_search_by_key(&key, |field| &field.key).ok()?;
        Some(&self.fields[place])
    }

    /// A key's value; none if it is absent.
    ///
    /// # Errors
    /// A text that is no UTF-8, a truth value that is neither 0 nor 1.
    pub fn get(&self, key: &str) -> Result<Option<Value<'f>>, ModelError> {
        let Some(field) = self.field(key) else { return Ok(None) };
        if field.kind == Kind::Array {
            return Ok(Some(Value::Array(Array { metadata: *self, field })));
        }
        self.value(field, &self.bytes[field.bytes.clone()]).map(Some)
    }

    /// The value whose bytes these are, for texts with their length.
    fn value(&self, field: &Field, bytes: &'f [u8]) -> Result<Value<'f>, ModelError> {
        fn of<const N: usize>(bytes: &[u8]) -> [u8; N] {
            std::array::from_fn(|i| bytes[i])
        }
        Ok(match field.element {
            Kind::U8 => Value::Whole(bytes[0].into()),
            Kind::I8 => Value::Whole((bytes[0] as i8).into()),
            Kind::U16 => Value::Whole(u16::from_le_bytes(of(bytes)).into()),
            Kind::I16 => Value::Whole(i16::from_le_bytes(of(bytes)).into()),
            Kind::U32 => Value::Whole(u32::from_le_bytes(of(bytes)).into()),
            Kind::I32 => Value::Whole(i32::from_le_bytes(of(bytes)).into()),
            Kind::U64 => Value::Whole(u64::from_le_bytes(of(bytes)).into()),
            Kind::I64 => Value::Whole(i64::from_le_bytes(of(bytes)).into()),
            Kind::F32 => Value::F32(f32::from_le_bytes(of(bytes))),
            Kind::F64 => Value::F64(f64::from_le_bytes(of(bytes))),
            Kind::Bool if bytes[0] <= 1 => Value::Flag(bytes[0] == 1),
            Kind::Bool => return Err(self.error(&field.key, format!("wanted 0 or 1, found {}", bytes[0]))),
            Kind::Text => {
                let text = std::str::from_utf8(&bytes[8..]);
                Value::Text(text.map_err(|error| {
                    self.error(&field.key, format!("is not UTF-8 at its byte {}", error.valid_up_to()))
                })?)
            }
            Kind::Array => unreachable!("arrays of arrays are refused when the tables are read"),
        })
    }

    fn wrong(&self, key: &str, wanted: &str, found: Value) -> ModelError {
        let found = match found {
            Value::Whole(number) => number.to_string(),
            Value::F32(number) => number.to_string(),
            Value::F64(number) => number.to_string(),
            Value::Flag(flag) => flag.to_string(),
            Value::Text(text) => format!("the text {text:?}"),
            Value::Array(array) => format!("an array of {}", array.len()),
        };
        self.error(key, format!("wanted {wanted}, found {found}"))
    }

    /// What `read` makes of a key's value, if it is there.
    fn optional<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(Value<'f>) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(key)? else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong(key, wanted, value))
    }

    fn needed<T>(&self, key: &str, wanted: &str, found: Option<T>) -> Result<T, ModelError> {
        found.ok_or_else(|| self.error(key, format!("wanted {wanted}, found nothing")))
    }

    /// A whole number of any width that fits, if it is there.
    ///
    /// # Errors
    /// Another value.
    pub fn optional_u32(&self, key: &str) -> Result<Option<u32>, ModelError> {
        self.optional(key, "a whole number of 32 bits", |value| match value {
            Value::Whole(number) => u32::try_from(number).ok(),
            _ => None,
        })
    }

    /// A whole number that must be there.
    ///
    /// # Errors
    /// Another value, or none.
    pub fn u32(&self, key: &str) -> Result<u32, ModelError> {
        self.needed(key, "a whole number of 32 bits", self.optional_u32(key)?)
    }

    /// A number, if it is there.
    ///
    /// # Errors
    /// Another value.
    pub fn optional_f32(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.optional(key, "a number", |value| match value {
            Value::F32(number) => Some(number),
            Value::F64(number) => Some(number as f32),
            Value::Whole(number) => Some(number as f32),
            _ => None,
        })
    }

    /// A number that must be there.
    ///
    /// # Errors
    /// Another value, or none.
    pub fn f32(&self, key: &str) -> Result<f32, ModelError> {
        self.needed(key, "a number", self.optional_f32(key)?)
    }

    /// A truth value, if it is there.
    ///
    /// # Errors
    /// Another value.
    pub fn optional_flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.optional(key, "true or false", |value| match value {
            Value::Flag(flag) => Some(flag),
            _ => None,
        })
    }

    /// A text, if it is there.
    ///
    /// # Errors
    /// Another value.
    pub fn optional_text(&self, key: &str) -> Result<Option<&'f str>, ModelError> {
        self.optional(key, "a text", |value| match value {
            Value::Text(text) => Some(text),
            _ => None,
        })
    }

    /// A text that must be there.
    ///
    /// # Errors
    /// Another value, or none.
    pub fn text(&self, key: &str) -> Result<&'f str, ModelError> {
        self.needed(key, "a text", self.optional_text(key)?)
    }

    /// An array, if it is there.
    ///
    /// # Errors
    /// Another value.
    pub fn optional_array(&self, key: &str) -> Result<Option<Array<'f>>, ModelError> {
        self.optional(key, "an array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    /// An array that must be there.
    ///
    /// # Errors
    /// Another value, or none.
    pub fn array(&self, key: &str) -> Result<Array<'f>, ModelError> {
        self.needed(key, "an array", self.optional_array(key)?)
    }
}

impl<'f> Array<'f> {
    /// How many values there are.
    pub fn len(&self) -> usize {
        self.field.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values, one after another.
    pub fn values(&self) -> impl Iterator<Item = Result<Value<'f>, ModelError>> + use<'f> {
        let (metadata, field) = (self.metadata, self.field);
        let mut reader = Reader::new(metadata.file, &metadata.bytes[..field.bytes.end], field.bytes.start);
        (0..field.count).map(move |_| {
            let bytes = match field.element.size() {
                Some(size) => reader.take(size as u64, "a value")?,
                None => {
                    let text = reader.text("a text")?;
                    let end = reader.at();
                    &metadata.bytes[end - text.len() - 8..end]
                }
            };
            metadata.value(field, bytes)
        })
    }

    fn all<T>(&self, wanted: &str, read: impl Fn(Value<'f>) -> Option<T>) -> Result<Vec<T>, ModelError> {
        let one = |value: Result<Value<'f>, ModelError>| {
            let value = value?;
            read(value).ok_or_else(|| self.metadata.wrong(&self.field.key, wanted, value))
        };
        self.values().map(one).collect()
    }

    /// All values as texts.
    ///
    /// # Errors
    /// Values of another type, texts that are no UTF-8.
    pub fn texts(&self) -> Result<Vec<&'f str>, ModelError> {
        self.all("texts", |value| match value {
            Value::Text(text) => Some(text),
            _ => None,
        })
    }

    /// All values as f32.
    ///
    /// # Errors
    /// Values of another type.
    pub fn f32s(&self) -> Result<Vec<f32>, ModelError> {
        self.all("numbers of 32 bits", |value| match value {
            Value::F32(number) => Some(number),
            _ => None,
        })
    }

    /// All values as i32.
    ///
    /// # Errors
    /// Values of another type, or too large.
    pub fn i32s(&self) -> Result<Vec<i32>, ModelError> {
        self.all("whole numbers of 32 bits", |value| match value {
            Value::Whole(number) => i32::try_from(number).ok(),
            _ => None,
        })
    }
}
