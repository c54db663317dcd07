//! `GET /openapi.json`: the interface as a document (OpenAPI 3.1), with every status that an answer may have.

mod schemas;

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};

use crate::state::App;

/// The document.
pub async fn document(State(app): State<App>) -> Json<Value> {
    Json(make(&app.card.name, app.keys.are_wanted()))
}

/// What a route is about.
struct Operation {
    path: &'static str,
    method: &'static str,
    id: &'static str,
    summary: &'static str,
    /// The schema of its body, if it takes one.
    body: Option<&'static str>,
    /// The kinds of a good answer.
    answers: &'static [&'static str],
    /// Whether it may ask for a key.
    guarded: bool,
}

const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";
const TEXT: &str = "text/plain";

const OPERATIONS: [Operation; 18] = [
    get("/v1/models", "listModels", "The models: one", true),
    get("/v1/models/{model}", "retrieveModel", "One model", true),
    post("/v1/chat/completions", "createChatCompletion", "Answers a conversation", "ChatRequest", &[JSON, EVENTS]),
    post("/v1/completions", "createCompletion", "Writes on from a text", "CompletionRequest", &[JSON, EVENTS]),
    post("/v1/responses", "createResponse", "Answers a conversation", "ResponsesRequest", &[JSON, EVENTS]),
    post("/v1/embeddings", "createEmbedding", "A text as a vector", "EmbeddingRequest", &[JSON]),
    post(
        "/v1/messages",
        "createMessage",
        "Answers a conversation, Anthropic's interface",
        "MessagesRequest",
        &[JSON, EVENTS],
    ),
    post("/v1/messages/count_tokens", "countTokens", "Tokens of a conversation", "CountRequest", &[JSON]),
    post("/tokenize", "tokenize", "The tokens of a text or conversation", "TokenizeRequest", &[JSON]),
    post("/detokenize", "detokenize", "The text of tokens", "DetokenizeRequest", &[JSON]),
    get("/v1/moebius/model", "describeModel", "Facts about the model", true),
    get("/v1/moebius/stats", "statistics", "Load, cache, experts", true),
    Operation { answers: &[TEXT], ..get("/metrics", "metrics", "Metrics for Prometheus", true) },
    get("/health", "health", "The process lives", false),
    get("/ready", "ready", "Requests are taken", false),
    get("/openapi.json", "openapi", "This document", false),
    Operation { answers: &["text/html"], ..get("/", "page", "The page", false) },
    Operation {
        answers: &["text/css", "text/javascript", "image/svg+xml"],
        ..get("/assets/{name}", "asset", "A file of the page", false)
    },
];

const fn get(path: &'static str, id: &'static str, summary: &'static str, guarded: bool) -> Operation {
    Operation { path, method: "get", id, summary, body: None, answers: &[JSON], guarded }
}

const fn post(
    path: &'static str,
    id: &'static str,
    summary: &'static str,
    body: &'static str,
    answers: &'static [&'static str],
) -> Operation {
    Operation { path, method: "post", id, summary, body: Some(body), answers, guarded: true }
}

/// The document for a model of a name.
fn make(model: &str, keys: bool) -> Value {
    let mut paths = Map::new();
    for operation in &OPERATIONS {
        let entry = paths.entry(operation.path).or_insert_with(|| json!({}));
        entry[operation.method] = describe(operation, keys);
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Moebius",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "OpenAI's interface for a mixture-of-experts model, with its routing as an extension.",
        },
        "paths": paths,
        "components": {"schemas": schemas::all(model)},
    });
    if keys {
        document["components"]["securitySchemes"] = json!({"key": {"type": "http", "scheme": "bearer"}});
    }
    document
}

fn describe(operation: &Operation, keys: bool) -> Value {
    let content: Map<String, Value> = operation
        .answers
        .iter()
        .map(|&kind| {
            // An event stream has no schema: it is neither a value nor a text that a client would take whole.
            let media = match kind {
                EVENTS => json!({}),
                JSON => json!({"schema": {"type": "object"}}),
                _ => json!({"schema": {"type": "string"}}),
            };
            (kind.to_string(), media)
        })
        .collect();
    let mut responses = failures(operation, keys);
    responses.insert("200".into(), json!({"description": "The answer", "content": content}));
    let mut described = json!({"operationId": operation.id, "summary": operation.summary, "responses": responses});
    if let Some(body) = operation.body {
        let schema = json!({"$ref": format!("#/components/schemas/{body}")});
        described["requestBody"] = json!({"required": true, "content": {JSON: {"schema": schema}}});
    }
    if let Some(name) = operation.path.split_once('{').and_then(|(_, rest)| rest.split('}').next()) {
        described["parameters"] = json!([{"name": name, "in": "path", "required": true, "schema": {"type": "string"}}]);
    }
    if operation.guarded && keys {
        described["security"] = json!([{"key": []}]);
    }
    described
}

/// The failures that an operation may answer with.
fn failures(operation: &Operation, keys: bool) -> Map<String, Value> {
    let mut responses = Map::new();
    let mut fail = |status: &str, description: &str| {
        let schema = json!({"$ref": "#/components/schemas/Error"});
        let mut answer = json!({"description": description, "content": {JSON: {"schema": schema}}});
        if ["429", "503"].contains(&status) {
            let header = json!({"description": "Seconds", "schema": {"type": "integer"}});
            answer["headers"] = json!({"Retry-After": header});
        }
        responses.insert(status.into(), answer);
    };
    if operation.guarded && keys {
        fail("401", "No key, or a wrong one");
    }
    if operation.path.contains('{') || operation.body.is_some() {
        fail("404", "No such model or file");
    }
    if operation.path.contains('{') {
        fail("400", "A path that cannot be read");
    }
    if operation.body.is_some() {
        fail("400", "A request that is wrong, with the field at fault");
        fail("408", "A body that did not arrive in time");
        fail("413", "A body larger than allowed");
        fail("415", "A body that is no JSON");
        fail("429", "Too many requests wait");
        fail("500", "A fault of the server");
        fail("503", "The request waited too long, or the server ends");
    }
    if operation.path == "/ready" {
        fail("503", "The server ends");
    }
    responses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_leads_somewhere() {
        let document = make("m", true);
        let text = document.to_string();
        for part in text.split("\"#/components/schemas/").skip(1) {
            let name = part.split('"').next().unwrap();
            assert!(document["components"]["schemas"][name].is_object(), "{name}");
        }
        assert_eq!(document["paths"].as_object().unwrap().len(), OPERATIONS.len());
        assert!(make("m", false)["paths"]["/v1/models"]["get"]["responses"]["401"].is_null());
    }
}
