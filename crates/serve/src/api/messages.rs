//! `POST /v1/messages`: conversations as Anthropic's interface has them.

mod stream;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use moebius_engine::Finish;
use moebius_engine::scheduler::Outcome;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::body::JsonBody;
use crate::error::{AnthropicError, ApiError};
use crate::parts::calls::Call;
use crate::parts::conversation::Ask;
use crate::parts::generation::{Caller, Running, Written};
use crate::parts::output::{Answer, OutputReader};
use crate::parts::sampling::{Ignored, OneOrMany, SamplingFields, check_range};
use crate::parts::tools::{Tool, ToolChoice};
use crate::sse::stream_events;
use crate::state::App;

/// What is asked.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MessagesRequest {
    model: String,
    messages: Vec<Value>,
    max_tokens: usize,
    system: Option<Value>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    stop_sequences: Option<Vec<String>>,
    stream: Option<bool>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Choice>,
    thinking: Option<Thinking>,
    #[allow(dead_code)]
    metadata: Ignored,
    #[allow(dead_code)]
    service_tier: Ignored,
    /// Extension: the same seed gives the same text.
    seed: Option<i64>,
}

/// Whether a tool must be called.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
enum Choice {
    Auto { disable_parallel_tool_use: Option<bool> },
    Any { disable_parallel_tool_use: Option<bool> },
    Tool { name: String, disable_parallel_tool_use: Option<bool> },
    None {},
}

/// Whether the model thinks first, where its template can say so.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
enum Thinking {
    Enabled {
        #[allow(dead_code)]
        budget_tokens: Option<usize>,
    },
    Disabled {},
    Adaptive {},
}

/// What answers need besides their news.
struct Answering {
    app: App,
    id: String,
    reader: OutputReader,
}

/// Answers a conversation.
pub async fn answer(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    body: Result<JsonBody<MessagesRequest>, ApiError>,
) -> Result<Response, AnthropicError> {
    answer_checked(app, caller, body).await.map_err(AnthropicError)
}

async fn answer_checked(
    app: App,
    caller: Caller,
    body: Result<JsonBody<MessagesRequest>, ApiError>,
) -> Result<Response, ApiError> {
    let JsonBody(request) = body?;
    app.check_model(&request.model)?;
    let streams = request.stream.unwrap_or(false);
    let ready = read(request)?.prepare(&app).await?;
    let prompt_tokens = ready.prompt.len();
    let running = Running::generate(&app, caller, ready.prompt, ready.generates).await?;
    let answering = Answering { id: app.new_id("msg_"), reader: ready.reader, app };
    if streams {
        return Ok(stream_events(running, stream::Events::new(answering, prompt_tokens)));
    }
    let written = running.collect(1).await?.remove(0);
    Ok(Json(answering.whole(&written)).into_response())
}

/// `POST /v1/messages/count_tokens`: how many tokens a conversation has.
pub async fn count(
    State(app): State<App>,
    body: Result<JsonBody<CountRequest>, ApiError>,
) -> Result<Json<Value>, AnthropicError> {
    let counted = async {
        let JsonBody(request) = body?;
        app.check_model(&request.model)?;
        let tools = read_tools(request.tools)?;
        let request = MessagesRequest {
            model: request.model,
            messages: request.messages,
            max_tokens: 1,
            system: request.system,
            temperature: None,
            top_p: None,
            top_k: None,
            stop_sequences: None,
            stream: None,
            tools: None,
            tool_choice: None,
            thinking: request.thinking,
            metadata: None,
            service_tier: None,
            seed: None,
        };
        let ready = Ask { tools, ..read(request)? }.prepare(&app).await?;
        Ok(Json(json!({"input_tokens": ready.prompt.len()})))
    };
    counted.await.map_err(AnthropicError)
}

/// What is to be counted.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CountRequest {
    model: String,
    messages: Vec<Value>,
    system: Option<Value>,
    tools: Option<Vec<Value>>,
    #[allow(dead_code)]
    tool_choice: Ignored,
    thinking: Option<Thinking>,
}

fn read_tools(tools: Option<Vec<Value>>) -> Result<Vec<Tool>, ApiError> {
    let read = |(index, tool): (usize, &Value)| Tool::read(tool, "input_schema", &format!("tools[{index}]"));
    tools.unwrap_or_default().iter().enumerate().map(read).collect()
}

