//! `POST /v1/chat/completions`: conversations.

mod stream;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use moebius_engine::Grammar;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::request;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::parts::calls::Call;
use crate::parts::conversation::Ask;
use crate::parts::generation::{Caller, Running, Usage, Written};
use crate::parts::output::{Answer, OutputReader};
use crate::parts::sampling::{Ignored, choices, refuse, top_scores};
use crate::parts::tools::{Tool, ToolChoice, ToolChoiceField};
use crate::sse::stream_events;
use crate::state::{App, now};

request! {
    /// What is asked.
    ChatRequest {
        /// The model's name.
        model: String,
        /// The conversation.
        messages: Vec<Value>,
        /// Whether the answer arrives while it is written.
        stream: Option<bool>,
        /// What else arrives then.
        stream_options: Option<StreamOptions>,
        /// The newer name of `max_tokens`.
        max_completion_tokens: Option<usize>,
        /// How many answers.
        n: Option<usize>,
        /// Whether each token's score is told.
        logprobs: Option<bool>,
        /// And those of so many of the likeliest.
        top_logprobs: Option<usize>,
        /// What the answer must be.
        response_format: Option<ResponseFormat>,
        /// Tools that may be called.
        tools: Option<Vec<Value>>,
        /// Whether one must be.
        tool_choice: Option<ToolChoiceField>,
        /// Whether several may be.
        parallel_tool_calls: Option<bool>,
        /// Extension: each token's experts.
        routing: Option<bool>,
        /// Extension: variables of the template.
        chat_template_kwargs: Option<Map<String, Value>>,
        /// For templates that know it.
        reasoning_effort: Option<String>,
        /// Not supported.
        functions: Ignored,
        /// Not supported.
        function_call: Ignored,
        /// Not supported.
        audio: Ignored,
        /// Not supported.
        web_search_options: Ignored,
        /// Only text.
        modalities: Option<Vec<String>>,
    } ignored {
        user, store, metadata, service_tier, prediction, safety_identifier, prompt_cache_key, prompt_cache_retention, verbosity,
    }
}

/// What else a stream tells.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// The usage at its end.
    pub include_usage: Option<bool>,
    /// Padding against those who watch lengths; accepted, and left out.
    #[allow(dead_code)]
    include_obfuscation: Option<bool>,
}

/// What an answer must be.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ResponseFormat {
    /// Anything.
    Text {},
    /// A JSON object.
    JsonObject {},
    /// JSON of a schema.
    JsonSchema {
        /// The schema and its name.
        json_schema: JsonSchema,
    },
    /// Extension: a text that matches.
    Regex {
        /// The regular expression.
        regex: String,
    },
    /// Extension: a text of a grammar.
    Lark {
        /// In llguidance's dialect.
        grammar: String,
    },
}

/// A schema with what OpenAI's API has beside it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JsonSchema {
    #[allow(dead_code)]
    name: Option<String>,
    #[allow(dead_code)]
    description: Option<String>,
    /// The schema itself.
    pub schema: Option<Value>,
    /// Accepted; every schema is obeyed.
    #[allow(dead_code)]
    strict: Option<bool>,
}

impl ResponseFormat {
    /// The grammar that it asks for.
    pub fn grammar(self) -> Option<Grammar> {
        match self {
            Self::Text {} => None,
            Self::JsonObject {} => Some(Grammar::JsonObject),
            Self::JsonSchema { json_schema } => {
                Some(json_schema.schema.map_or(Grammar::JsonObject, Grammar::JsonSchema))
            }
            Self::Regex { regex } => Some(Grammar::Regex(regex)),
            Self::Lark { grammar } => Some(Grammar::Lark(grammar)),
        }
    }
}

/// What answers need besides their news.
pub(super) struct Answering {
    app: App,
    id: String,
    created: u64,
    reader: OutputReader,
    scores: bool,
    routing: bool,
}

/// Answers a conversation.
pub async fn answer(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    JsonBody(request): JsonBody<ChatRequest>,
) -> Result<Response, ApiError> {
    let streams = request.stream.unwrap_or(false);
    let include_usage = request.stream_options.and_then(|options| options.include_usage).unwrap_or(false);
    let ask = read(&app, request)?;
    let (n, scores, routing) = (ask.n, ask.scores.is_some(), ask.routing);
    let ready = ask.prepare(&app).await?;
    let (id, created) = (app.new_id("chatcmpl-"), now());
    let running = Running::generate(&app, caller, ready.prompt, ready.generates).await?;
    let answering = Answering { app, id, created, reader: ready.reader, scores, routing };
    if streams {
        return Ok(stream_events(running, stream::Chunks::new(answering, n, include_usage)));
    }
    let written = running.collect(n).await?;
    Ok(Json(answering.whole(written)).into_response())
}

