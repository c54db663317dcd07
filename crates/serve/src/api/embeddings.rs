//! `POST /v1/embeddings`: a text as one vector, of length one.

use axum::extract::State;
use axum::{Extension, Json};
use base64::Engine;
use moebius_engine::scheduler::{Pooling, Task};
use serde::Deserialize;
use serde_json::{Value, json};

use super::completions::Prompt;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::parts::generation::{Caller, Running};
use crate::parts::sampling::Ignored;
use crate::state::App;

/// What is asked.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingRequest {
    model: String,
    input: Prompt,
    encoding_format: Option<Encoding>,
    dimensions: Option<usize>,
    /// Extension: how the hidden states become one vector.
    pooling: Option<PoolingField>,
    #[allow(dead_code)]
    user: Ignored,
}

/// How a vector is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    #[default]
    Float,
    Base64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum PoolingField {
    Mean,
    Last,
}

/// Answers a request.
pub async fn answer(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    JsonBody(request): JsonBody<EmbeddingRequest>,
) -> Result<Json<Value>, ApiError> {
    app.check_model(&request.model)?;
    let hidden = app.card.hidden;
    if let Some(found) = request.dimensions.filter(|&found| found != hidden) {
        let message = format!("Invalid 'dimensions': this model's vectors have {hidden} numbers, found {found}.");
        return Err(ApiError::invalid("dimensions", message));
    }
    let prompts = request.input.tokens(&app, "input").await?;
    if prompts.iter().any(Vec::is_empty) || prompts.is_empty() {
        return Err(ApiError::invalid("input", "Invalid 'input': wanted texts of at least one token."));
    }
    let pooling = match request.pooling {
        None | Some(PoolingField::Mean) => Pooling::Mean,
        Some(PoolingField::Last) => Pooling::Last,
    };
    let count = prompts.len();
    let tasks = prompts.into_iter().map(|prompt| (prompt, Task::Embed(pooling))).collect();
    let all = Running::submit(&app, caller, tasks).await?.collect(count).await?;
    let tokens: usize = all.iter().filter_map(|one| one.outcome.as_ref()).map(|outcome| outcome.prompt_tokens).sum();
    let data = all.iter().enumerate().map(|(index, one)| {
        let vector = normed(&one.embedding);
        let embedding = match request.encoding_format.unwrap_or_default() {
            Encoding::Float => json!(vector),
            Encoding::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                base64::engine::general_purpose::STANDARD.encode(bytes).into()
            }
        };
        json!({"object": "embedding", "index": index, "embedding": embedding})
    });
    Ok(Json(json!({
        "object": "list",
        "model": app.card.name,
        "data": data.collect::<Vec<_>>(),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    })))
}

/// The vector divided by its length.
fn normed(vector: &[f32]) -> Vec<f32> {
    let length = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    vector.iter().map(|&x| if length > 0.0 { (f64::from(x) / length) as f32 } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_of_length_one() {
        assert_eq!(normed(&[3.0, -4.0]), [0.6, -0.8]);
        assert_eq!(normed(&[0.0, 0.0]), [0.0, 0.0]);
    }
}
