//! `POST /v1/responses`: OpenAI's newer interface. Nothing is stored: a conversation is sent whole each time.

mod stream;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use moebius_engine::Grammar;
use moebius_engine::scheduler::{Outcome, TokenScore};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::request;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::parts::calls::Call;
use crate::parts::conversation::Ask;
use crate::parts::generation::{Caller, Running, Written, finish_reason};
use crate::parts::output::{Answer, Delta, OutputReader};
use crate::parts::sampling::{Ignored, refuse, top_scores};
use crate::parts::tools::{Tool, ToolChoice, ToolChoiceField};
use crate::sse::stream_events;
use crate::state::{App, now};

request! {
    /// What is asked.
    ResponsesRequest {
        /// The model's name.
        model: String,
        /// A text, or a list of items.
        input: Value,
        /// A system message before them.
        instructions: Option<String>,
        /// The most tokens.
        max_output_tokens: Option<usize>,
        /// Whether the answer arrives while it is written.
        stream: Option<bool>,
        /// Tools that may be called.
        tools: Option<Vec<Value>>,
        /// Whether one must be.
        tool_choice: Option<ToolChoiceField>,
        /// Whether several may be.
        parallel_tool_calls: Option<bool>,
        /// What the text must be.
        text: Option<TextField>,
        /// What is told besides: of these, the scores of the text's tokens.
        include: Option<Vec<String>>,
        /// Scores of so many of the likeliest tokens beside each.
        top_logprobs: Option<usize>,
        /// How much is thought first, for templates that know it.
        reasoning: Option<Reasoning>,
        /// Not supported: nothing is stored.
        previous_response_id: Ignored,
        /// Not supported.
        conversation: Ignored,
        /// Not supported.
        prompt: Ignored,
        /// Not supported.
        background: Option<bool>,
        /// Extension: each token's experts.
        routing: Option<bool>,
        /// Echoed.
        metadata: Option<Map<String, Value>>,
    } ignored {
        user, store, truncation, service_tier, safety_identifier, prompt_cache_key, prompt_cache_retention,
        max_tool_calls, stream_options,
    }
}

/// What the text must be.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextField {
    format: Option<Value>,
    #[allow(dead_code)]
    verbosity: Ignored,
}

/// How much is thought.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reasoning {
    effort: Option<String>,
    #[allow(dead_code)]
    summary: Ignored,
    #[allow(dead_code)]
    generate_summary: Ignored,
}

/// What answers need besides their news.
struct Answering {
    app: App,
    id: String,
    reader: OutputReader,
    routing: bool,
    /// The object with everything that is known before the answer.
    object: Value,
}

/// Answers a request.
pub async fn answer(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    JsonBody(request): JsonBody<ResponsesRequest>,
) -> Result<Response, ApiError> {
    app.check_model(&request.model)?;
    let (streams, routing) = (request.stream.unwrap_or(false), request.routing.unwrap_or(false));
    let id = app.new_id("resp_");
    let object = echo(&app, &id, &request);
    let ready = read(request)?.prepare(&app).await?;
    let running = Running::generate(&app, caller, ready.prompt, ready.generates).await?;
    let answering = Answering { app, id, reader: ready.reader, routing, object };
    if streams {
        return Ok(stream_events(running, stream::Events::new(answering)));
    }
    let written = running.collect(1).await?.remove(0);
    Ok(Json(answering.whole(&written)).into_response())
}

/// The answer's object before it has an answer.
fn echo(app: &App, id: &str, request: &ResponsesRequest) -> Value {
    let format = request.text.as_ref().and_then(|text| text.format.clone());
    let effort = request.reasoning.as_ref().and_then(|reasoning| reasoning.effort.clone());
    let choice = match &request.tool_choice {
        None => json!("auto"),
        Some(ToolChoiceField::Word(word)) => json!(word),
        Some(ToolChoiceField::Object(object)) => object.clone(),
    };
    json!({
        "id": id,
        "object": "response",
        "created_at": now(),
        "status": "in_progress",
        "error": null,
        "incomplete_details": null,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "model": app.card.name,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls.unwrap_or(true),
        "previous_response_id": null,
        "reasoning": {"effort": effort, "summary": null},
        "store": false,
        "temperature": request.temperature.or(app.defaults.temperature).unwrap_or(1.0),
        "text": {"format": format.unwrap_or_else(|| json!({"type": "text"}))},
        "tool_choice": choice,
        "tools": request.tools.clone().unwrap_or_default(),
        "top_logprobs": request.top_logprobs.unwrap_or(0),
        "top_p": request.top_p.or(app.defaults.top_p).unwrap_or(1.0),
        "truncation": "disabled",
        "usage": null,
        "user": null,
        "metadata": request.metadata.clone().unwrap_or_default(),
    })
}