/// What is asked, checked as far as it is this interface's affair; and whether scores are told.
fn read(app: &App, mut request: ChatRequest) -> Result<Ask, ApiError> {
    for (name, field) in [
        ("functions", &request.functions),
        ("function_call", &request.function_call),
        ("audio", &request.audio),
        ("web_search_options", &request.web_search_options),
    ] {
        refuse(name, field)?;
    }
    if request.modalities.iter().flatten().any(|modality| modality != "text") {
        return Err(ApiError::unsupported("modalities", "This model writes text only."));
    }
    if request.stream_options.is_some() && request.stream != Some(true) {
        let message = "The 'stream_options' parameter is only allowed when 'stream' is enabled.";
        return Err(ApiError::invalid("stream_options", message));
    }
    let n = choices("n", request.n)?;
    let scores = request.logprobs.unwrap_or(false);
    let top = top_scores("top_logprobs", request.top_logprobs)?;
    if top > 0 && !scores {
        return Err(ApiError::invalid("top_logprobs", "'top_logprobs' wants 'logprobs' to be true."));
    }
    let routing = request.routing.unwrap_or(false);
    if routing && n > 1 {
        return Err(ApiError::invalid("routing", "'routing' wants 'n' to be 1."));
    }
    let tools = Tool::list(request.tools.take())?;
    let choice = ToolChoice::read(request.tool_choice.take(), &tools)?;
    let mut fields = request.sampling();
    fields.max_tokens = request.max_completion_tokens.or(fields.max_tokens);
    let mut variables = request.chat_template_kwargs.take().unwrap_or_default();
    if let Some(effort) = request.reasoning_effort.take() {
        variables.entry("reasoning_effort").or_insert(effort.into());
    }
    app.check_model(&request.model)?;
    Ok(Ask {
        messages: request.messages,
        tools,
        choice,
        parallel: request.parallel_tool_calls.unwrap_or(true),
        variables,
        form: request.response_format.and_then(ResponseFormat::grammar),
        fields,
        n,
        scores: scores.then_some(top),
        routing,
    })
}

impl Answering {
    /// The whole answer at once.
    fn whole(&self, all: Vec<Written>) -> Value {
        let mut usage = Usage::default();
        let mut routing = Vec::new();
        let mut choices = Vec::new();
        for (index, written) in all.iter().enumerate() {
            written.outcome.iter().for_each(|outcome| usage.add(outcome));
            routing.extend(written.experts.iter().map(|experts| self.app.routing_entry(experts)));
            let answer = Answer::read(self.reader.clone(), written);
            usage.reasoning += answer.thought_tokens;
            let mut message = Map::new();
            message.insert("role".into(), "assistant".into());
            let silent = answer.text.is_empty() && !answer.calls.is_empty();
            message.insert("content".into(), if silent { Value::Null } else { answer.text.into() });
            message.insert("refusal".into(), Value::Null);
            if !answer.thoughts.is_empty() {
                message.insert("reasoning_content".into(), answer.thoughts.into());
            }
            let calls: Vec<Value> = answer.calls.iter().map(|call| call_object(&self.app, call)).collect();
            let called = !calls.is_empty();
            if called {
                message.insert("tool_calls".into(), calls.into());
            }
            let scores: Vec<Value> = written.scores.iter().flatten().map(|score| self.app.chat_score(score)).collect();
            choices.push(json!({
                "index": index,
                "message": message,
                "logprobs": if self.scores { json!({"content": scores, "refusal": null}) } else { Value::Null },
                "finish_reason": reason(called, written.finish_reason()),
            }));
        }
        let mut object = self.object("chat.completion", choices);
        object["usage"] = usage.object();
        if self.routing {
            object["routing"] = routing.into();
        }
        object
    }

    /// What every answer and chunk begins with.
    fn object(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.app.card.name,
            "system_fingerprint": crate::FINGERPRINT,
            "choices": choices,
        })
    }
}

/// A call in OpenAI's form.
pub(super) fn call_object(app: &App, call: &Call) -> Value {
    json!({
        "id": app.new_id("call_"),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    })
}

fn reason(called: bool, reason: &'static str) -> &'static str {
    if called && reason == "stop" { "tool_calls" } else { reason }
}
