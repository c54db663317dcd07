//! Routing methods in our own configurations: options as JSON, weights by way of a model's maker of weights.

use crate::ModelError;
use moebius_moe::MoeError;
use moebius_moe::routers::{MethodConfig, MethodLayer, OptionValue, Options, RoutingMethod};
use moebius_tensor::Param;
use serde_json::{Map, Value, json};

/// Options as JSON writes them.
pub(crate) fn write_options(options: &Options) -> Value {
    let value = |value: &OptionValue| match value {
        OptionValue::Number(number) => json!(number),
        OptionValue::Boolean(flag) => json!(flag),
        OptionValue::Text(text) => json!(text),
    };
    Value::Object(options.iter().map(|(key, found)| (key.clone(), value(found))).collect::<Map<String, Value>>())
}

/// What [`write_options`] wrote; none if there is nothing.
///
/// # Errors
/// No object, or a value that is no option's.
pub(crate) fn read_options(value: Option<&Value>, file: &str) -> Result<Options, ModelError> {
    let mut options = Options::new();
    let Some(value) = value else { return Ok(options) };
    let Some(map) = value.as_object() else {
        return Err(ModelError::config(file, "options", format!("wanted an object, found {value}")));
    };
    for (key, value) in map {
        let option = match value {
            Value::Number(number) => number.as_f64().map(OptionValue::Number),
            Value::Bool(flag) => Some(OptionValue::Boolean(*flag)),
            Value::String(text) => Some(OptionValue::Text(text.clone())),
            _ => None,
        };
        let message = || format!("wanted a number, a text, true or false, found {value}");
        options.insert(key.clone(), option.ok_or_else(|| ModelError::config(file, key, message()))?);
    }
    Ok(options)
}

/// Makes a weight from its name and shape.
type MakeNamed<'a> = dyn FnMut(&str, &[usize]) -> Result<Param, ModelError> + 'a;

/// Builds a method whose weights `make` makes.
///
/// # Errors
/// The method's, or `make`'s.
pub(crate) fn build(
    method: &MethodConfig,
    layer: &MethodLayer,
    make: &mut MakeNamed<'_>,
) -> Result<Box<dyn RoutingMethod>, ModelError> {
    // An error of the maker passes through the method's builder, which knows only its own.
    let mut failed = None;
    let built = method.build(layer, &mut |name, shape| {
        make(name, shape).map_err(|error| {
            let message = error.to_string();
            failed = Some(error);
            MoeError::Plan(message)
        })
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(built?),
    }
}

/// Another seed for each `index`, by the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) fn mixed(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
