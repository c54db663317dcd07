//! The schemas of the requests. They say what is always taken: what few clients send (parts of messages other than text, calls
//! in a conversation's past) is taken too.

use serde_json::{Map, Value, json};

use crate::parts::sampling::{MOST_CHOICES, MOST_TOP_SCORES};

/// The largest number that a schema allows where only a lower bound matters.
const LARGE: u64 = 1_000_000_000;
const NAME: &str = "^[a-zA-Z0-9_.-]{1,64}$";

/// All schemas, for a model of a name.
pub(super) fn all(model: &str) -> Value {
    json!({
        "ChatRequest": chat(model),
        "CompletionRequest": completion(model),
        "ResponsesRequest": responses(model),
        "EmbeddingRequest": object(&["model", "input"], vec![
            ("model", fixed(model)),
            ("input", prompt()),
            ("encoding_format", one_of(&["float", "base64"])),
            ("dimensions", integer(1)),
            ("pooling", one_of(&["mean", "last"])),
            ("user", text()),
        ]),
        "MessagesRequest": messages(model),
        "CountRequest": object(&["model", "messages"], conversation(model)),
        "TokenizeRequest": object(&["prompt"], vec![
            ("model", fixed(model)),
            ("prompt", text()),
            ("add_special_tokens", flag()),
            ("return_token_strs", flag()),
        ]),
        "DetokenizeRequest": object(&["tokens"], vec![("model", fixed(model)), ("tokens", list(integer(0)))]),
        "Error": error(),
    })
}

fn chat(model: &str) -> Value {
    let mut fields = sampling(&["user", "service_tier", "reasoning_effort"]);
    fields.extend([
        ("model", fixed(model)),
        ("messages", some(message(&["system", "user", "assistant"]))),
        ("stream", flag()),
        ("stream_options", object(&[], vec![("include_usage", flag()), ("include_obfuscation", flag())])),
        ("max_completion_tokens", integer(1)),
        ("n", count()),
        ("logprobs", flag()),
        ("top_logprobs", top()),
        ("response_format", format()),
        (
            "tools",
            list(object(
                &["type", "function"],
                vec![("type", fixed("function")), ("function", function("parameters"))],
            )),
        ),
        ("tool_choice", one_of(&["none", "auto", "required"])),
        ("parallel_tool_calls", flag()),
        ("routing", flag()),
        ("chat_template_kwargs", json!({"type": "object"})),
    ]);
    object(&["model", "messages"], fields)
}

fn completion(model: &str) -> Value {
    let mut fields = sampling(&["user"]);
    fields.extend([
        ("model", fixed(model)),
        ("prompt", prompt()),
        ("stream", flag()),
        ("stream_options", object(&[], vec![("include_usage", flag()), ("include_obfuscation", flag())])),
        ("n", count()),
        ("best_of", count()),
        ("echo", flag()),
        ("logprobs", top()),
        ("response_format", format()),
        ("routing", flag()),
    ]);
    object(&["model", "prompt"], fields)
}

fn responses(model: &str) -> Value {
    let mut tool = function("parameters");
    tool["properties"]["type"] = fixed("function");
    tool["required"] = json!(["type", "name"]);
    let mut fields = sampling(&["user", "truncation", "service_tier"]);
    fields.extend([
        ("model", fixed(model)),
        ("input", json!({"anyOf": [text(), some(message(&["system", "user", "assistant", "developer"]))]})),
        ("instructions", text()),
        ("max_output_tokens", integer(1)),
        ("stream", flag()),
        ("tools", list(tool)),
        ("tool_choice", one_of(&["none", "auto", "required"])),
        ("parallel_tool_calls", flag()),
        ("metadata", json!({"type": "object"})),
        ("include", list(one_of(&["message.output_text.logprobs"]))),
        ("top_logprobs", top()),
        ("routing", flag()),
    ]);
    object(&["model", "input"], fields)
}

fn messages(model: &str) -> Value {
    let stop = json!({"type": "string", "maxLength": 1024});
    let mut fields = conversation(model);
    fields.extend([
        ("max_tokens", integer(1)),
        ("temperature", number(0.0, 1.0)),
        ("top_p", number(0.0, 1.0)),
        ("top_k", integer(0)),
        ("stop_sequences", json!({"type": "array", "items": stop, "maxItems": 16})),
        ("stream", flag()),
    ]);
    object(&["model", "messages", "max_tokens"], fields)
}

