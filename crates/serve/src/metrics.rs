//! `GET /metrics`: what Prometheus reads. The number of series does not depend on what is asked: routes, statuses and
//! layers are few, and experts stand one by one only in small models.

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus::core::Collector;
use prometheus::{
    Counter, CounterVec, Encoder, Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder,
};

use crate::api::moebius::sizes;
use crate::error::ApiError;
use crate::state::App;

/// Counters of requests.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    seconds: HistogramVec,
    /// Connections that are open.
    pub connections: IntGauge,
}

impl Metrics {
    /// Nothing counted yet.
    pub fn new() -> Self {
        let registry = Registry::new();
        let requests = Opts::new("moebius_http_requests_total", "Requests by route and status.");
        let requests = IntCounterVec::new(requests, &["route", "status"]).expect("a sound name");
        let seconds = HistogramOpts::new("moebius_http_request_seconds", "Time until the answer's head, by route.")
            .buckets(vec![0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0]);
        let seconds = HistogramVec::new(seconds, &["route"]).expect("a sound name");
        let connections =
            IntGauge::new("moebius_http_connections", "Connections that are open.").expect("a sound name");
        add(&registry, requests.clone());
        add(&registry, seconds.clone());
        add(&registry, connections.clone());
        Self { registry, requests, seconds, connections }
    }

    /// Counts an answer.
    pub fn answered(&self, route: &str, status: u16, seconds: f64) {
        self.requests.with_label_values(&[route, &status.to_string()]).inc();
        self.seconds.with_label_values(&[route]).observe(seconds);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn add(registry: &Registry, collector: impl Collector + 'static) {
    registry.register(Box::new(collector)).expect("each name once");
}

/// One number.
fn number(registry: &Registry, name: &str, help: &str, value: f64) {
    if name.ends_with("_total") {
        let counter = Counter::new(name, help).expect("a sound name");
        counter.inc_by(value);
        return add(registry, counter);
    }
    let gauge = Gauge::new(name, help).expect("a sound name");
    gauge.set(value);
    add(registry, gauge);
}

/// The metrics as text.
///
/// # Errors
/// 500 where they cannot be written.
pub async fn answer(State(app): State<App>) -> Result<Response, ApiError> {
    let registry = Registry::new();
    numbers(&app, &registry);
    experts(&app, &registry);
    let mut families = app.metrics.registry.gather();
    families.extend(registry.gather());
    let mut text = Vec::new();
    let encoder = TextEncoder::new();
    encoder.encode(&families, &mut text).map_err(|error| ApiError::internal(format!("metrics: {error}")))?;
    Ok(([(header::CONTENT_TYPE, encoder.format_type().to_string())], text).into_response())
}

fn numbers(app: &App, registry: &Registry) {
    let (used, budget) = app.scheduler.cache_bytes();
    let statistics = app.scheduler.statistics(|statistics| statistics.clone());
    for (name, help, value) in [
        ("moebius_requests_running", "Sequences that run.", statistics.running as f64),
        ("moebius_requests_waiting", "Requests that wait.", app.scheduler.waiting() as f64),
        ("moebius_sequences_finished_total", "Sequences that ended.", statistics.finished as f64),
        ("moebius_requests_dropped_total", "Requests dropped while waiting.", statistics.dropped as f64),
        ("moebius_sequences_yielded_total", "Sequences whose memory went to others.", statistics.yielded as f64),
        ("moebius_prompt_tokens_total", "Tokens of prompts read.", statistics.prompt_tokens as f64),
        ("moebius_generated_tokens_total", "Tokens written.", statistics.generated_tokens as f64),
        ("moebius_steps_total", "Steps of the scheduler.", statistics.steps as f64),
        ("moebius_step_seconds_total", "Time of all steps.", statistics.step_seconds),
        ("moebius_model_seconds_total", "Time of all steps inside the model.", statistics.model_seconds),
        ("moebius_cache_bytes_used", "Keys and values held.", used as f64),
        ("moebius_cache_bytes_budget", "Keys and values that may be held.", budget as f64),
        ("moebius_prefix_hits_total", "Prompts of which a beginning was known.", statistics.prefix_hits as f64),
        ("moebius_prefix_tokens_total", "Tokens not read for that.", statistics.prefix_tokens as f64),
    ] {
        number(registry, name, help, value);
    }
    let help = "Bytes of expert weights read for a token, by the most sequences in a step.";
    let bytes = Opts::new("moebius_expert_bytes_per_token", help);
    let bytes = GaugeVec::new(bytes, &["most_sequences"]).expect("a sound name");
    for (most, load) in sizes().zip(statistics.loads) {
        let most = most.map_or("inf".to_string(), |most| most.to_string());
        if let Some(value) = load.bytes_per_token() {
            bytes.with_label_values(&[&most]).set(value);
        }
    }
    add(registry, bytes);
}

/// How even the experts' loads are; each by itself where they are few.
fn experts(app: &App, registry: &Registry) {
    let gauge =
        |name: &str, help: &str, labels: &[&str]| GaugeVec::new(Opts::new(name, help), labels).expect("a sound name");
    let violation =
        gauge("moebius_expert_max_violation", "The largest load over the mean, less one, by layer.", &["layer"]);
    let entropy = gauge("moebius_expert_entropy", "Entropy of the loads over its largest value, by layer.", &["layer"]);
    let dead = gauge("moebius_expert_dead", "Experts without a token, by layer.", &["layer"]);
    let each = Opts::new("moebius_expert_tokens_total", "Tokens of an expert.");
    let each = CounterVec::new(each, &["layer", "expert"]).expect("a sound name");
    let few = app.card.moe_layers.len() * app.card.n_experts <= app.options.most_expert_series;
    let layers = app.scheduler.statistics(|statistics| statistics.experts.clone());
    for (layer, load) in layers {
        let layer = layer.to_string();
        violation.with_label_values(&[&layer]).set(load.max_violation());
        entropy.with_label_values(&[&layer]).set(load.entropy());
        dead.with_label_values(&[&layer]).set(load.dead_experts() as f64);
        for (expert, &count) in load.counts.iter().enumerate().filter(|_| few) {
            each.with_label_values(&[&layer, &expert.to_string()]).inc_by(count as f64);
        }
    }
    for gauge in [violation, entropy, dead] {
        add(registry, gauge);
    }
    add(registry, each);
}
