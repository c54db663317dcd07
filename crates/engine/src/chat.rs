//! A conversation as the one text that its model was trained on, by the Jinja template that the model ships.
//!
//! Rendering follows transformers' `apply_chat_template`: the same names, filters and white-space rules. A template is
//! a stranger's program: it computes within a budget, reaches no file and no other template, and what is wrong with it
//! is reported with its file and line.

mod python;

use std::collections::BTreeMap;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value as TemplateValue};
use serde_json::{Map, Value, json};

use crate::EngineError;

/// One message: a JSON object with a `role`, and what else its template knows: `content` as text or as a list of parts,
/// `tool_calls`, `reasoning_content`, `name`, `tool_call_id`.
#[derive(Clone, Debug, PartialEq)]
pub struct Message(Map<String, Value>);

impl Message {
    /// A message of text.
    pub fn text(role: &str, content: &str) -> Self {
        Self(Map::from_iter([("role".to_string(), json!(role)), ("content".to_string(), json!(content))]))
    }

    /// Takes an object as it comes from a request; `None` if it is no object with a role.
    pub fn from_json(message: Value) -> Option<Self> {
        match message {
            Value::Object(fields) if fields.get("role").is_some_and(Value::is_string) => Some(Self(fields)),
            _ => None,
        }
    }

    /// Who speaks.
    pub fn role(&self) -> &str {
        self.0["role"].as_str().unwrap_or_default()
    }

    /// The text, where the content is one.
    pub fn content(&self) -> Option<&str> {
        self.0.get("content").and_then(Value::as_str)
    }

    /// What the template sees: thoughts stand under every name that templates read them by.
    fn for_template(&self) -> Value {
        let names = ["reasoning_content", "thinking", "reasoning"];
        let thoughts = names.iter().find_map(|name| self.0.get(*name).filter(|value| !value.is_null()));
        let Some(thoughts) = thoughts else { return Value::Object(self.0.clone()) };
        let mut fields = Map::from_iter([("thinking".to_string(), thoughts.clone())]);
        fields.extend(self.0.clone());
        fields.insert("reasoning_content".into(), thoughts.clone());
        Value::Object(fields)
    }
}

/// What is to be rendered.
#[derive(Clone, Debug, Default)]
pub struct Conversation<'c> {
    /// The messages, oldest first.
    pub messages: &'c [Message],
    /// Tools as JSON schemas, in the form that OpenAI's API has them.
    pub tools: &'c [Value],
    /// Whether the text ends where the answer begins.
    pub add_generation_prompt: bool,
    /// Variables that only some templates know, like `enable_thinking`.
    pub variables: Map<String, Value>,
}

/// A chat template with the special tokens that it names.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// The file and, of several templates, the one's name.
    name: String,
    has_tool_use: bool,
    special: BTreeMap<String, String>,
}

/// Names inside the environment.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
/// Steps that any conversation may take. A step is an instruction or 64 bytes made.
const FUEL: u64 = 500_000;
/// Further steps for each byte of the conversation.
const FUEL_A_BYTE: u64 = 16;
/// No conversation takes more.
const MOST_FUEL: u64 = 4_000_000;
/// A template may put lists into lists, one level in about eight steps, and dropping them takes stack for each level.
/// Rendering has a stack for the deepest that the steps allow; memory is used only where it is reached.
const STACK: usize = 512 << 20;
/// A larger template is no template.
const LONGEST: usize = 1 << 20;

impl ChatTemplate {
    /// Takes a template; `name` stands in messages.
    ///
    /// # Errors
    /// [`EngineError::Template`] with the line that is no Jinja.
    pub fn new(source: &str, name: &str) -> Result<Self, EngineError> {
        Self::from_json(&json!(source), name)
    }

    /// Takes what stands under `chat_template`: a template, or a list of named ones, of which `tool_use` serves
    /// conversations with tools and `default` the others.
    ///
    /// # Errors
    /// [`EngineError::Template`]: another kind of value, no default among the named, a line that is no Jinja.
    pub fn from_json(source: &Value, name: &str) -> Result<Self, EngineError> {
        let mut template = Self {
            environment: environment(),
            source: String::new(),
            name: name.to_string(),
            has_tool_use: false,
            special: BTreeMap::new(),
        };
        match source {
            Value::String(text) => {
                template.add(DEFAULT, text)?;
                template.source.clone_from(text);
            }
            Value::Array(entries) => {
                for entry in entries {
                    let (Some(key), Some(text)) = (entry["name"].as_str(), entry["template"].as_str()) else {
                        return Err(template.wrong("wanted named templates, each with `name` and `template`"));
                    };
                    match key {
                        DEFAULT => {
                            template.add(DEFAULT, text)?;
                            template.source = text.to_string();
                        }
                        TOOL_USE => {
                            template.add(TOOL_USE, text)?;
                            template.has_tool_use = true;
                        }
                        _ => {}
                    }
                }
                if template.environment.get_template(DEFAULT).is_err() {
                    return Err(template.wrong("wanted one named `default` among the templates, found none"));
                }
            }
            _ => return Err(template.wrong("wanted a text or a list of named templates")),
        }
        Ok(template)
    }