fn read(mut request: ResponsesRequest) -> Result<Ask, ApiError> {
    refuse("previous_response_id", &request.previous_response_id)?;
    refuse("conversation", &request.conversation)?;
    refuse("prompt", &request.prompt)?;
    if request.background == Some(true) {
        return Err(ApiError::unsupported("background", "Unsupported parameter: 'background' is not supported."));
    }
    let mut messages = Vec::new();
    if let Some(text) = request.instructions.take() {
        messages.push(json!({"role": "system", "content": text}));
    }
    match request.input.take() {
        Value::String(text) => messages.push(json!({"role": "user", "content": text})),
        Value::Array(items) => {
            for (index, item) in items.into_iter().enumerate() {
                read_item(item, &format!("input[{index}]"), &mut messages)?;
            }
        }
        _ => return Err(ApiError::invalid("input", "Invalid 'input': wanted a text or a list of items.")),
    }
    let tools = Tool::list(request.tools.take())?;
    let choice = ToolChoice::read(request.tool_choice.take(), &tools)?;
    let form = request.text.take().and_then(|text| text.format).map_or(Ok(None), read_format)?;
    let mut fields = request.sampling();
    fields.max_tokens = request.max_output_tokens.or(fields.max_tokens);
    let mut variables = Map::new();
    if let Some(effort) = request.reasoning.take().and_then(|reasoning| reasoning.effort) {
        variables.insert("reasoning_effort".into(), effort.into());
    }
    let parallel = request.parallel_tool_calls.unwrap_or(true);
    let routing = request.routing.unwrap_or(false);
    let top = top_scores("top_logprobs", request.top_logprobs)?;
    let is_told = request.include.iter().flatten().any(|what| what == SCORES);
    let scores = (is_told || top > 0).then_some(top);
    Ok(Ask { messages, tools, choice, parallel, variables, form, fields, n: 1, scores, routing })
}

/// What `include` calls the scores of the text's tokens.
const SCORES: &str = "message.output_text.logprobs";

/// The form that `text.format` asks for.
fn read_format(format: Value) -> Result<Option<Grammar>, ApiError> {
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Grammar::JsonObject)),
        Some("json_schema") => match &format["schema"] {
            schema @ Value::Object(_) => Ok(Some(Grammar::JsonSchema(schema.clone()))),
            _ => Err(ApiError::invalid("text.format.schema", "Wanted a JSON schema.")),
        },
        found => {
            let message = format!("Wanted `text`, `json_object` or `json_schema`, found {found:?}.");
            Err(ApiError::invalid("text.format.type", message))
        }
    }
}

/// Turns an item into messages of the other interface.
fn read_item(mut item: Value, at: &str, to: &mut Vec<Value>) -> Result<(), ApiError> {
    let words = |key: &str| item[key].as_str().unwrap_or_default().to_string();
    match item["type"].as_str().unwrap_or("message") {
        "message" => {
            let role = words("role");
            if !["user", "assistant", "system", "developer"].contains(&&role[..]) {
                return Err(ApiError::invalid(format!("{at}.role"), "Wanted user, assistant, system or developer."));
            }
            let role = if role == "developer" { "system".to_string() } else { role };
            to.push(json!({"role": role, "content": item["content"].take()}));
        }
        "function_call" => {
            let function = json!({"name": words("name"), "arguments": words("arguments")});
            let call = json!({"id": words("call_id"), "type": "function", "function": function});
            // Several calls of one answer are one message.
            match to.last_mut().filter(|last| last["role"] == "assistant" && last["tool_calls"].is_array()) {
                Some(last) => last["tool_calls"].as_array_mut().into_iter().for_each(|calls| calls.push(call.clone())),
                None => to.push(json!({"role": "assistant", "content": "", "tool_calls": [call]})),
            }
        }
        "function_call_output" => {
            let (id, output) = (words("call_id"), item["output"].take());
            to.push(json!({"role": "tool", "tool_call_id": id, "content": output}));
        }
        "reasoning" => {}
        kind => {
            let message = format!("Items of type {kind:?} are not supported.");
            return Err(ApiError::unsupported(format!("{at}.type"), message));
        }
    }
    Ok(())
}

