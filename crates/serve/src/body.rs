//! Request bodies: JSON within limits of size and time, with errors that name the field.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::header;
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use crate::error::ApiError;
use crate::state::App;

/// A JSON body of a type that says which fields there are.
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        // Clients that name no type are taken at their word.
        if !kind.is_none_or(is_json) {
            return Err(ApiError::not_json());
        }
        let (limit, time) = (app.options.most_body_bytes, app.options.body_timeout);
        let bytes = read(request.into_body(), limit, time).await?;
        parse(&bytes).map(Self)
    }
}

fn is_json(kind: &str) -> bool {
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

async fn read(body: Body, limit: usize, time: Duration) -> Result<Bytes, ApiError> {
    let read = async {
        let mut parts = body.into_data_stream();
        let mut all = Vec::new();
        while let Some(part) = parts.next().await {
            let part = part.map_err(|error| ApiError::bad_request(format!("The request body broke off: {error}")))?;
            if all.len() + part.len() > limit {
                return Err(ApiError::too_large(limit));
            }
            all.extend_from_slice(&part);
        }
        Ok(Bytes::from(all))
    };
    tokio::time::timeout(time, read).await.unwrap_or_else(|_| Err(ApiError::too_slow()))
}

/// Reads JSON; an error names the field.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let (path, reason) = (error.path().to_string(), error.into_inner());
        if reason.is_data() {
            let mut message = reason.to_string();
            if let Some(name) = unknown_field(&message) {
                let at = if path == "." || path == name { name.clone() } else { path };
                return ApiError::invalid(at, format!("Unrecognized request argument supplied: {name}"));
            }
            message.truncate(message.find(" at line ").unwrap_or(message.len()));
            return match &path[..] {
                "." => ApiError::bad_request(message),
                _ => ApiError::invalid(path.clone(), format!("Invalid `{path}`: {message}")),
            };
        }
        ApiError::bad_request(format!("We could not parse the JSON body of your request: {reason}"))
    })?;
    json.end()
        .map_err(|error| ApiError::bad_request(format!("We could not parse the JSON body of your request: {error}")))?;
    Ok(value)
}

/// The name in serde's message of an unknown field.
fn unknown_field(message: &str) -> Option<String> {
    let rest = message.strip_prefix("unknown field `")?;
    Some(rest.split('`').next()?.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        inner: Inner,
    }

    #[derive(Debug, Deserialize)]
    struct Inner {
        number: u8,
    }

    #[test]
    fn errors_name_the_field() {
        let object = |text: &str| parse::<Outer>(text.as_bytes()).unwrap_err().object()["error"].clone();
        let unknown = object(r#"{"inner": {"number": 1}, "other": 2}"#);
        assert_eq!(
            (&unknown["param"], &unknown["message"]),
            (&"other".into(), &"Unrecognized request argument supplied: other".into())
        );
        assert_eq!(object(r#"{"inner": {"number": 300}}"#)["param"], "inner.number");
        assert_eq!(object(r#"{"inner": {"number": "x"}}"#)["param"], "inner.number");
        assert!(object("{}")["message"].as_str().unwrap().contains("inner"));
        for broken in ["", "{", "[1", "{\"inner\": {\"number\": 1}} 2", "\"\\ud800\""] {
            assert_eq!(object(broken)["type"], "invalid_request_error", "{broken}");
        }
        assert!(parse::<Outer>(b"{\"inner\": \xff}").is_err());
        assert!(parse::<Outer>("[".repeat(100_000).as_bytes()).is_err());
        assert_eq!(parse::<Outer>(br#"{"inner": {"number": 7}}"#).unwrap().inner.number, 7);
    }

    #[test]
    fn json_by_its_names() {
        assert!(is_json("application/json; charset=utf-8") && is_json("Application/JSON"));
        assert!(!is_json("text/plain") && !is_json("application/x-www-form-urlencoded"));
    }
}
