//! Calls of tools, in the forms that the families of models were trained to write.
//!
//! - Hermes and Qwen: `<tool_call>\n{"name": …, "arguments": …}\n</tool_call>`, one after the other;
//! - Mistral: `[TOOL_CALLS]` and a list of such objects, in later models `[TOOL_CALLS]name[ARGS]{…}`;
//! - gpt-oss: a message to the tool, see [`super::harmony`];
//! - Llama 3: the whole answer is `{"name": …, "parameters": …}`, perhaps behind `<|python_tag|>`.
//!
//! A model whose template knows no tools is told of them, and of Hermes' form, in a system message.

use moebius_engine::{ChatTemplate, Grammar, Tokenizer};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::ApiError;

/// Tools that a request may offer.
const MOST_TOOLS: usize = 128;

/// How a model writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// Hermes' form. `told` says whether the template itself tells of the tools.
    Hermes {
        /// False where a system message has to.
        told: bool,
    },
    /// Mistral's list, or with `named` the later form.
    Mistral {
        /// `[TOOL_CALLS]name[ARGS]{…}`.
        named: bool,
    },
    /// Llama's object.
    Llama,
    /// A message in a channel.
    Harmony,
}

impl ToolFormat {
    /// The form that a template shows.
    pub fn of(template: Option<&ChatTemplate>) -> Self {
        let source = template.map_or("", ChatTemplate::source);
        match source {
            source if source.contains("<|channel|>") => Self::Harmony,
            source if source.contains("[TOOL_CALLS]") => Self::Mistral { named: source.contains("[ARGS]") },
            source if source.contains("<tool_call>") => Self::Hermes { told: true },
            source if source.contains("<|python_tag|>") || source.contains("\"parameters\": dictionary") => Self::Llama,
            _ => Self::Hermes { told: false },
        }
    }

    /// Whether the answer has special tokens that must be part of the text; `offered` says whether there are tools.
    pub fn has_special(self, offered: bool) -> bool {
        self == Self::Harmony || (offered && matches!(self, Self::Mistral { .. }))
    }

    /// Where a call begins in the text.
    pub fn opening(self) -> &'static str {
        match self {
            Self::Hermes { .. } => "<tool_call>",
            Self::Mistral { .. } => "[TOOL_CALLS]",
            Self::Llama => "<|python_tag|>",
            Self::Harmony => "<|channel|>",
        }
    }

    /// Where it ends, if it does before the answer does.
    pub fn closing(self) -> Option<&'static str> {
        matches!(self, Self::Hermes { .. }).then_some("</tool_call>")
    }

    /// The calls in what stands between opening and closing; `None` if there is none.
    pub fn parse(self, text: &str) -> Option<Vec<Call>> {
        let text = text.trim();
        if let Self::Mistral { .. } = self
            && let Some((name, arguments)) = text.split_once("[ARGS]").or_else(|| text.split_once('{'))
            && !name.trim().is_empty()
            && !name.contains(['[', '"'])
        {
            let arguments = if text.contains("[ARGS]") { arguments.to_string() } else { format!("{{{arguments}") };
            let arguments: Value = serde_json::from_str(arguments.trim()).ok()?;
            return Some(vec![Call { name: name.trim().to_string(), arguments: arguments.to_string() }]);
        }
        let value: Value = serde_json::from_str(text).ok()?;
        let calls: Vec<&Value> = match &value {
            Value::Array(calls) => calls.iter().collect(),
            value => vec![value],
        };
        let calls: Option<Vec<Call>> = calls.into_iter().map(Call::from_json).collect();
        calls.filter(|calls| !calls.is_empty())
    }

    /// A grammar for an answer that calls one of the tools, or with `parallel` several.
    pub fn grammar(self, tools: &[Tool], parallel: bool, tokenizer: &Tokenizer) -> Grammar {
        let mut rules = String::new();
        let mark = |name: &str| token(&format!("<|{name}|>"), tokenizer);
        let key = if self == Self::Llama { "parameters" } else { "arguments" };
        let names: Vec<String> = (0..tools.len()).map(|index| format!("tool_{index}")).collect();
        for (index, tool) in tools.iter().enumerate() {
            let name = Value::String(tool.name.clone()).to_string();
            let (before, after) = match self {
                Self::Mistral { named: true } => {
                    (format!("{} {}", quoted(&tool.name), token("[ARGS]", tokenizer)), String::new())
                }
                Self::Harmony => {
                    let header = quoted(&format!("commentary to=functions.{} ", tool.name));
                    (format!("{header} {} \"json\" {}", mark("constrain"), mark("message")), String::new())
                }
                _ => (quoted(&format!("{{\"name\": {name}, \"{key}\": ")), quoted("}")),
            };
            rules.push_str(&format!("tool_{index}: {before} arguments_{index} {after}\n"));
            rules.push_str(&format!("arguments_{index}: %json {}\n", tool.parameters));
        }
        let any = names.join(" | ");
        let start = match self {
            Self::Hermes { .. } => {
                let more = if parallel { " (\"\\n\" call)*" } else { "" };
                format!("start: call{more}\ncall: \"<tool_call>\\n\" ({any}) \"\\n</tool_call>\"\n")
            }
            Self::Mistral { named: true } => format!("start: {} ({any})\n", token("[TOOL_CALLS]", tokenizer)),
            Self::Mistral { named: false } => {
                let more = if parallel { "(\", \" call)*" } else { "" };
                let opening = token("[TOOL_CALLS]", tokenizer);
                format!("start: {opening} \"[\" call {more} \"]\"\ncall: {any}\n")
            }
            Self::Llama => format!("start: {any}\n"),
            Self::Harmony => format!("start: {} ({any})\n", mark("channel")),
        };
        Grammar::Lark(start + &rules)
    }
}