/// What Anthropic's two requests have in common.
fn conversation(model: &str) -> Vec<(&'static str, Value)> {
    vec![
        ("model", fixed(model)),
        ("messages", some(message(&["user", "assistant"]))),
        ("system", content()),
        ("tools", list(function("input_schema"))),
    ]
}

/// The fields of sampling, and those that change nothing.
fn sampling(ignored: &[&'static str]) -> Vec<(&'static str, Value)> {
    let stop = json!({"type": "string", "maxLength": 1024});
    let mut fields = vec![
        ("temperature", number(0.0, 2.0)),
        ("top_p", number(0.0, 1.0)),
        ("top_k", integer(0)),
        ("min_p", number(0.0, 1.0)),
        ("repetition_penalty", number(0.01, 100.0)),
        ("presence_penalty", number(-2.0, 2.0)),
        ("frequency_penalty", number(-2.0, 2.0)),
        ("logit_bias", json!({"type": "object", "additionalProperties": number(-100.0, 100.0)})),
        ("seed", json!({"type": "integer", "minimum": i64::MIN, "maximum": i64::MAX})),
        ("stop", json!({"anyOf": [stop, {"type": "array", "items": stop, "maxItems": 16}]})),
        ("max_tokens", integer(1)),
        ("ignore_eos", flag()),
    ];
    fields.extend(ignored.iter().map(|&name| (name, text())));
    fields
}

fn format() -> Value {
    let schema = object(
        &["name", "schema"],
        vec![("name", text()), ("description", text()), ("schema", json!({"type": "object"})), ("strict", flag())],
    );
    json!({"anyOf": [
        object(&["type"], vec![("type", one_of(&["text", "json_object"]))]),
        object(&["type", "json_schema"], vec![("type", fixed("json_schema")), ("json_schema", schema)]),
        object(&["type", "regex"], vec![("type", fixed("regex")), ("regex", text())]),
        object(&["type", "grammar"], vec![("type", fixed("lark")), ("grammar", text())]),
    ]})
}

fn function(schema: &'static str) -> Value {
    let name = json!({"type": "string", "pattern": NAME});
    let fields = vec![("name", name), ("description", text()), (schema, json!({"type": "object"}))];
    object(&["name"], fields)
}

fn message(roles: &[&str]) -> Value {
    object(&["role", "content"], vec![("role", one_of(roles)), ("content", content())])
}

fn content() -> Value {
    let part = object(&["type", "text"], vec![("type", fixed("text")), ("text", text())]);
    json!({"anyOf": [text(), list(part)]})
}

fn prompt() -> Value {
    json!({"anyOf": [text(), list(text()), list(integer(0)), list(list(integer(0)))]})
}

fn error() -> Value {
    let maybe = json!({"type": ["string", "null"]});
    let fields = json!({"message": text(), "type": text(), "param": maybe, "code": maybe});
    let error = json!({"type": "object", "required": ["message", "type"], "properties": fields});
    json!({"type": "object", "required": ["error"], "properties": {"error": error}})
}

/// Fields that are not required may also be `null`.
fn object(required: &[&str], fields: Vec<(&str, Value)>) -> Value {
    let allow = |name: &str, schema| {
        if required.contains(&name) { schema } else { json!({"anyOf": [schema, {"type": "null"}]}) }
    };
    let fields: Map<String, Value> =
        fields.into_iter().map(|(name, schema)| (name.to_string(), allow(name, schema))).collect();
    json!({"type": "object", "required": required, "properties": fields, "additionalProperties": false})
}

fn number(low: f64, high: f64) -> Value {
    json!({"type": "number", "minimum": low, "maximum": high})
}

fn integer(low: u64) -> Value {
    json!({"type": "integer", "minimum": low, "maximum": LARGE})
}

fn count() -> Value {
    json!({"type": "integer", "minimum": 1, "maximum": MOST_CHOICES})
}

fn top() -> Value {
    json!({"type": "integer", "minimum": 0, "maximum": MOST_TOP_SCORES})
}

fn one_of(words: &[&str]) -> Value {
    json!({"type": "string", "enum": words})
}

fn fixed(word: &str) -> Value {
    json!({"type": "string", "const": word})
}

fn list(items: Value) -> Value {
    json!({"type": "array", "items": items})
}

fn some(items: Value) -> Value {
    json!({"type": "array", "minItems": 1, "items": items})
}

fn text() -> Value {
    json!({"type": "string"})
}

fn flag() -> Value {
    json!({"type": "boolean"})
}
