//! `GET /v1/models` and `GET /v1/models/{model}`.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::state::App;

impl App {
    /// An error unless a request names this server's model.
    ///
    /// # Errors
    /// 404.
    pub fn check_model(&self, name: &str) -> Result<(), ApiError> {
        if name == self.card.name { Ok(()) } else { Err(ApiError::no_model(name)) }
    }

    fn model_object(&self) -> Value {
        json!({
            "id": self.card.name,
            "object": "model",
            "created": self.created,
            "owned_by": "moebius",
            "max_model_len": self.card.context,
        })
    }
}

/// The list of models: one.
pub async fn list(State(app): State<App>) -> Json<Value> {
    Json(json!({"object": "list", "data": [app.model_object()]}))
}

/// One model.
pub async fn one(State(app): State<App>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    app.check_model(&name)?;
    Ok(Json(app.model_object()))
}