/// A text in Lark's quotes.
fn quoted(text: &str) -> String {
    Value::String(text.to_string()).to_string()
}

/// A special token by its number, or the text where it is none.
fn token(name: &str, tokenizer: &Tokenizer) -> String {
    let special = tokenizer.special_tokens();
    let found = special.iter().find(|(_, special)| special == name);
    found.map_or_else(|| quoted(name), |(id, _)| format!("<[{id}]>"))
}

/// A call that a model wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// The tool.
    pub name: String,
    /// Its arguments, JSON as text.
    pub arguments: String,
}

impl Call {
    fn from_json(value: &Value) -> Option<Self> {
        let value = value.get("function").filter(|function| function.is_object()).unwrap_or(value);
        let name = value["name"].as_str()?.to_string();
        let arguments = match value.get("arguments").or_else(|| value.get("parameters")) {
            None | Some(Value::Null) => "{}".to_string(),
            Some(Value::String(text)) => text.clone(),
            Some(arguments) => arguments.to_string(),
        };
        Some(Self { name, arguments })
    }
}

/// A tool that a request offers.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub description: Option<String>,
    /// A JSON schema of its arguments.
    pub parameters: Value,
}

impl Tool {
    /// Reads a list of tools in the form of conversations: `{"type": "function", "function": {…}}`.
    ///
    /// # Errors
    /// 400 with the place.
    pub fn list(tools: Option<Vec<Value>>) -> Result<Vec<Self>, ApiError> {
        let tools = tools.unwrap_or_default();
        if tools.len() > MOST_TOOLS {
            let message = format!("Invalid 'tools': wanted at most {MOST_TOOLS}, found {}.", tools.len());
            return Err(ApiError::invalid("tools", message));
        }
        let read = |(index, tool): (usize, &Value)| {
            let at = format!("tools[{index}]");
            if tool["type"] != "function" {
                let message = format!("Invalid '{at}.type': wanted \"function\", found {}.", tool["type"]);
                return Err(ApiError::unsupported(format!("{at}.type"), message));
            }
            let function = if tool["function"].is_object() { &tool["function"] } else { tool };
            Self::read(function, "parameters", &at)
        };
        tools.iter().enumerate().map(read).collect()
    }

    /// Reads one; `key` is where its schema stands.
    ///
    /// # Errors
    /// 400 with the place.
    pub fn read(function: &Value, key: &str, at: &str) -> Result<Self, ApiError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        let name = function["name"].as_str().filter(|name| (1..=64).contains(&name.len()) && name.chars().all(allowed));
        let Some(name) = name else {
            let message = format!("Invalid '{at}.name': wanted 1 to 64 letters, digits, `_`, `-` or `.`.");
            return Err(ApiError::invalid(format!("{at}.name"), message));
        };
        let parameters = match &function[key] {
            Value::Null => json!({"type": "object", "properties": {}}),
            schema @ Value::Object(_) => schema.clone(),
            _ => return Err(ApiError::invalid(format!("{at}.{key}"), "Wanted a JSON schema.")),
        };
        let description = function["description"].as_str().map(str::to_string);
        Ok(Self { name: name.to_string(), description, parameters })
    }

    /// As templates want it.
    pub fn for_template(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".into(), self.name.clone().into());
        if let Some(description) = &self.description {
            function.insert("description".into(), description.clone().into());
        }
        function.insert("parameters".into(), self.parameters.clone());
        json!({"type": "function", "function": function})
    }
}

/// What a request says about calling.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum ToolChoice {
    /// The model decides.
    #[default]
    Auto,
    /// No call.
    None,
    /// Some call.
    Required,
    /// A call of this tool.
    Named(String),
}

/// The field `tool_choice`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum ToolChoiceField {
    /// `none`, `auto` or `required`.
    Word(String),
    /// An object that names a tool.
    Object(Value),
}

