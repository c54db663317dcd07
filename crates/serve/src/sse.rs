//! Server-sent events (<https://html.spec.whatwg.org/multipage/server-sent-events.html>): answers that arrive while they are
//! written.

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::Value;

use crate::error::ApiError;
use crate::parts::generation::Running;
use moebius_engine::scheduler::News;

/// Turns news into events.
pub trait Events: Send + 'static {
    /// Events for news that arrived together.
    fn events(&mut self, news: Vec<(usize, News)>) -> Vec<Event>;

    /// The last events, after all news.
    fn last(&mut self) -> Vec<Event>;

    /// The event for a failure in the middle.
    fn failure(&mut self, error: &ApiError) -> Vec<Event> {
        vec![Event::data(&error.object())]
    }
}

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event(String);

impl Event {
    /// An event without a name.
    pub fn data(value: &Value) -> Self {
        Self(format!("data: {value}\n\n"))
    }

    /// An event with a name.
    pub fn named(name: &str, value: &Value) -> Self {
        Self(format!("event: {name}\ndata: {value}\n\n"))
    }

    /// How OpenAI's streams end.
    pub fn done() -> Self {
        Self("data: [DONE]\n\n".into())
    }
}

/// The answer that streams what a request's sequences tell.
pub fn stream_events(running: Running, events: impl Events) -> Response {
    let state = Some((running, events));
    let parts = stream::unfold(state, |state| async move {
        let (mut running, mut events) = state?;
        let (text, go_on) = next(&mut running, &mut events).await;
        let bytes: Result<Bytes, std::convert::Infallible> = Ok(text.into());
        Some((bytes, go_on.then_some((running, events))))
    });
    let mut response = Body::from_stream(parts).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies in between must not collect the stream.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// The next events as text, and whether more follow.
async fn next(running: &mut Running, events: &mut impl Events) -> (String, bool) {
    loop {
        let mut made = Vec::new();
        let go_on = match collect(running).await {
            Ok(news) if news.is_empty() => {
                made.extend(events.last());
                false
            }
            Ok(news) => {
                made.extend(events.events(news));
                true
            }
            Err(error) => {
                tracing::warn!(error = %error.object()["error"]["message"], "a stream broke off");
                made.extend(events.failure(&error));
                false
            }
        };
        let text: String = made.into_iter().map(|event| event.0).collect();
        if !text.is_empty() || !go_on {
            return (text, go_on);
        }
    }
}

/// Waits for news and takes what else is there.
async fn collect(running: &mut Running) -> Result<Vec<(usize, News)>, ApiError> {
    let mut all = Vec::new();
    if let Some(first) = running.next().await? {
        all.push(first);
        while let Some(more) = running.next_now()? {
            all.push(more);
        }
    }
    Ok(all)
}