    /// The template of a model's folder: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json` or
    /// `chat_template.json`; `None` if there is none. Special tokens come from `tokenizer_config.json` and
    /// `special_tokens_map.json`.
    ///
    /// # Errors
    /// [`EngineError::Template`] for files that cannot be read, are no JSON or hold no usable template.
    pub fn from_folder(folder: &Path) -> Result<Option<Self>, EngineError> {
        let config = json_file(&folder.join("tokenizer_config.json"))?;
        let map = json_file(&folder.join("special_tokens_map.json"))?;
        let jinja = folder.join("chat_template.jinja");
        let found = if jinja.exists() {
            let name = jinja.display().to_string();
            let text = std::fs::read_to_string(&jinja).map_err(|error| unreadable(&name, &error))?;
            Some(Self::new(&text, &name)?)
        } else {
            let files = [("tokenizer_config.json", config.clone()), ("chat_template.json", None)];
            let mut found = None;
            for (file, json) in files {
                let path = folder.join(file);
                let json = if json.is_some() { json } else { json_file(&path)? };
                let source = json.as_ref().map_or(&Value::Null, |json| &json["chat_template"]);
                if found.is_none() && !source.is_null() {
                    found = Some(Self::from_json(source, &path.display().to_string())?);
                }
            }
            found
        };
        Ok(found.map(|mut template| {
            for source in [map, config].iter().flatten() {
                template.take_special(source);
            }
            template
        }))
    }

    /// The text of the template, of several the default one's.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Names a special token, `bos_token` for one, that the template may use.
    #[must_use]
    pub fn with_special(mut self, name: &str, token: &str) -> Self {
        self.special.insert(name.to_string(), token.to_string());
        self
    }

    /// The text of a special token, by its name: `eos_token`.
    pub fn special(&self, name: &str) -> Option<&str> {
        self.special.get(name).map(String::as_str)
    }

    /// The texts of all special tokens, by name.
    pub fn specials(&self) -> &BTreeMap<String, String> {
        &self.special
    }

    /// Takes over the special tokens of another template.
    #[must_use]
    pub fn with_specials_of(mut self, other: &Self) -> Self {
        self.special.clone_from(&other.special);
        self
    }

    /// Writes the conversation as one text. The tokenizer should add no special tokens to it.
    ///
    /// # Errors
    /// [`EngineError::Template`]: what the template says against the conversation, an operation that does not exist, or
    /// a template that computes without end.
    pub fn render(&self, conversation: &Conversation) -> Result<String, EngineError> {
        let messages: Vec<Value> = conversation.messages.iter().map(Message::for_template).collect();
        let messages = Value::Array(messages);
        let tools = (!conversation.tools.is_empty()).then(|| Value::Array(conversation.tools.to_vec()));
        let bytes = messages.to_string().len() + tools.as_ref().map_or(0, |tools| tools.to_string().len());
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(MOST_FUEL.min(FUEL + FUEL_A_BYTE * bytes as u64)));
        let key = if tools.is_some() && self.has_tool_use { TOOL_USE } else { DEFAULT };
        let special = self.special.iter().map(|(name, token)| (name.as_str(), TemplateValue::from(token.as_str())));
        let variables = conversation.variables.iter().map(|(name, value)| (name.as_str(), python::value(value)));
        let own = [
            ("messages", python::value(&messages)),
            ("tools", tools.as_ref().map(python::value).into()),
            ("documents", TemplateValue::from(())),
            ("add_generation_prompt", conversation.add_generation_prompt.into()),
        ];
        let context = TemplateValue::from_pairs(special.chain(variables).chain(own));
        let template = environment.get_template(key).map_err(|error| self.failed(&error))?;
        let work = || template.render(context).map_err(|error| self.failed(&error));
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK);
            match thread.spawn_scoped(scope, work) {
                Ok(thread) => thread.join().unwrap_or_else(|_| Err(self.wrong("the template engine failed"))),
                Err(error) => Err(self.wrong(&format!("no thread to render it in: {error}"))),
            }
        })
    }

    fn add(&mut self, key: &'static str, source: &str) -> Result<(), EngineError> {
        if source.len() > LONGEST {
            return Err(self.wrong(&format!("wanted at most {LONGEST} bytes, found {}", source.len())));
        }
        let source = python::without_generation_tags(source);
        let added = self.environment.add_template_owned(key, source);
        added.map_err(|error| self.failed(&error))
    }

    fn take_special(&mut self, config: &Value) {
        for name in ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"] {
            let token = config[name].as_str().or_else(|| config[name]["content"].as_str());
            if let Some(token) = token {
                self.special.insert(name.to_string(), token.to_string());
            }
        }
    }

    fn wrong(&self, reason: &str) -> EngineError {
        EngineError::Template { name: self.name.clone(), line: None, reason: reason.to_string() }
    }

    fn failed(&self, error: &minijinja::Error) -> EngineError {
        let mut reason = match error.kind() {
            ErrorKind::OutOfFuel => "it computes too long, or makes too much text".to_string(),
            kind => error.detail().map_or_else(|| kind.to_string(), str::to_string),
        };
        let mut cause = std::error::Error::source(error);
        while let Some(inner) = cause {
            reason = format!("{reason}: {inner}");
            cause = inner.source();
        }
        let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
        EngineError::Template { name: self.name.clone(), line: error.line(), reason }
    }
}

/// Jinja as transformers sets it up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the usual delimiters"));
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(python::method);
    environment.set_formatter(python::print);
    environment.add_test("iterable", python::is_iterable);
    environment.add_filter("string", python::string);
    environment.add_filter("tojson", python::to_json);
    environment.add_function("raise_exception", python::raise_exception);
    environment.add_function("strftime_now", python::time_now);
    environment
}

/// A JSON file, `None` if it does not exist.
fn json_file(path: &Path) -> Result<Option<Value>, EngineError> {
    let name = path.display().to_string();
    match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(&name, &error)),
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| EngineError::Template {
            name,
            line: None,
            reason: format!("the file is no JSON: {error}"),
        }),
    }
}

fn unreadable(name: &str, error: &std::io::Error) -> EngineError {
    EngineError::Template { name: name.to_string(), line: None, reason: format!("cannot read the file: {error}") }
}
