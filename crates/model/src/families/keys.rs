//! Reading the keys of a `config.json`, with errors that name file and key.

use crate::ModelError;
use serde_json::{Map, Value};

/// The keys of one JSON object.
pub(crate) struct Keys<'a> {
    file: &'a str,
    /// The key of the object that these stand in, with a point; empty at the top.
    place: String,
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(file: &'a str, map: &'a Map<String, Value>) -> Self {
        Self { file, place: String::new(), map }
    }

    /// The file's name, for errors.
    pub(crate) fn file(&self) -> &'a str {
        self.file
    }

    /// An error about a key.
    pub(crate) fn error(&self, key: &str, message: impl Into<String>) -> ModelError {
        ModelError::config(self.file, &format!("{}{key}", self.place), message)
    }

    fn wrong(&self, key: &str, wanted: &str, found: &Value) -> ModelError {
        self.error(key, format!("wanted {wanted}, found {found}"))
    }

    /// Whether a key is there, be it null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// A key's value; none if it is absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn needed(&self, key: &str, wanted: &str) -> Result<&'a Value, ModelError> {
        self.get(key).ok_or_else(|| self.error(key, format!("wanted {wanted}, found nothing")))
    }

    /// A text that must be there.
    pub(crate) fn text(&self, key: &str) -> Result<&'a str, ModelError> {
        let value = self.needed(key, "a text")?;
        value.as_str().ok_or_else(|| self.wrong(key, "a text", value))
    }

    /// A whole number that must be there.
    pub(crate) fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.needed(key, "a whole number")?;
        Ok(self.optional_size(key)?.unwrap_or_default())
    }

    /// A whole number, if it is there.
    pub(crate) fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.get(key)
            .map(|value| {
                let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
                size.ok_or_else(|| self.wrong(key, "a whole number", value))
            })
            .transpose()
    }

    /// A number, or `default` if it is absent.
    pub(crate) fn number(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        self.get(key).map_or(Ok(default), |value| value.as_f64().ok_or_else(|| self.wrong(key, "a number", value)))
    }

    /// A truth value, or `default` if it is absent.
    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        self.get(key)
            .map_or(Ok(default), |value| value.as_bool().ok_or_else(|| self.wrong(key, "true or false", value)))
    }

    /// One token id, a list of them, or none.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.wrong(key, "a token id", value))
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }

    /// The keys of an object inside.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Keys<'a>>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Keys { file: self.file, place: format!("{}{key}.", self.place), map })),
            Some(value) => Err(self.wrong(key, "an object", value)),
        }
    }

    /// An error unless a key is absent or has the one value that we compute.
    pub(crate) fn only(&self, key: &str, supported: Value) -> Result<(), ModelError> {
        match self.get(key) {
            Some(value) if *value != supported && value.as_f64() != supported.as_f64().or(Some(f64::NAN)) => {
                Err(self.error(key, format!("this family is computed for {supported} only, found {value}")))
            }
            _ => Ok(()),
        }
    }
}
