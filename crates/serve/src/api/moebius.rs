//! `GET /v1/moebius/model` and `GET /v1/moebius/stats`: what no other interface tells of a mixture of experts.

use axum::Json;
use axum::extract::State;
use moebius_engine::scheduler::{Load, STEP_SIZES};
use serde_json::{Value, json};

use crate::state::{App, ModelCard};

/// Facts about the model.
pub async fn model(State(app): State<App>) -> Json<ModelCard> {
    Json(app.card.clone())
}

/// What happened so far.
pub async fn stats(State(app): State<App>) -> Json<Value> {
    let waiting = app.scheduler.waiting();
    let (used, budget) = app.scheduler.cache_bytes();
    let (mut statistics, tokens_per_s) = app.scheduler.statistics(|statistics| {
        let tokens = statistics.tokens_by_second();
        (statistics.clone(), tokens)
    });
    let none = Default::default();
    let layers: Vec<_> =
        app.card.moe_layers.iter().map(|layer| statistics.experts.get(layer).unwrap_or(&none).clone()).collect();
    let counts = |layer: &moebius_moe::LoadStatistics| {
        let mut counts = layer.counts.clone();
        counts.resize(app.card.n_experts, 0);
        counts
    };
    let by_sequences: Vec<Value> = sizes().zip(statistics.loads).map(|(most, load)| load_object(most, &load)).collect();
    statistics.tokens_by_second();
    Json(json!({
        "uptime_s": statistics.since.elapsed().as_secs_f64(),
        "running": statistics.running,
        "waiting": waiting,
        "finished": statistics.finished,
        "dropped": statistics.dropped,
        "prompt_tokens_total": statistics.prompt_tokens,
        "generated_tokens_total": statistics.generated_tokens,
        "tokens_per_s": tokens_per_s,
        "cache": {
            "bytes_used": used,
            "bytes_budget": budget,
            "prefix_hits": statistics.prefix_hits,
            "prefix_tokens_reused": statistics.prefix_tokens,
            "sequences_yielded": statistics.yielded,
        },
        "steps": {
            "count": statistics.steps,
            "seconds": statistics.step_seconds,
            "model_seconds": statistics.model_seconds,
        },
        "expert_load": layers.iter().map(counts).collect::<Vec<_>>(),
        "max_violation": layers.iter().map(moebius_moe::LoadStatistics::max_violation).collect::<Vec<_>>(),
        "expert_bytes_per_token": statistics.expert_bytes_per_token(),
        "expert_bytes_by_sequences": by_sequences,
    }))
}

/// The most sequences of each group of steps; the last group has no limit.
pub fn sizes() -> impl Iterator<Item = Option<usize>> {
    STEP_SIZES.into_iter().map(Some).chain([None])
}

fn load_object(most: Option<usize>, load: &Load) -> Value {
    json!({
        "most_sequences": most,
        "steps": load.steps,
        "tokens": load.tokens,
        "expert_bytes_per_token": load.bytes_per_token(),
    })
}
