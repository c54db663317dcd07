//! `model.safetensors.index.json`: which shard holds which tensor. Read as a stream, for the largest have megabytes.

use crate::ModelError;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// The shards that an index names, each with its tensors.
pub(crate) fn read_index(path: &Path) -> Result<BTreeMap<String, Vec<String>>, ModelError> {
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    visit_index(path, &mut |tensor, shard| match shards.get_mut(shard) {
        Some(tensors) => tensors.push(tensor.to_string()),
        None => drop(shards.insert(shard.to_string(), vec![tensor.to_string()])),
    })?;
    Ok(shards)
}

/// Tells each tensor of an index and its shard, a file beside the index.
///
/// # Errors
/// What the system says; what is no index; a shard that is no file's name, by its tensor.
pub(crate) fn visit_index(path: &Path, visit: &mut dyn FnMut(&str, &str)) -> Result<(), ModelError> {
    let name = path.display().to_string();
    let file = BufReader::new(File::open(path).map_err(ModelError::io(path))?);
    let mut visitor = Index { visit, foreign: None, has_map: false };
    let read = (&mut visitor).deserialize(&mut serde_json::Deserializer::from_reader(file));
    if let Some((tensor, shard)) = visitor.foreign {
        let message = format!("wanted the name of a file beside the index, found {shard:?}");
        return Err(ModelError::tensor(&name, &tensor, message));
    }
    read.map_err(|error| ModelError::file(&name, format!("wanted an index of tensors in JSON: {error}")))?;
    if visitor.has_map {
        Ok(())
    } else {
        Err(ModelError::config(&name, "weight_map", "wanted an object of tensor names and files"))
    }
}

/// Reads the whole file, then (as another seed) its `weight_map`.
struct Index<'v> {
    visit: &'v mut dyn FnMut(&str, &str),
    /// The first tensor whose shard is no file's name.
    foreign: Option<(String, String)>,
    has_map: bool,
}

impl<'de> DeserializeSeed<'de> for &mut Index<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Index<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<(), M::Error> {
        while let Some(key) = map.next_key::<Cow<'_, str>>()? {
            if key == "weight_map" {
                self.has_map = true;
                map.next_value_seed(WeightMap(&mut *self))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct WeightMap<'i, 'v>(&'i mut Index<'v>);

impl<'de> DeserializeSeed<'de> for WeightMap<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMap<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tensor names and files for `weight_map`")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<(), M::Error> {
        let Index { visit, foreign, .. } = self.0;
        while let Some((tensor, shard)) = map.next_entry::<Cow<'_, str>, serde_json::Value>()? {
            match shard.as_str().filter(|file| Path::new(file).file_name().is_some_and(|name| name == *file)) {
                Some(file) => visit(&tensor, file),
                None => drop(foreign.get_or_insert_with(|| (tensor.to_string(), shard.to_string()))),
            }
        }
        Ok(())
    }
}
