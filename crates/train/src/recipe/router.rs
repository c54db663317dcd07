//! `[router]`: a routing method by name, with its options.

use std::collections::BTreeMap;
use std::fmt;

use moebius_moe::MoeError;
use moebius_moe::routers::{self, MethodConfig, MethodLayer, OptionValue};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::check::Checks;

/// `[router]`: `name` is one of `moebius_moe::routers::ALL`, every other key an option of that method.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RouterSection(BTreeMap<String, RouterValue>);

/// A value of the section: a number, a text, true or false.
#[derive(Clone, Debug, PartialEq)]
struct RouterValue(OptionValue);

const NAME: &str = "name";
const CAPACITY: &str = "capacity_factor";
/// A folder, not the method's affair: of the model whose embeddings make a hash router's table.
const EMBEDDINGS: &str = "embeddings";

impl RouterSection {
    /// A method without options.
    pub fn named(name: &str) -> Self {
        Self(BTreeMap::from([(NAME.to_owned(), RouterValue(name.into()))]))
    }

    /// The method's name; nothing if the section has none, which its check says.
    pub fn name(&self) -> &str {
        self.text(NAME).unwrap_or_default()
    }

    fn text(&self, key: &str) -> Option<&str> {
        match self.0.get(key) {
            Some(RouterValue(OptionValue::Text(text))) => Some(text),
            _ => None,
        }
    }

    /// Where a hash router's table comes from, if it says so.
    pub(crate) fn table(&self) -> Option<&str> {
        self.text("table").filter(|_| self.name() == "hash")
    }

    /// The folder of the model whose embeddings are clustered.
    pub(crate) fn embeddings(&self) -> Option<&str> {
        self.text(EMBEDDINGS)
    }

    /// The method with its options: all other keys.
    pub fn method(&self) -> MethodConfig {
        let others = self.0.iter().filter(|(key, _)| *key != NAME && *key != EMBEDDINGS);
        let options = others.map(|(key, value)| (key.clone(), value.0.clone())).collect();
        MethodConfig { name: self.name().to_owned(), options }
    }

    /// Builds the method once, so that what it refuses is refused before anything starts. `top_k_key` is the recipe's key
    /// for the experts of a token.
    pub(crate) fn check(&self, layer: &RoutedLayer<'_>, checks: &mut Checks) {
        if self.name().is_empty() {
            let known = routers::ALL.iter().map(|entry| entry.name).collect::<Vec<_>>().join(", ");
            checks.require(false, "router.name", format!("one of {known}"), "none");
            return;
        }
        let clusters = matches!(self.table(), Some("clustered" | "dispersed"));
        let wanted = match clusters {
            true => "the folder of a trained model with the same vocabulary (table = \"clustered\" or \"dispersed\")",
            false => "no such key (only hash with table = \"clustered\" or \"dispersed\" has it)",
        };
        let has = self.0.contains_key(EMBEDDINGS);
        let found = if has { "one" } else { "none" };
        checks.require(has == clusters && (!has || self.embeddings().is_some()), "router.embeddings", wanted, found);
        let RoutedLayer { experts, top_k, vocabulary, causal, .. } = *layer;
        let method_layer = MethodLayer { hidden: 1, experts, top_k, vocabulary, causal };
        let error = match self.method().least_tokens(&method_layer) {
            Ok(least) => {
                let tokens = layer.tokens.unwrap_or(least);
                let wanted = format!("at least {least} tokens that a layer sees at once, for each expert to have one");
                let key = if self.0.contains_key(CAPACITY) { "router.capacity_factor" } else { "router.name" };
                return checks.require(tokens >= least, key, wanted, tokens);
            }
            Err(error) => error,
        };
        match error {
            MoeError::Option { key, message, .. } => checks.complain(&format!("router.{key}"), message),
            MoeError::TopK { .. } | MoeError::NoRouterGradient => checks.complain(layer.top_k_key, error.to_string()),
            MoeError::UnknownRouter { found, known } => {
                checks.require(false, "router.name", format!("one of {known}"), found);
            }
            error => checks.complain("router.name", error.to_string()),
        }
    }
}

/// The layer that a method is for.
pub(crate) struct RoutedLayer<'a> {
    /// Experts there are.
    pub(crate) experts: usize,
    /// Experts of a token.
    pub(crate) top_k: usize,
    /// Ids of the vocabulary; 0 without one.
    pub(crate) vocabulary: usize,
    /// Whether later tokens must not be seen.
    pub(crate) causal: bool,
    /// Tokens that a layer sees at once, if the recipe says.
    pub(crate) tokens: Option<usize>,
    /// The recipe's key for `top_k`.
    pub(crate) top_k_key: &'a str,
}

impl Serialize for RouterValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            OptionValue::Number(number) => serializer.serialize_f64(*number),
            OptionValue::Boolean(flag) => serializer.serialize_bool(*flag),
            OptionValue::Text(text) => serializer.serialize_str(text),
        }
    }
}

impl<'de> Deserialize<'de> for RouterValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = RouterValue;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, a text, true or false")
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<RouterValue, E> {
                Ok(RouterValue(OptionValue::Number(value as f64)))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<RouterValue, E> {
                Ok(RouterValue(OptionValue::Number(value as f64)))
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<RouterValue, E> {
                Ok(RouterValue(OptionValue::Number(value)))
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<RouterValue, E> {
                Ok(RouterValue(OptionValue::Boolean(value)))
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<RouterValue, E> {
                Ok(RouterValue(OptionValue::Text(value.to_owned())))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}
