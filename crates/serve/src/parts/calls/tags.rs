//! Calls with a tag for each argument.
//!
//! Qwen3-Coder: `<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>`.
//! GLM-4.5: `<tool_call>NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>`.
//! MiniMax-M2: `<minimax:tool_call>\n<invoke name="NAME">\n<parameter name="KEY">VALUE</parameter>\n</invoke>\n
//! </minimax:tool_call>`.
//!
//! A value is a text as it stands, or JSON: which of both, the tool's schema says.

use serde_json::{Map, Value};

use super::super::tools::Tool;
use super::{Call, quoted};

/// A family's tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the module says them")]
pub enum Tags {
    QwenCoder,
    Glm,
    MiniMax,
}

/// The pieces of a family's form.
struct Form {
    /// Around the whole; several calls repeat it, but MiniMax's, which stand inside of it.
    around: [&'static str; 2],
    /// Before and behind a name.
    name: [&'static str; 2],
    /// Before and behind an argument's name, and behind its value.
    argument: [&'static str; 3],
    /// Behind the arguments.
    end: &'static str,
}

impl Tags {
    fn form(self) -> Form {
        match self {
            Self::QwenCoder => Form {
                around: ["<tool_call>", "</tool_call>"],
                name: ["\n<function=", ">\n"],
                argument: ["<parameter=", ">\n", "\n</parameter>\n"],
                end: "</function>\n",
            },
            Self::Glm => Form {
                around: ["<tool_call>", "</tool_call>"],
                name: ["", "\n"],
                argument: ["<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"],
                end: "",
            },
            Self::MiniMax => Form {
                around: ["<minimax:tool_call>", "</minimax:tool_call>"],
                name: ["\n<invoke name=\"", "\">\n"],
                argument: ["<parameter name=\"", "\">", "</parameter>\n"],
                end: "</invoke>\n",
            },
        }
    }

    pub(super) fn opening(self) -> &'static str {
        self.form().around[0]
    }

    pub(super) fn closing(self) -> &'static str {
        self.form().around[1]
    }

    pub(super) fn parse(self, text: &str, tools: &[Tool]) -> Option<Vec<Call>> {
        let form = self.form();
        let mut calls = Vec::new();
        let mut rest = text;
        loop {
            let [before, behind] = form.name.map(str::trim);
            if !before.is_empty() {
                let Some((_, next)) = rest.split_once(before) else { break };
                rest = next;
            }
            // A name ends at its tag, or where the arguments begin.
            let end = match self {
                Self::Glm => rest.find(['\n', '<']).unwrap_or(rest.len()),
                Self::QwenCoder | Self::MiniMax => rest.find(behind)?,
            };
            let name = rest[..end].trim().to_string();
            let call = match form.end.trim() {
                "" => std::mem::take(&mut rest),
                end => {
                    let (call, next) = rest.split_once(end).unwrap_or((rest, ""));
                    rest = next;
                    call
                }
            };
            let arguments = arguments(&form, &call[end..], tools.iter().find(|tool| tool.name == name))?;
            if name.is_empty() || name.contains(char::is_whitespace) {
                return None;
            }
            calls.push(Call { name, arguments: Value::Object(arguments).to_string() });
            if before.is_empty() {
                break;
            }
        }
        Some(calls)
    }

    /// A tool's call in a grammar, and the rules that it needs.
    pub(super) fn rules(self, index: usize, tool: &Tool) -> (String, String) {
        let form = self.form();
        let [before, behind] = form.name;
        let mut call = quoted(&format!("{before}{}{behind}", tool.name));
        let mut rules = String::new();
        let needed: Vec<&str> =
            tool.parameters["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let properties = tool.parameters["properties"].as_object();
        for (number, (key, schema)) in properties.into_iter().flatten().enumerate() {
            let rule = format!("argument_{index}_{number}");
            let optional = if needed.contains(&&key[..]) { "" } else { "?" };
            call.push_str(&format!(" {rule}{optional}"));
            let [open, middle, close] = form.argument;
            let begin = quoted(&format!("{open}{key}{middle}"));
            if is_text(schema) && schema["enum"].is_array() {
                let values = schema["enum"].as_array().into_iter().flatten().filter_map(Value::as_str).map(quoted);
                let values = values.collect::<Vec<_>>().join(" | ");
                rules.push_str(&format!("{rule}: {begin} ({values}) {}\n", quoted(close)));
            } else if is_text(schema) {
                // Up to the tag's end.
                rules.push_str(&format!(
                    "{rule}: {begin} {rule}_value\n{rule}_value[suffix={}]: /(?s:.*)/\n",
                    quoted(close)
                ));
            } else {
                rules.push_str(&format!(
                    "{rule}: {begin} {rule}_value {}\n{rule}_value: %json {schema}\n",
                    quoted(close)
                ));
            }
        }
        if !form.end.is_empty() {
            call.push_str(&format!(" {}", quoted(form.end)));
        }
        (call, rules)
    }

    /// The grammar's first rule, for any of the tools.
    pub(super) fn start(self, any: &str, parallel: bool) -> String {
        let [opening, closing] = self.form().around.map(quoted);
        let more = if parallel { "*" } else { "" };
        match self {
            // The calls stand inside of one pair of tags.
            Self::MiniMax => {
                format!("start: {opening} call{} {closing}\ncall: {any}\n", if parallel { "+" } else { "" })
            }
            Self::QwenCoder | Self::Glm if parallel => {
                format!("start: call (\"\\n\" call){more}\ncall: {opening} ({any}) {closing}\n")
            }
            Self::QwenCoder | Self::Glm => format!("start: {opening} ({any}) {closing}\n"),
        }
    }
}

/// Whether a schema wants a text.
fn is_text(schema: &Value) -> bool {
    match &schema["type"] {
        Value::String(kind) => kind == "string",
        Value::Array(kinds) => kinds.iter().any(|kind| kind == "string"),
        _ => schema["enum"].as_array().is_some_and(|values| values.iter().all(Value::is_string)),
    }
}

/// The arguments in a call; none if a tag is broken.
fn arguments(form: &Form, mut text: &str, tool: Option<&Tool>) -> Option<Map<String, Value>> {
    let [open, middle, close] = form.argument.map(str::trim);
    let mut all = Map::new();
    while let Some((_, rest)) = text.split_once(open) {
        // Between a key and its value there may be any white space.
        let (key, rest) = match middle.split_once('\n') {
            None => rest.split_once(middle)?,
            Some((end, begin)) => {
                let (key, rest) = rest.split_once(end)?;
                (key, rest.trim_start().strip_prefix(begin)?)
            }
        };
        let (value, rest) = rest.split_once(close)?;
        text = rest;
        let key = key.trim().to_string();
        let schema = tool.map(|tool| &tool.parameters["properties"][&key]);
        // The line breaks next to the tags belong to them.
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        let parsed = || serde_json::from_str(value.trim()).unwrap_or_else(|_| Value::String(value.to_string()));
        let value = match schema {
            Some(schema) if is_text(schema) => Value::String(value.to_string()),
            _ => parsed(),
        };
        all.insert(key, value);
    }
    Some(all)
}
