//! `POST /tokenize` and `POST /detokenize`.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::body::JsonBody;
use crate::error::ApiError;
use crate::parts::prompt::{Chat, blocking};
use crate::parts::sampling::Ignored;
use crate::state::App;

/// What is to become tokens: a text, or a conversation.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
    #[allow(dead_code)]
    add_generation_prompt: Ignored,
}

/// The tokens of a text.
pub async fn tokenize(
    State(app): State<App>,
    JsonBody(request): JsonBody<TokenizeRequest>,
) -> Result<Json<Value>, ApiError> {
    request.model.as_deref().map_or(Ok(()), |name| app.check_model(name))?;
    let tokens = match (request.prompt, request.messages) {
        (Some(text), None) => app.encode(text, request.add_special_tokens.unwrap_or(true)).await?,
        (None, Some(messages)) => app.render(Chat { messages, variables: Map::new(), tools: Vec::new() }).await?.tokens,
        _ => return Err(ApiError::invalid("prompt", "Wanted either 'prompt' or 'messages'.")),
    };
    let texts = request.return_token_strs.unwrap_or(false);
    let texts = texts.then(|| tokens.iter().map(|&token| app.token_text(token)).collect::<Vec<_>>());
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": app.card.context,
        "tokens": tokens,
        "token_strs": texts,
    })))
}

/// Tokens that are to become a text.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// The text of tokens, special ones by their names.
pub async fn detokenize(
    State(app): State<App>,
    JsonBody(request): JsonBody<DetokenizeRequest>,
) -> Result<Json<Value>, ApiError> {
    request.model.as_deref().map_or(Ok(()), |name| app.check_model(name))?;
    if let Some(token) = request.tokens.iter().find(|&&token| token as usize >= app.card.vocab) {
        let message = format!("Invalid 'tokens': wanted ids below {}, found {token}.", app.card.vocab);
        return Err(ApiError::invalid("tokens", message));
    }
    let text = blocking(move || Ok(app.tokenizer.decode_with_special(&request.tokens)?)).await?;
    Ok(Json(json!({"prompt": text})))
}
