//! What a request hears when it fails: OpenAI's error object, with the right status.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use moebius_engine::EngineError;
use moebius_engine::scheduler::{Dropped, Refusal};
use serde_json::{Value, json};

/// A failed request.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    /// The field of the request at fault.
    param: Option<String>,
    code: Option<&'static str>,
    /// Seconds after which to try again.
    retry_after: Option<u64>,
    /// The methods that would do, for 405.
    allow: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry_after: None, allow: None }
    }

    /// The request is wrong in a way that names no field.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// A field is wrong.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), code: Some("invalid_value"), ..Self::bad_request(message) }
    }

    /// A field asks for what this server or model does not do.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::invalid(param, message) }
    }

    /// No such model.
    pub fn no_model(name: &str) -> Self {
        let message = format!("The model `{name}` does not exist or you do not have access to it.");
        Self { param: Some("model".into()), code: Some("model_not_found"), ..Self::new(StatusCode::NOT_FOUND, message) }
    }

    /// No such address.
    pub fn no_route(method: &str, path: &str) -> Self {
        Self {
            code: Some("unknown_url"),
            ..Self::new(StatusCode::NOT_FOUND, format!("Unknown request URL: {method} {path}."))
        }
    }

    /// The address has other methods.
    pub fn wrong_method(method: &str, path: &str, allow: Option<String>) -> Self {
        let message = format!("Not allowed to {method} on {path}.");
        Self { allow, code: Some("method_not_allowed"), ..Self::new(StatusCode::METHOD_NOT_ALLOWED, message) }
    }

    /// No key, or a wrong one.
    pub fn unauthorized(message: &str) -> Self {
        Self { code: Some("invalid_api_key"), ..Self::new(StatusCode::UNAUTHORIZED, message) }
    }

    /// A body larger than allowed.
    pub fn too_large(limit: usize) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, format!("The request body is larger than the {limit} bytes allowed."))
    }

    /// A body of another kind.
    pub fn not_json() -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Wanted a body of type application/json.")
    }

    /// A body that takes too long to arrive.
    pub fn too_slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "The request body did not arrive in time.")
    }

    /// Our own fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// What OpenAI's error types call the status.
    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The error object.
    pub fn object(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind(), "param": self.param, "code": self.code}})
    }

    /// What Anthropic's API makes of it.
    pub fn anthropic_object(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            status if status.is_server_error() => "api_error",
            _ => "invalid_request_error",
        };
        json!({"type": "error", "error": {"type": kind, "message": self.message}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let object = self.object();
        respond(self, object)
    }
}

/// The same in Anthropic's form.
pub struct AnthropicError(pub ApiError);

impl IntoResponse for AnthropicError {
    fn into_response(self) -> Response {
        let object = self.0.anthropic_object();
        respond(self.0, object)
    }
}

fn respond(error: ApiError, object: Value) -> Response {
    if error.status.is_server_error() {
        tracing::error!(status = error.status.as_u16(), message = %error.message, "request failed");
    }
    let mut response = (error.status, Json(object)).into_response();
    let headers = response.headers_mut();
    if let Some(seconds) = error.retry_after {
        headers.insert(header::RETRY_AFTER, seconds.into());
    }
    if let Some(allow) = error.allow.and_then(|allow| HeaderValue::from_str(&allow).ok()) {
        headers.insert(header::ALLOW, allow);
    }
    if error.status == StatusCode::UNAUTHORIZED {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::PromptTooLong { .. } => {
                Self { code: Some("context_length_exceeded"), ..Self::invalid("messages", message) }
            }
            EngineError::CacheTooSmall { .. } | EngineError::EmptyPrompt | EngineError::Model(_) => {
                Self::bad_request(message)
            }
            EngineError::Sampling { option, .. } => Self::invalid(option.replace([' ', '-'], "_"), message),
            EngineError::Grammar { .. } => Self::invalid("response_format", message),
            EngineError::Template { .. } => Self::invalid("messages", message),
            EngineError::Tokenize { .. } => Self::bad_request(message),
            _ => Self::internal(message),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::Full { retry_after, .. } => Self {
                retry_after: Some(retry_after.as_secs().max(1)),
                code: Some("rate_limit_exceeded"),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, message)
            },
            Refusal::ShuttingDown => Self::from(Dropped::ShuttingDown),
            Refusal::Impossible(error) => error.into(),
        }
    }
}

impl From<Dropped> for ApiError {
    fn from(dropped: Dropped) -> Self {
        let message = match dropped {
            Dropped::WaitedTooLong => "The server is overloaded: the request waited as long as is allowed.",
            Dropped::ShuttingDown => "The server is shutting down.",
        };
        Self { retry_after: Some(10), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }
}
