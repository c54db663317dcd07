//! Texts and conversations become tokens, on threads that may take their time.

use moebius_engine::{Conversation, Message};
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::state::App;

/// What a conversation is rendered from.
#[derive(Default)]
pub struct Chat {
    /// Messages as OpenAI's API has them.
    pub messages: Vec<Value>,
    /// Tools as OpenAI's API has them.
    pub tools: Vec<Value>,
    /// Variables of the template.
    pub variables: Map<String, Value>,
}

/// A prompt, and what the template put at its end.
pub struct Rendered {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Whether the template has opened the model's thoughts: what it writes begins inside of them.
    pub in_thoughts: bool,
}

impl App {
    /// The tokens of a conversation, up to where the answer begins.
    ///
    /// # Errors
    /// 400: no template, messages that it cannot render.
    pub async fn render(&self, chat: Chat) -> Result<Rendered, ApiError> {
        let app = self.clone();
        blocking(move || {
            let Some(template) = &app.template else {
                return Err(ApiError::unsupported("messages", "This model has no chat template: use /v1/completions."));
            };
            let messages = chat.messages.into_iter().enumerate().map(|(index, message)| {
                let at = format!("messages[{index}]");
                let message = known_role(plain_content(message, &at)?, &at, template.source())?;
                Message::from_json(message).ok_or_else(|| ApiError::invalid(at, "Wanted an object with a `role`."))
            });
            let messages = messages.collect::<Result<Vec<_>, _>>()?;
            let conversation = Conversation {
                messages: &messages,
                tools: &chat.tools,
                add_generation_prompt: true,
                variables: chat.variables,
            };
            let text = template.render(&conversation)?;
            let in_thoughts = text.trim_end().ends_with("<think>");
            Ok(Rendered { tokens: app.tokenizer.encode_bare(&text)?, in_thoughts })
        })
        .await
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub async fn encode(&self, text: String, special: bool) -> Result<Vec<u32>, ApiError> {
        let app = self.clone();
        blocking(move || {
            let tokens = if special { app.tokenizer.encode(&text) } else { app.tokenizer.encode_bare(&text) };
            Ok(tokens?)
        })
        .await
    }
}

/// Runs what takes long on a thread of its own.
pub async fn blocking<R: Send + 'static>(
    work: impl FnOnce() -> Result<R, ApiError> + Send + 'static,
) -> Result<R, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ApiError::internal("a request's thread panicked")))
}

/// A message whose content is one text: templates of language models know no parts. Arguments of tool calls become
/// objects, which templates print as they like.
fn plain_content(mut message: Value, at: &str) -> Result<Value, ApiError> {
    match &message["content"] {
        Value::Null | Value::String(_) => {}
        Value::Array(parts) => {
            let text = parts.iter().enumerate().map(|(index, part)| {
                let kinds = ["text", "input_text", "output_text", "refusal"];
                match (part["type"].as_str(), part["text"].as_str().or_else(|| part["refusal"].as_str())) {
                    (Some(kind), Some(text)) if kinds.contains(&kind) => Ok(text),
                    (kind, _) => Err(ApiError::unsupported(
                        format!("{at}.content[{index}].type"),
                        format!(
                            "This model reads text only: wanted a part of type `text` with `text`, found {kind:?}."
                        ),
                    )),
                }
            });
            let text = text.collect::<Result<String, _>>()?;
            message["content"] = Value::String(text);
        }
        _ => return Err(ApiError::invalid(format!("{at}.content"), "Wanted a text or a list of parts.")),
    }
    if let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) {
        for call in calls {
            let arguments = call.get_mut("function").and_then(|function| function.get_mut("arguments"));
            if let Some(arguments) = arguments
                && let Some(object) = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok())
            {
                *arguments = object;
            }
        }
    }
    Ok(message)
}

/// A message whose role is one of OpenAI's, or of the template's own. A template that has no developers takes their words
/// as the system's.
fn known_role(mut message: Value, at: &str, template: &str) -> Result<Value, ApiError> {
    let known = ["system", "user", "assistant", "tool", "function"];
    let role = message["role"].as_str().unwrap_or_default();
    let named = |role: &str| [format!("'{role}'"), format!("\"{role}\"")].iter().any(|word| template.contains(word));
    if role.is_empty() || known.contains(&role) || named(role) {
        return Ok(message);
    }
    if role != "developer" {
        let message =
            format!("Wanted a role of {}, developer or the template's own, found {role:?}.", known.join(", "));
        return Err(ApiError::invalid(format!("{at}.role"), message));
    }
    message["role"] = "system".into();
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn parts_become_one_text() {
        let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
        assert_eq!(plain_content(parts, "m").unwrap()["content"], "ab");
        let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]});
        assert!(
            plain_content(image, "messages[0]").unwrap_err().object()["error"]["param"]
                == "messages[0].content[0].type"
        );
        assert!(plain_content(json!({"role": "user", "content": 7}), "m").is_err());
        let call = json!({"role": "assistant", "content": null,
            "tool_calls": [{"function": {"name": "f", "arguments": "{\"x\": 1}"}}]});
        assert_eq!(plain_content(call, "m").unwrap()["tool_calls"][0]["function"]["arguments"]["x"], 1);
    }

    #[test]
    fn roles_are_known() {
        let role = |role: &str, template: &str| known_role(json!({"role": role}), "messages[3]", template);
        assert_eq!(role("user", "").unwrap()["role"], "user");
        assert_eq!(role("developer", "").unwrap()["role"], "system");
        assert_eq!(role("developer", "{% if m.role == 'developer' %}").unwrap()["role"], "developer");
        assert!(role("ipython", "m.role == \"ipython\"").is_ok());
        let error = role("wizard", "").unwrap_err().object();
        assert_eq!(error["error"]["param"], "messages[3].role");
        assert!(error["error"]["message"].as_str().unwrap().contains("wizard"));
    }
}
