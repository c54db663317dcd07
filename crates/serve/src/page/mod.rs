//! The page at `/`: a conversation, and a view of which experts each token went through.
//!
//! Plain HTML, CSS and JavaScript without a build step, compiled into the binary. The policy that goes with every file
//! lets the page load and call nothing but this server, and lets no script turn text into HTML.

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::error::ApiError;

/// What the browser may do with the page (<https://www.w3.org/TR/CSP3/>): files and calls from here only, no inline
/// script or style, no frames around it, no HTML from strings.
pub const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
     require-trusted-types-for 'script'; trusted-types 'none'";

/// A file of the page.
#[derive(Clone, Copy, Debug)]
pub struct Asset {
    /// Its name below `/assets/`.
    pub name: &'static str,
    /// Its MIME type.
    pub content_type: &'static str,
    /// Its text.
    pub text: &'static str,
}

const HTML: &str = "text/html; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const IMAGE: &str = "image/svg+xml";

macro_rules! assets {
    ($($name:literal: $content_type:expr),* $(,)?) => {
        &[$(Asset { name: $name, content_type: $content_type, text: include_str!($name) }),*]
    };
}

/// All files, the document first.
pub const ASSETS: &[Asset] = assets![
    "index.html": HTML,
    "style.css": STYLE,
    "icon.svg": IMAGE,
    "main.js": SCRIPT,
    "api.js": SCRIPT,
    "charts.js": SCRIPT,
    "conversation.js": SCRIPT,
    "dom.js": SCRIPT,
    "markdown.js": SCRIPT,
    "server.js": SCRIPT,
    "settings.js": SCRIPT,
    "tokens.js": SCRIPT,
];

/// The routes `GET /` and `GET /assets/NAME`. They need no API key: they hold nothing of the model or its users.
pub fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", get(async || serve(&ASSETS[0])))
        .route("/assets/{name}", get(async |Path(name): Path<String>| find(&name)))
}

fn find(name: &str) -> Response {
    match ASSETS.iter().skip(1).find(|asset| asset.name == name) {
        Some(asset) => serve(asset),
        None => ApiError::no_route("GET", &format!("/assets/{name}")).into_response(),
    }
}

fn serve(asset: &Asset) -> Response {
    let headers = [
        (header::CONTENT_TYPE, asset.content_type),
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // A new version of the server brings new files: ask each time.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers.map(|(name, value)| (name, HeaderValue::from_static(value))), asset.text).into_response()
}

#[cfg(test)]
mod tests;
