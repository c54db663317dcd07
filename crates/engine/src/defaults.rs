//! What a model's `generation_config.json` says: its end tokens and the sampling options its makers advise.

use serde_json::Value;

use crate::EngineError;

/// The options that stand in a `generation_config.json`; absent ones are `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a text.
    pub end_tokens: Vec<u32>,
    /// Advised temperature; 0 where the file says `"do_sample": false`.
    pub temperature: Option<f32>,
    /// Advised top-k.
    pub top_k: Option<usize>,
    /// Advised top-p.
    pub top_p: Option<f32>,
    /// Advised min-p.
    pub min_p: Option<f32>,
    /// Advised repetition penalty.
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// Reads the file's bytes, or those of a `config.json`, which older models keep their end token in. Keys that are
    /// not about sampling are left alone.
    ///
    /// # Errors
    /// [`EngineError::GenerationConfig`] names `file`, the key, what was wanted and what was found.
    pub fn from_json(bytes: &[u8], file: &str) -> Result<Self, EngineError> {
        let wrong = |key: &str, wanted, found: String| EngineError::GenerationConfig {
            file: file.to_string(),
            key: key.to_string(),
            wanted,
            found,
        };
        let json: Value =
            serde_json::from_slice(bytes).map_err(|error| wrong("(the whole file)", "JSON", error.to_string()))?;
        let number = |key: &str| match &json[key] {
            Value::Null => Ok(None),
            value => match value.as_f64() {
                Some(number) => Ok(Some(number as f32)),
                None => Err(wrong(key, "a number", value.to_string())),
            },
        };
        let top_k = match &json["top_k"] {
            Value::Null => None,
            value => Some(value.as_u64().ok_or_else(|| wrong("top_k", "a whole number", value.to_string()))? as usize),
        };
        let greedy = json["do_sample"] == Value::Bool(false) && json["temperature"].is_null();
        let token = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| wrong("eos_token_id", "a token id or a list of them", json["eos_token_id"].to_string()))
        };
        let end_tokens = match &json["eos_token_id"] {
            Value::Null => Vec::new(),
            Value::Array(ids) => ids.iter().map(token).collect::<Result<_, _>>()?,
            id => vec![token(id)?],
        };
        Ok(Self {
            end_tokens,
            temperature: if greedy { Some(0.0) } else { number("temperature")? },
            top_k,
            top_p: number("top_p")?,
            min_p: number("min_p")?,
            repetition_penalty: number("repetition_penalty")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_models_ship() {
        let read = |text: &str| GenerationDefaults::from_json(text.as_bytes(), "generation_config.json");
        let one = read(r#"{"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4"}"#).unwrap();
        assert_eq!(one, GenerationDefaults { end_tokens: vec![2], ..Default::default() });
        let many =
            read(r#"{"eos_token_id": [2, 7], "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.9}"#);
        let many = many.unwrap();
        assert_eq!((many.end_tokens, many.temperature, many.top_k), (vec![2, 7], Some(0.6), Some(20)));
        assert_eq!(read(r#"{"do_sample": false}"#).unwrap().temperature, Some(0.0));
        for (text, key) in [
            ("{", "whole file"),
            (r#"{"eos_token_id": "end"}"#, "eos_token_id"),
            (r#"{"eos_token_id": [-1]}"#, "eos_token_id"),
            (r#"{"temperature": true}"#, "temperature"),
            (r#"{"top_k": 1.5}"#, "top_k"),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.starts_with("generation_config.json: ") && message.contains(key), "{message}");
        }
    }
}