impl Answering {
    fn whole(&self, written: &Written) -> Value {
        let answer = Answer::read(self.reader.clone(), written);
        let scores = self.text_scores(written);
        let mut output = Vec::new();
        if !answer.thoughts.is_empty() {
            output.push(reasoning_item(&self.app.new_id("rs_"), &answer.thoughts));
        }
        if !answer.text.is_empty() || answer.calls.is_empty() {
            output.push(message_item(&self.app.new_id("msg_"), &answer.text, &scores, "completed"));
        }
        output.extend(answer.calls.iter().map(|call| call_item(&self.app, call)));
        let mut object = self.completed(output, written.outcome.as_ref(), answer.thought_tokens);
        if self.routing {
            object["routing"] = written.experts.iter().map(|experts| self.app.routing_entry(experts)).collect();
        }
        object
    }

    /// The scores of the tokens that made the text, not thoughts or calls.
    fn text_scores(&self, written: &Written) -> Vec<Value> {
        let (mut scores, mut reader, mut from) = (TextScores::default(), self.reader.clone(), 0);
        for (&(length, tokens), piece) in written.pieces.iter().zip(&written.scores) {
            let was_thinking = reader.is_thinking();
            let deltas = reader.push(&written.text[from..from + length], tokens);
            from += length;
            scores.add(piece, was_thinking || reader.is_thinking(), &deltas);
        }
        scores.add(&[], false, &reader.finish());
        scores.told.iter().map(|score| self.app.chat_score(score)).collect()
    }

    fn completed(&self, output: Vec<Value>, outcome: Option<&Outcome>, thought_tokens: usize) -> Value {
        let mut object = self.object.clone();
        object["id"] = self.id.clone().into();
        object["output"] = output.into();
        object["status"] = "completed".into();
        if let Some(outcome) = outcome {
            if finish_reason(&outcome.finish) == "length" {
                object["status"] = "incomplete".into();
                object["incomplete_details"] = json!({"reason": "max_output_tokens"});
            }
            object["usage"] = json!({
                "input_tokens": outcome.prompt_tokens,
                "input_tokens_details": {"cached_tokens": outcome.cached_tokens},
                "output_tokens": outcome.generated_tokens,
                "output_tokens_details": {"reasoning_tokens": thought_tokens},
                "total_tokens": outcome.prompt_tokens + outcome.generated_tokens,
            });
        }
        object
    }
}

/// Scores of the tokens that make text, sorted out while it is read.
#[derive(Default)]
struct TextScores {
    /// Of tokens whose text is held back.
    held: Vec<TokenScore>,
    told: Vec<TokenScore>,
}

impl TextScores {
    /// Takes a piece's scores and what became certain with it; gives where those begin that belong to text.
    fn add(&mut self, scores: &[TokenScore], is_thought: bool, deltas: &[Delta]) -> usize {
        let from = self.told.len();
        self.held.extend_from_slice(scores);
        if is_thought || deltas.iter().any(|delta| matches!(delta, Delta::Call(_))) {
            self.held.clear();
        } else if deltas.iter().any(|delta| matches!(delta, Delta::Text(_))) {
            self.told.append(&mut self.held);
        }
        from
    }
}

fn text_part(text: &str, scores: &[Value]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": scores})
}

fn message_item(id: &str, text: &str, scores: &[Value], status: &str) -> Value {
    let content = if status == "in_progress" { json!([]) } else { json!([text_part(text, scores)]) };
    json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
}

fn reasoning_item(id: &str, text: &str) -> Value {
    let content = if text.is_empty() { json!([]) } else { json!([{"type": "reasoning_text", "text": text}]) };
    json!({"id": id, "type": "reasoning", "summary": [], "content": content})
}

fn call_item(app: &App, call: &Call) -> Value {
    json!({
        "id": app.new_id("fc_"),
        "type": "function_call",
        "status": "completed",
        "call_id": app.new_id("call_"),
        "name": call.name,
        "arguments": call.arguments,
    })
}
