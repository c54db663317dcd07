//! Families: how published models spell what [`ModelConfig`] and our weights say. A family is data; the arithmetic is
//! elsewhere.

mod dbrx;
mod deepseek_v2;
mod deepseek_v3;
mod dots1;
mod ernie4_5_moe;
mod flex_olmo;
mod glm4_moe;
mod glm4_moe_lite;
mod gpt_oss;
mod granitemoe;
mod granitemoeshared;
mod grok;
mod hunyuan_v1_moe;
mod hybrid;
mod jamba;
mod jetmoe;
mod keys;
mod latent;
mod layout;
mod lfm2_moe;
mod llama;
mod llama4_text;
mod minimax_m2;
mod mistral;
mod mixtral;
mod moebius;
mod olmoe;
mod phimoe;
mod published;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_5_moe;
mod qwen3_moe;
mod qwen3_next;
mod rope;
mod shared;
mod tensor_map;
mod tensors;

use crate::{ModelConfig, ModelError};
pub(crate) use keys::Keys;
pub(crate) use layout::Layout;
pub use published::published;
use serde_json::{Map, Value};
pub(crate) use tensor_map::group_by_file;
pub use tensor_map::{TensorMap, View};
pub(crate) use tensors::{matrix, norm, part, vector};

/// One published family.
#[derive(Clone, Copy)]
pub struct Family {
    /// Its name, as [`ModelConfig::family`] holds it: the `model_type` it writes.
    pub name: &'static str,
    /// The `model_type`s it reads.
    pub model_types: &'static [&'static str],
    /// The class that transformers names in `architectures`.
    pub architecture: &'static str,
    read: fn(&Keys) -> Result<ModelConfig, ModelError>,
    write: fn(&ModelConfig) -> Map<String, Value>,
    tensors: fn(&ModelConfig) -> Vec<TensorMap>,
}

/// All families, in the order of their names.
pub fn all() -> &'static [Family] {
    &[
        dbrx::FAMILY,
        deepseek_v2::FAMILY,
        deepseek_v3::FAMILY,
        dots1::FAMILY,
        ernie4_5_moe::FAMILY,
        flex_olmo::FAMILY,
        glm4_moe::FAMILY,
        glm4_moe_lite::FAMILY,
        gpt_oss::FAMILY,
        granitemoe::FAMILY,
        granitemoeshared::FAMILY,
        grok::FAMILY,
        hunyuan_v1_moe::FAMILY,
        jamba::FAMILY,
        jetmoe::FAMILY,
        lfm2_moe::FAMILY,
        llama::FAMILY,
        llama4_text::FAMILY,
        minimax_m2::FAMILY,
        mistral::FAMILY,
        mixtral::FAMILY,
        moebius::FAMILY,
        olmoe::FAMILY,
        phimoe::FAMILY,
        qwen2::FAMILY,
        qwen2_moe::FAMILY,
        qwen3::FAMILY,
        qwen3_5_moe::FAMILY,
        qwen3_moe::FAMILY,
        qwen3_next::FAMILY,
    ]
}

/// The family of that name or `model_type`.
pub fn find(model_type: &str) -> Option<&'static Family> {
    all().iter().find(|family| family.model_types.contains(&model_type))
}

/// Reads a `config.json`; `file` is its name for errors. Of a model that sees images too, the text model's.
///
/// # Errors
/// Text that is no JSON object, an unknown family, keys missing, of a wrong type, out of range, contradictory, or that
/// ask for arithmetic we lack.
pub fn read_config(bytes: &[u8], file: &str) -> Result<ModelConfig, ModelError> {
    read_with_layout(bytes, file).map(|(config, _)| config)
}

/// As [`read_config`], and how the files beside it hold its tensors.
pub(crate) fn read_with_layout(bytes: &[u8], file: &str) -> Result<(ModelConfig, Layout), ModelError> {
    let value: Value =
        serde_json::from_slice(bytes).map_err(|error| ModelError::file(file, format!("wanted JSON: {error}")))?;
    let Value::Object(whole) = value else {
        return Err(ModelError::file(file, "wanted a JSON object"));
    };
    let (mut map, mut layout) = layout::text_model(&Keys::new(file, &whole), whole.clone())?;
    layout.read_quantisation(file, &mut map)?;
    let keys = Keys::new(file, &map);
    let model_type = keys.text("model_type")?;
    let Some(family) = find(model_type) else {
        let known: Vec<&str> = all().iter().flat_map(|family| family.model_types).copied().collect();
        let message = format!("family `{model_type}` is not known; known are {}", known.join(", "));
        return Err(ModelError::config(file, "model_type", message));
    };
    let config = (family.read)(&keys)?;
    config.validate().map_err(|(key, message)| ModelError::config(file, key, message))?;
    layout.read_predictors(&keys, &config)?;
    Ok((config, layout))
}

/// A configuration as its family's `config.json`, with the dtype of the weights beside it.
pub fn write_config(config: &ModelConfig, dtype: &str) -> Value {
    let family = of(config);
    let mut map = (family.write)(config);
    map.insert("architectures".into(), vec![family.architecture].into());
    map.insert("model_type".into(), family.name.into());
    map.insert("torch_dtype".into(), dtype.into());
    Value::Object(map)
}

/// Every tensor of a checkpoint of this configuration.
pub fn tensors(config: &ModelConfig) -> Vec<TensorMap> {
    (of(config).tensors)(config)
}

fn of(config: &ModelConfig) -> &'static Family {
    find(&config.family).unwrap_or_else(|| panic!("a configuration names a known family, found `{}`", config.family))
}

#[cfg(test)]
mod tests;
