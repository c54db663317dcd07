//! The addresses, and what happens around every request: an id, a key, who may call from a browser, a line in the log.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use axum::Router;
use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::json;
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use crate::api::{chat, completions, embeddings, messages, models, moebius, openapi, responses, tokens};
use crate::error::ApiError;
use crate::parts::generation::Caller;
use crate::state::App;
use crate::{metrics, page};

/// The header of a request's id.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A longer id is replaced by one of ours.
const LONGEST_ID: usize = 128;

/// All routes.
pub fn router(app: App) -> Router {
    let guarded = Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{model}", get(models::one))
        .route("/v1/chat/completions", post(chat::answer))
        .route("/v1/completions", post(completions::answer))
        .route("/v1/embeddings", post(embeddings::answer))
        .route("/v1/messages", post(messages::answer))
        .route("/v1/messages/count_tokens", post(messages::count))
        .route("/v1/responses", post(responses::answer))
        .route("/v1/moebius/model", get(moebius::model))
        .route("/v1/moebius/stats", get(moebius::stats))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/metrics", get(metrics::answer))
        .route_layer(from_fn_with_state(app.clone(), check_key));
    let open = Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/openapi.json", get(openapi::document))
        .merge(page::routes());
    let cors = cors(&app);
    let router = guarded
        .merge(open)
        .fallback(no_route)
        .method_not_allowed_fallback(no_route)
        .layer(from_fn_with_state(app.clone(), around))
        .with_state(app);
    match cors {
        Some(cors) => router.layer(cors),
        None => router,
    }
}

/// Who may call from a browser besides the server's own page.
fn cors(app: &App) -> Option<CorsLayer> {
    let origins = &app.options.allowed_origins;
    if origins.is_empty() {
        return None;
    }
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(Any)
        .expose_headers([REQUEST_ID, header::RETRY_AFTER]);
    if origins.iter().any(|origin| origin == "*") {
        return Some(layer.allow_origin(Any));
    }
    let origins: Vec<HeaderValue> = origins.iter().filter_map(|origin| origin.parse().ok()).collect();
    Some(layer.allow_origin(AllowOrigin::list(origins)))
}

/// The process lives.
async fn health() -> Response {
    axum::Json(json!({"status": "ok"})).into_response()
}

/// Requests are taken.
async fn ready(State(app): State<App>) -> Result<Response, ApiError> {
    if app.scheduler.is_stopping() {
        return Err(moebius_engine::scheduler::Dropped::ShuttingDown.into());
    }
    Ok(axum::Json(json!({"status": "ready"})).into_response())
}

async fn no_route(request: Request) -> ApiError {
    let (method, path) = (request.method().as_str(), request.uri().path());
    match request.extensions().get::<MatchedPath>() {
        Some(_) => ApiError::wrong_method(method, path, None),
        None => ApiError::no_route(method, path),
    }
}

/// Asks for a key and notes who it is.
async fn check_key(State(app): State<App>, mut request: Request, next: Next) -> Result<Response, ApiError> {
    let key = app.keys.check(request.headers())? as u64;
    // Without keys, clients are told apart by where they call from.
    let client = if app.keys.are_wanted() { key } else { address(&request).map_or(0, number) };
    request.extensions_mut().insert(Caller { tenant: key, client });
    Ok(next.run(request).await)
}

fn address(request: &Request) -> Option<IpAddr> {
    request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip())
}

fn number(address: IpAddr) -> u64 {
    let all = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    (all >> 64) as u64 ^ all as u64
}

/// Around every request: id, time, metrics, log.
async fn around(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let given = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok());
    let fits = |id: &&str| (1..=LONGEST_ID).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic());
    let id = given.filter(fits).map_or_else(|| app.new_id("req-"), str::to_string);
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_string();
    let (method, from) = (request.method().clone(), address(&request));
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    let (status, seconds) = (response.status().as_u16(), started.elapsed().as_secs_f64());
    app.metrics.answered(&route, status, seconds);
    tracing::info!(request_id = %id, %method, route, status, seconds, from = from.map(tracing::field::display), "request");
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// A request's id.
#[derive(Clone, Debug)]
pub struct RequestId(pub String);
