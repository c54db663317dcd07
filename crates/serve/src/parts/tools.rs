//! Tools that requests offer, and whether they must be called.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::ApiError;

/// Tools that a request may offer.
const MOST_TOOLS: usize = 128;

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