impl ToolChoice {
    /// Reads the field.
    ///
    /// # Errors
    /// 400 for another word, or a tool that is not offered.
    pub fn read(field: Option<ToolChoiceField>, tools: &[Tool]) -> Result<Self, ApiError> {
        let wrong = |message: String| Err(ApiError::invalid("tool_choice", message));
        let choice = match field {
            None => Self::Auto,
            Some(ToolChoiceField::Word(word)) => match &word[..] {
                "auto" => Self::Auto,
                "none" => Self::None,
                "required" => Self::Required,
                _ => return wrong(format!("Invalid 'tool_choice': wanted none, auto or required, found {word:?}.")),
            },
            Some(ToolChoiceField::Object(object)) => {
                let name = object["function"]["name"].as_str().or_else(|| object["name"].as_str());
                match name.filter(|_| object["type"] == "function") {
                    Some(name) => Self::Named(name.to_string()),
                    None => {
                        return wrong("Invalid 'tool_choice': wanted an object of type `function` with a name.".into());
                    }
                }
            }
        };
        match &choice {
            Self::Named(name) if !tools.iter().any(|tool| tool.name == *name) => {
                wrong(format!("Invalid 'tool_choice': no tool is called {name:?}."))
            }
            Self::Required if tools.is_empty() => wrong("Invalid 'tool_choice': `required` wants tools.".into()),
            _ => Ok(choice),
        }
    }

    /// Of the tools, those that must be called; none where nothing must.
    pub fn forced<'t>(&self, tools: &'t [Tool]) -> Vec<&'t Tool> {
        match self {
            Self::Auto | Self::None => Vec::new(),
            Self::Required => tools.iter().collect(),
            Self::Named(name) => tools.iter().filter(|tool| tool.name == *name).collect(),
        }
    }
}

/// What a model hears of tools whose template has no place for them.
pub fn instructions(tools: &[Tool]) -> String {
    let list: String = tools.iter().map(|tool| format!("{}\n", tool.for_template())).collect();
    format!(
        "You may call one or more functions. You are provided with function signatures within <tools></tools> tags:\n\
         <tools>\n{list}</tools>\n\nFor each function call, return a JSON object with the function's name and its arguments \
         within <tool_call></tool_call> tags:\n<tool_call>\n{{\"name\": <name>, \"arguments\": <arguments>}}\n</tool_call>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str, arguments: &str) -> Call {
        Call { name: name.into(), arguments: arguments.into() }
    }

    #[test]
    fn each_family_writes_calls_its_way() {
        let hermes = ToolFormat::Hermes { told: true };
        assert_eq!(
            hermes.parse("\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n"),
            Some(vec![call("f", "{\"x\":1}")])
        );
        assert_eq!(hermes.parse("{\"name\": \"f\"}"), Some(vec![call("f", "{}")]));
        assert_eq!(hermes.parse("{\"title\": \"f\"}"), None);
        assert_eq!(hermes.parse("[]"), None);
        let list = ToolFormat::Mistral { named: false };
        assert_eq!(
            list.parse(" [{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"g\", \"arguments\": {\"y\": [2]}}]"),
            Some(vec![call("f", "{}"), call("g", "{\"y\":[2]}")])
        );
        let named = ToolFormat::Mistral { named: true };
        assert_eq!(named.parse("f[ARGS]{\"x\": 1}"), Some(vec![call("f", "{\"x\":1}")]));
        assert_eq!(named.parse("f{\"x\": 1}"), Some(vec![call("f", "{\"x\":1}")]));
        assert_eq!(
            ToolFormat::Llama.parse("{\"name\": \"f\", \"parameters\": {\"x\": 1}}"),
            Some(vec![call("f", "{\"x\":1}")])
        );
    }

    #[test]
    fn tools_and_choices_are_checked() {
        let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
        let tools = Tool::list(Some(vec![tool("f"), tool("g")])).unwrap();
        assert_eq!(tools[0].parameters["type"], "object");
        for wrong in [tool(""), tool("a b"), json!({"type": "other"}), json!(7)] {
            assert!(Tool::list(Some(vec![wrong])).is_err());
        }
        let read = |field: Value| ToolChoice::read(serde_json::from_value(field).unwrap(), &tools).ok();
        assert_eq!(read(json!("required")), Some(ToolChoice::Required));
        assert_eq!(read(json!({"type": "function", "function": {"name": "g"}})), Some(ToolChoice::Named("g".into())));
        assert_eq!(read(json!({"type": "function", "name": "g"})), Some(ToolChoice::Named("g".into())));
        for wrong in
            [json!("perhaps"), json!({"type": "function", "function": {"name": "h"}}), json!({"type": "custom"})]
        {
            assert_eq!(read(wrong), None);
        }
        assert_eq!(ToolChoice::Required.forced(&tools).len(), 2);
    }
}