fn read(request: MessagesRequest) -> Result<Ask, ApiError> {
    check_range("temperature", request.temperature, 0.0, 1.0)?;
    let tools = read_tools(request.tools)?;
    let (choice, serial) = match request.tool_choice {
        None => (ToolChoice::Auto, None),
        Some(Choice::Auto { disable_parallel_tool_use }) => (ToolChoice::Auto, disable_parallel_tool_use),
        Some(Choice::Any { disable_parallel_tool_use }) => (ToolChoice::Required, disable_parallel_tool_use),
        Some(Choice::Tool { name, disable_parallel_tool_use }) => {
            if !tools.iter().any(|tool| tool.name == name) {
                return Err(ApiError::invalid("tool_choice", format!("No tool is called {name:?}.")));
            }
            (ToolChoice::Named(name), disable_parallel_tool_use)
        }
        Some(Choice::None {}) => (ToolChoice::None, None),
    };
    if choice == ToolChoice::Required && tools.is_empty() {
        return Err(ApiError::invalid("tool_choice", "`any` wants tools."));
    }
    let mut variables = Map::new();
    if let Some(thinking) = &request.thinking {
        variables.insert("enable_thinking".into(), (!matches!(thinking, Thinking::Disabled {})).into());
    }
    let mut messages = Vec::new();
    if let Some(system) = request.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    for (index, message) in request.messages.into_iter().enumerate() {
        read_message(&message, &format!("messages[{index}]"), &mut messages)?;
    }
    let fields = SamplingFields {
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        stop: request.stop_sequences.map(OneOrMany::Many),
        max_tokens: Some(request.max_tokens),
        seed: request.seed,
        ..SamplingFields::default()
    };
    let parallel = !serial.unwrap_or(false);
    Ok(Ask { messages, tools, choice, parallel, variables, form: None, fields, n: 1, scores: None, routing: false })
}

/// Turns a message into those of OpenAI's interface: calls stand beside the text there, and results are messages.
fn read_message(message: &Value, at: &str, to: &mut Vec<Value>) -> Result<(), ApiError> {
    let role = message["role"].as_str().filter(|role| ["user", "assistant", "system"].contains(role));
    let Some(role) = role else {
        return Err(ApiError::invalid(format!("{at}.role"), "Wanted `user` or `assistant`."));
    };
    let blocks = match &message["content"] {
        Value::String(text) => {
            to.push(json!({"role": role, "content": text}));
            return Ok(());
        }
        Value::Array(blocks) => blocks,
        _ => return Err(ApiError::invalid(format!("{at}.content"), "Wanted a text or a list of blocks.")),
    };
    let (mut text, mut thoughts, mut calls) = (String::new(), String::new(), Vec::new());
    for (index, block) in blocks.iter().enumerate() {
        let at = format!("{at}.content[{index}]");
        let words = |key: &str| block[key].as_str().unwrap_or_default();
        match words("type") {
            "text" => text.push_str(words("text")),
            "thinking" => thoughts.push_str(words("thinking")),
            "redacted_thinking" => {}
            "tool_use" => calls.push(json!({
                "id": block["id"],
                "type": "function",
                "function": {"name": words("name"), "arguments": block["input"]},
            })),
            "tool_result" => {
                let content = if block["content"].is_null() { json!("") } else { block["content"].clone() };
                to.push(json!({"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}));
            }
            kind => {
                let message = format!("This model reads text only, found a block of type {kind:?}.");
                return Err(ApiError::unsupported(format!("{at}.type"), message));
            }
        }
    }
    let only_results = text.is_empty() && thoughts.is_empty() && calls.is_empty() && !blocks.is_empty();
    if !only_results {
        let mut message = json!({"role": role, "content": text});
        if !thoughts.is_empty() {
            message["reasoning_content"] = thoughts.into();
        }
        if !calls.is_empty() {
            message["tool_calls"] = calls.into();
        }
        to.push(message);
    }
    Ok(())
}

impl Answering {
    fn whole(&self, written: &Written) -> Value {
        let answer = Answer::read(self.reader.clone(), written);
        let mut content = Vec::new();
        if !answer.thoughts.is_empty() {
            content.push(json!({"type": "thinking", "thinking": answer.thoughts, "signature": ""}));
        }
        if !answer.text.is_empty() {
            content.push(json!({"type": "text", "text": answer.text}));
        }
        content.extend(answer.calls.iter().map(|call| call_block(&self.app, call, input(call))));
        let mut message = self.message(content);
        if let Some(outcome) = &written.outcome {
            (message["stop_reason"], message["stop_sequence"]) = stop(outcome, !answer.calls.is_empty());
            message["usage"] = usage(outcome);
        }
        message
    }

    fn message(&self, content: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.app.card.name,
            "content": content,
            "stop_reason": null,
            "stop_sequence": null,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        })
    }
}

fn call_block(app: &App, call: &Call, input: Value) -> Value {
    json!({"type": "tool_use", "id": app.new_id("toolu_"), "name": call.name, "input": input})
}

/// A call's arguments as an object.
fn input(call: &Call) -> Value {
    serde_json::from_str(&call.arguments).ok().filter(Value::is_object).unwrap_or_else(|| json!({}))
}

/// Why the answer ended, and the stop string that did it.
fn stop(outcome: &Outcome, called: bool) -> (Value, Value) {
    match &outcome.finish {
        Finish::Stop(text) => ("stop_sequence".into(), text.clone().into()),
        Finish::EndToken(_) | Finish::Cancelled if called => ("tool_use".into(), Value::Null),
        Finish::EndToken(_) | Finish::Cancelled => ("end_turn".into(), Value::Null),
        Finish::MaxTokens | Finish::ContextFull | Finish::TimeLimit => ("max_tokens".into(), Value::Null),
    }
}

fn usage(outcome: &Outcome) -> Value {
    json!({
        "input_tokens": outcome.prompt_tokens - outcome.cached_tokens,
        "cache_read_input_tokens": outcome.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": outcome.generated_tokens,
    })
}
