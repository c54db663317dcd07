//! `[data]`: which texts, in which mixture, and what attention sees of their borders.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};

use super::Recipe;
use super::check::Checks;

/// `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// Texts to learn from.
    pub train: Vec<Source>,
    /// Texts held back for validation: what is best and when to stop is decided by them.
    pub valid: Vec<Source>,
    /// `[data.eval]`: further held-back texts by name; each validation gives their losses apart.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub eval: BTreeMap<String, Vec<Source>>,
    /// What attention sees of the borders between documents.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub documents: Documents,
}

/// One text, folder of texts, or table.
///
/// In a recipe a path alone, or a table `{ path = "...", key = "...", weight = ... }`.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// A file or a folder.
    pub path: PathBuf,
    /// The key of JSON lines, the column of Parquet and Arrow; `text` if absent.
    pub key: Option<String>,
    /// The share of this source among those of `data.train`; either all have one or none.
    pub weight: Option<f64>,
}

/// `data.documents`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Documents {
    /// A sequence may hold the end of one document and the beginning of the next; attention sees both.
    #[default]
    Joined,
    /// Attention sees no other document, and positions begin anew. The separator begins the document that follows it.
    Apart,
}

impl Source {
    /// The key or column of its texts.
    pub fn key(&self) -> &str {
        self.key.as_deref().unwrap_or("text")
    }
}

impl From<&Path> for Source {
    fn from(path: &Path) -> Self {
        Self { path: path.to_path_buf(), key: None, weight: None }
    }
}

/// The long form of a [`Source`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    path: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weight: Option<f64>,
}

impl Serialize for Source {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self { path, key: None, weight: None } => path.serialize(serializer),
            Self { path, key, weight } => {
                Table { path: path.clone(), key: key.clone(), weight: *weight }.serialize(serializer)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Source;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a path or a table with a path")
            }

            fn visit_str<E: Error>(self, path: &str) -> Result<Source, E> {
                Ok(Source::from(Path::new(path)))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Source, A::Error> {
                let Table { path, key, weight } = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Source { path, key, weight })
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl DataSection {
    /// Whether the sources of `train` are mixed by weight.
    pub fn is_weighted(&self) -> bool {
        self.train.iter().any(|source| source.weight.is_some())
    }
}

/// The rules of the section.
pub(super) fn check(recipe: &Recipe, checks: &mut Checks) {
    let data = &recipe.data;
    checks.require(!data.train.is_empty(), "data.train", "at least one text", "none");
    for source in &data.train {
        let weight = source.weight.unwrap_or(1.0);
        let found = format!("{weight} of {}", source.path.display());
        checks.require((1e-6..=1e6).contains(&weight), "data.train", "weights of 0.000001 to 1000000", found);
        let missing = data.is_weighted() && source.weight.is_none();
        let found = format!("none of {}", source.path.display());
        checks.require(!missing, "data.train", "a weight of every source or of none", found);
    }
    let held_back = data.eval.iter().map(|(name, sources)| (format!("data.eval.{name}"), sources));
    for (key, sources) in std::iter::once(("data.valid".to_owned(), &data.valid)).chain(held_back) {
        checks.require(!sources.is_empty(), &key, "at least one text", "none");
        for source in sources {
            let path = source.path.display();
            let known = data.train.iter().any(|other| other.path == source.path);
            checks.require(!known, &key, "texts that are not in data.train", path);
            let found = format!("a weight of {}", source.path.display());
            checks.require(source.weight.is_none(), &key, "no weights: all of it is looked at", found);
        }
    }
    for name in data.eval.keys() {
        let plain = |letter: char| letter.is_ascii_alphanumeric() || letter == '_' || letter == '-';
        let fits = !name.is_empty() && name.len() <= 64 && name.chars().all(plain);
        checks.require(fits, &format!("data.eval.{name}"), "a name of letters, digits, _ and -", name);
    }
}
