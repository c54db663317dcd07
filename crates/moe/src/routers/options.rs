//! Options of a router, checked: an unknown key, another type or a value out of range is named.

use crate::MoeError;
use moebius_tensor::Param;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// A value as recipes write it.
#[derive(Clone, Debug, PartialEq)]
pub enum OptionValue {
    /// A number.
    Number(f64),
    /// Yes or no.
    Boolean(bool),
    /// One of several words.
    Text(String),
}

impl From<f64> for OptionValue {
    fn from(value: f64) -> Self {
        Self::Number(value)
    }
}

impl From<bool> for OptionValue {
    fn from(value: bool) -> Self {
        Self::Boolean(value)
    }
}

impl From<&str> for OptionValue {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

/// A router's options by key.
pub type Options = BTreeMap<String, OptionValue>;

/// Makes a weight from its name and shape.
pub type MakeParam<'a> = dyn FnMut(&str, &[usize]) -> Result<Param, MoeError> + 'a;

/// What a router is built from.
pub struct Setup<'a> {
    /// Width of x.
    pub hidden: usize,
    /// Experts of the layer.
    pub experts: usize,
    /// Experts a token is meant for (on average, where the experts choose).
    pub top_k: usize,
    /// Ids of the vocabulary, for hash layers.
    pub vocabulary: usize,
    /// Whether the model writes from left to right: then a choice must not depend on later tokens.
    pub causal: bool,
    /// What is left of the options; each is taken out as it is read.
    pub options: Options,
    /// Makes the router's weights, `[experts, hidden]` each.
    pub param: &'a mut MakeParam<'a>,
    /// For messages.
    pub(super) router: &'static str,
}

impl<'a> Setup<'a> {
    /// A setup for a causal model without options.
    pub fn new(hidden: usize, experts: usize, top_k: usize, param: &'a mut MakeParam<'a>) -> Self {
        let (vocabulary, causal, options) = (0, true, Options::new());
        Self { hidden, experts, top_k, vocabulary, causal, options, param, router: "router" }
    }

    /// The weight that scores experts, `[experts, hidden]`.
    pub(super) fn score_weight(&mut self, name: &str) -> Result<Param, MoeError> {
        (self.param)(name, &[self.experts, self.hidden])
    }

    /// An error unless 1 <= `top_k` <= `most`.
    pub(super) fn top_k_up_to(&self, most: usize) -> Result<usize, MoeError> {
        if (1..=most).contains(&self.top_k) {
            Ok(self.top_k)
        } else {
            Err(MoeError::TopK { top_k: self.top_k, experts: most })
        }
    }

    /// An error unless `top_k` is `wanted`, the only number the method knows.
    pub(super) fn top_k_is(&self, wanted: usize) -> Result<(), MoeError> {
        let range = self.top_k_up_to(self.experts)?;
        if range == wanted {
            Ok(())
        } else {
            Err(self.refuse(format!("wanted {wanted} choices a token, which is what it defines, found {range}")))
        }
    }

    pub(super) fn refuse(&self, reason: impl Into<String>) -> MoeError {
        MoeError::Refused { router: self.router, reason: reason.into() }
    }

    /// Refuses a method that looks at the whole batch in a causal model, unless `allow_future_leak = true`.
    pub(super) fn looks_at_the_batch(&mut self) -> Result<(), MoeError> {
        let allowed = self.flag("allow_future_leak", false)?;
        if self.causal && !allowed {
            return Err(self.refuse(
                "a token's experts depend on later tokens, which a causal language model must not see; use another \
                 router, or say allow_future_leak = true to study the leak",
            ));
        }
        Ok(())
    }

    fn error(&self, key: &str, message: String) -> MoeError {
        MoeError::Option { router: self.router, key: key.to_owned(), message }
    }

    /// A number in `range`.
    pub(super) fn number(&mut self, key: &str, default: f64, range: RangeInclusive<f64>) -> Result<f64, MoeError> {
        match self.options.remove(key) {
            None => Ok(default),
            Some(OptionValue::Number(found)) if range.contains(&found) => Ok(found),
            Some(found) => {
                Err(self.error(key, format!("wanted {} to {}, found {}", range.start(), range.end(), found.show())))
            }
        }
    }

    /// A whole number in `range`.
    pub(super) fn count(&mut self, key: &str, default: usize, range: RangeInclusive<usize>) -> Result<usize, MoeError> {
        let found = self.number(key, default as f64, *range.start() as f64..=*range.end() as f64)?;
        if found.fract() == 0.0 {
            Ok(found as usize)
        } else {
            Err(self.error(key, format!("wanted a whole number, found {found}")))
        }
    }

    /// Yes or no.
    pub(super) fn flag(&mut self, key: &str, default: bool) -> Result<bool, MoeError> {
        match self.options.remove(key) {
            None => Ok(default),
            Some(OptionValue::Boolean(found)) => Ok(found),
            Some(found) => Err(self.error(key, format!("wanted true or false, found {}", found.show()))),
        }
    }

    /// One of `words`; the first is the default. Gives its place.
    pub(super) fn word(&mut self, key: &str, words: &[&str]) -> Result<usize, MoeError> {
        let Some(found) = self.options.remove(key) else { return Ok(0) };
        let place = words.iter().position(|word| found == OptionValue::from(*word));
        place.ok_or_else(|| self.error(key, format!("wanted one of {}, found {}", words.join(", "), found.show())))
    }

    /// An error if an option is left that the router does not know.
    pub(super) fn finish(&self) -> Result<(), MoeError> {
        match self.options.keys().next() {
            None => Ok(()),
            Some(key) => Err(self.error(key, "wanted an option that this router has".into())),
        }
    }
}

impl OptionValue {
    fn show(&self) -> String {
        match self {
            Self::Number(value) => value.to_string(),
            Self::Boolean(value) => value.to_string(),
            Self::Text(value) => format!("{value:?}"),
        }
    }
}
