//! Calls of tools, in the forms that the families of models were trained to write.
//!
//! - Hermes, Qwen, Granite 4: `<tool_call>\n{"name": …, "arguments": …}\n</tool_call>`, one after the other;
//! - Qwen3-Coder, GLM-4.5, MiniMax-M2: tags for the name and each argument, see [`tags`];
//! - Mistral: `[TOOL_CALLS]` and a list of such objects, in later models `[TOOL_CALLS]name[ARGS]{…}`; Granite 3 the same
//!   behind `<|tool_call|>`;
//! - DeepSeek, Kimi-K2: a section of calls between special tokens, see [`sections`];
//! - gpt-oss: a message to the tool, see [`super::harmony`];
//! - Llama 3: the whole answer is `{"name": …, "parameters": …}`, perhaps behind `<|python_tag|>`; Llama 4 writes that, or
//!   `[name(argument=value), …]`, which LFM2 writes between tokens of its own, see [`python`].
//!
//! A model whose template knows no tools is told of them, and of Hermes' form, in a system message.

mod python;
mod sections;
mod tags;

use moebius_engine::{ChatTemplate, Grammar, Tokenizer};
use serde_json::Value;

use super::tools::Tool;
use sections::Section;
use tags::Tags;

/// How a model writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// Hermes' form. `told` says whether the template itself tells of the tools.
    Hermes {
        /// False where a system message has to.
        told: bool,
    },
    /// A tag for each argument.
    Tagged(Tags),
    /// Mistral's list, or with `named` the later form.
    Mistral {
        /// `[TOOL_CALLS]name[ARGS]{…}`.
        named: bool,
    },
    /// Granite's list.
    Granite,
    /// Calls between special tokens.
    Section(Section),
    /// Llama's object, or list of Python's calls.
    Llama,
    /// LFM's list of Python's calls.
    Lfm,
    /// A message in a channel.
    Harmony,
}

impl ToolFormat {
    /// The form that a template shows.
    pub fn of(template: Option<&ChatTemplate>) -> Self {
        let source = template.map_or("", ChatTemplate::source);
        let has = |mark: &str| source.contains(mark);
        match () {
            () if has("<|channel|>") => Self::Harmony,
            () if has("[TOOL_CALLS]") => Self::Mistral { named: has("[ARGS]") },
            () if has("<｜tool▁calls▁begin｜>") => Self::Section(Section::DeepSeek { fenced: has("```json") }),
            () if has("<|tool_calls_section_begin|>") => Self::Section(Section::Kimi),
            () if has("minimax:tool_call>") => Self::Tagged(Tags::MiniMax),
            () if has("<function=") && has("<parameter=") => Self::Tagged(Tags::QwenCoder),
            () if has("<arg_key>") => Self::Tagged(Tags::Glm),
            () if has("<|tool_call_start|>") || has("<|tool_list_start|>") => Self::Lfm,
            () if has("<|tool_call|>") => Self::Granite,
            () if has("<tool_call>") => Self::Hermes { told: true },
            () if has("<|python_tag|>") || has("<|python_start|>") || has("\"parameters\": dictionary") => Self::Llama,
            () => Self::Hermes { told: false },
        }
    }

    /// Whether the answer has special tokens that must be part of the text; `offered` says whether there are tools.
    pub fn has_special(self, offered: bool) -> bool {
        let marked = matches!(self, Self::Mistral { .. } | Self::Granite | Self::Section(_) | Self::Lfm);
        self == Self::Harmony || (offered && marked)
    }

    /// Where a call, or a section of them, begins in the text.
    pub fn opening(self) -> &'static str {
        match self {
            Self::Hermes { .. } => "<tool_call>",
            Self::Tagged(tags) => tags.opening(),
            Self::Mistral { .. } => "[TOOL_CALLS]",
            Self::Granite => "<|tool_call|>",
            Self::Section(section) => section.opening(),
            Self::Llama => "<|python_tag|>",
            Self::Lfm => "<|tool_call_start|>",
            Self::Harmony => "<|channel|>",
        }
    }

    /// Where it ends, if it does before the answer does.
    pub fn closing(self) -> Option<&'static str> {
        match self {
            Self::Hermes { .. } => Some("</tool_call>"),
            Self::Tagged(tags) => Some(tags.closing()),
            Self::Section(section) => Some(section.closing()),
            Self::Lfm => Some("<|tool_call_end|>"),
            Self::Mistral { .. } | Self::Granite | Self::Llama | Self::Harmony => None,
        }
    }

    /// Whether an answer that begins so is a call without a mark.
    pub fn begins(self, answer: &str) -> bool {
        self == Self::Llama && answer.starts_with(['{', '['])
    }

    /// The calls in what stands between opening and closing; `None` if there is none. The tools' schemas say which
    /// arguments are texts where the form does not.
    pub fn parse(self, text: &str, tools: &[Tool]) -> Option<Vec<Call>> {
        let text = text.trim();
        let calls = match self {
            Self::Tagged(tags) => tags.parse(text, tools),
            Self::Section(section) => section.parse(text),
            Self::Lfm => python::parse(text),
            Self::Mistral { .. } => named(text).map(|call| vec![call]).or_else(|| objects(text)),
            Self::Llama => python::parse(text).or_else(|| objects(text)),
            Self::Hermes { .. } | Self::Granite | Self::Harmony => objects(text),
        };
        calls.filter(|calls| !calls.is_empty())
    }

    /// A grammar for an answer that calls one of the tools, or with `parallel` several.
    pub fn grammar(self, tools: &[Tool], parallel: bool, tokenizer: &Tokenizer) -> Grammar {
        let special = |name: &str| token(name, tokenizer);
        let names: Vec<String> = (0..tools.len()).map(|index| format!("tool_{index}")).collect();
        let mut rules = String::new();
        for (index, tool) in tools.iter().enumerate() {
            let (call, more) = match self {
                Self::Tagged(tags) => tags.rules(index, tool),
                Self::Lfm => python::rules(index, tool),
                _ => {
                    let (before, after) = self.around_arguments(tool, &special);
                    (
                        format!("{before} arguments_{index} {after}"),
                        format!("arguments_{index}: %json {}\n", tool.parameters),
                    )
                }
            };
            rules.push_str(&format!("tool_{index}: {call}\n{more}"));
        }
        let any = names.join(" | ");
        let repeated = |between: &str| if parallel { format!(" ({} call)*", quoted(between)) } else { String::new() };
        let start = match self {
            Self::Hermes { .. } => {
                format!("start: call{}\ncall: \"<tool_call>\\n\" ({any}) \"\\n</tool_call>\"\n", repeated("\n"))
            }
            Self::Tagged(tags) => tags.start(&any, parallel),
            Self::Mistral { named: true } => format!("start: {} ({any})\n", special("[TOOL_CALLS]")),
            Self::Mistral { named: false } | Self::Granite => {
                let opening = special(self.opening());
                format!("start: {opening} \"[\" call{} \"]\"\ncall: {any}\n", repeated(", "))
            }
            Self::Section(section) => {
                let (opening, closing) = (special(section.opening()), special(section.closing()));
                let more = if parallel { " call*" } else { "" };
                format!("start: {opening} call{more} {closing}\ncall: {any}\n")
            }
            Self::Lfm => {
                let (opening, closing) = (special("<|tool_call_start|>"), special("<|tool_call_end|>"));
                format!("start: {opening} \"[\" call{} \"]\" {closing}\ncall: {any}\n", repeated(", "))
            }
            Self::Llama => format!("start: {any}\n"),
            Self::Harmony => format!("start: {} ({any})\n", special("<|channel|>")),
        };
        Grammar::Lark(start + &rules)
    }

    /// What stands before and after the JSON object of a call's arguments.
    fn around_arguments(self, tool: &Tool, special: &dyn Fn(&str) -> String) -> (String, String) {
        let name = Value::String(tool.name.clone()).to_string();
        match self {
            Self::Mistral { named: true } => (format!("{} {}", quoted(&tool.name), special("[ARGS]")), String::new()),
            Self::Section(section) => section.around_arguments(&tool.name, special),
            Self::Harmony => {
                let header = quoted(&format!("commentary to=functions.{} ", tool.name));
                let (constrain, message) = (special("<|constrain|>"), special("<|message|>"));
                (format!("{header} {constrain} \"json\" {message}"), String::new())
            }
            _ => {
                let key = if self == Self::Llama { "parameters" } else { "arguments" };
                (quoted(&format!("{{\"name\": {name}, \"{key}\": ")), quoted("}"))
            }
        }
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

/// Mistral's later form: a name, and an object behind a mark or at once.
fn named(text: &str) -> Option<Call> {
    let (name, arguments) = match text.split_once("[ARGS]") {
        Some((name, arguments)) => (name, arguments),
        None => text.split_at(text.find('{')?),
    };
    let is_name = !name.trim().is_empty() && !name.contains(['[', '"']);
    let arguments: Value = serde_json::from_str(arguments.trim()).ok().filter(|_| is_name)?;
    Some(Call { name: name.trim().to_string(), arguments: arguments.to_string() })
}

/// Calls as JSON: an object, a list of them, or several one after the other, as Llama writes with `;` between.
fn objects(text: &str) -> Option<Vec<Call>> {
    let (mut calls, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        match values.next()?.ok()? {
            Value::Array(list) => calls.extend(list.iter().map(Call::from_json).collect::<Option<Vec<Call>>>()?),
            value => calls.push(Call::from_json(&value)?),
        }
        rest = rest[values.byte_offset()..].trim_start_matches(|c: char| c.is_whitespace() || c == ';');
    }
    Some(calls)
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn call(name: &str, arguments: &str) -> Call {
        Call { name: name.into(), arguments: arguments.into() }
    }

    fn tools() -> Vec<Tool> {
        let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"]}, "places": {"type": "array"}}, "required": ["city"]});
        vec![Tool { name: "weather".into(), description: None, parameters }]
    }

    /// What a form reads, with a tool whose `city` is a text and whose `days` is a number.
    fn parse(format: ToolFormat, text: &str) -> Option<Vec<Call>> {
        format.parse(text, &tools())
    }

    #[test]
    fn json_forms_are_read() {
        let hermes = ToolFormat::Hermes { told: true };
        assert_eq!(
            parse(hermes, "\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n"),
            Some(vec![call("f", "{\"x\":1}")])
        );
        assert_eq!(parse(hermes, "{\"name\": \"f\"}"), Some(vec![call("f", "{}")]));
        assert_eq!(parse(hermes, "{\"title\": \"f\"}"), None);
        assert_eq!(parse(hermes, "[]"), None);
        let list = " [{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"g\", \"arguments\": {\"y\": [2]}}]";
        for format in [ToolFormat::Mistral { named: false }, ToolFormat::Granite] {
            assert_eq!(parse(format, list), Some(vec![call("f", "{}"), call("g", "{\"y\":[2]}")]));
        }
        let named = ToolFormat::Mistral { named: true };
        assert_eq!(parse(named, "f[ARGS]{\"x\": 1}"), Some(vec![call("f", "{\"x\":1}")]));
        assert_eq!(parse(named, "f{\"x\": 1}"), Some(vec![call("f", "{\"x\":1}")]));
        let llama = "{\"name\": \"f\", \"parameters\": {\"x\": 1}}";
        assert_eq!(parse(ToolFormat::Llama, llama), Some(vec![call("f", "{\"x\":1}")]));
        let two = format!("{llama}; {llama}");
        assert_eq!(parse(ToolFormat::Llama, &two), Some(vec![call("f", "{\"x\":1}"), call("f", "{\"x\":1}")]));
        assert_eq!(parse(ToolFormat::Llama, &format!("{llama} and so on")), None);
    }

    #[test]
    fn tagged_forms_are_read() {
        let wanted = |arguments: &str| Some(vec![call("weather", arguments)]);
        let qwen = ToolFormat::Tagged(Tags::QwenCoder);
        let text = "\n<function=weather>\n<parameter=city>\n12 < 13\nof it\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n";
        assert_eq!(parse(qwen, text), wanted("{\"city\":\"12 < 13\\nof it\",\"days\":3}"));
        assert_eq!(parse(qwen, "<function=weather>\n</function>"), wanted("{}"));
        assert_eq!(parse(qwen, "<function=weather>\n<parameter=city>\n12"), None);
        assert_eq!(parse(qwen, "weather"), None);
        let glm = ToolFormat::Tagged(Tags::Glm);
        let text = "weather\n<arg_key>city</arg_key>\n<arg_value>12</arg_value>\n<arg_key>places</arg_key>\n<arg_value>[1, 2]</arg_value>\n";
        assert_eq!(parse(glm, text), wanted("{\"city\":\"12\",\"places\":[1,2]}"));
        assert_eq!(parse(glm, "weather"), wanted("{}"));
        assert_eq!(parse(glm, "no call at all"), None);
        let minimax = ToolFormat::Tagged(Tags::MiniMax);
        let one = "<invoke name=\"weather\">\n<parameter name=\"city\">Rome</parameter>\n<parameter name=\"unit\">C</parameter>\n</invoke>";
        let arguments = "{\"city\":\"Rome\",\"unit\":\"C\"}";
        assert_eq!(parse(minimax, one), wanted(arguments));
        assert_eq!(parse(minimax, &format!("{one}\n{one}\n")).map(|calls| calls.len()), Some(2));
        // An unknown tool's values are read as JSON where they are it.
        let other = one.replace("weather", "other").replace("Rome", "4");
        assert_eq!(parse(minimax, &other), Some(vec![call("other", "{\"city\":4,\"unit\":\"C\"}")]));
    }

    #[test]
    fn sections_are_read() {
        let wanted = Some(vec![call("weather", "{\"city\":\"Rome\"}"), call("f", "{}")]);
        let old = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Rome\"}\n```<｜tool▁call▁end｜>\n\
                   <｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>";
        let new = "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Rome\"}<｜tool▁call▁end｜>\
                   <｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>";
        for text in [old, new] {
            assert_eq!(parse(ToolFormat::Section(Section::DeepSeek { fenced: true }), text), wanted);
        }
        let kimi = "<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{\"city\": \"Rome\"}<|tool_call_end|>\
                    <|tool_call_begin|>functions.f:1<|tool_call_argument_begin|>{}<|tool_call_end|>";
        let format = ToolFormat::Section(Section::Kimi);
        assert_eq!(parse(format, kimi), wanted);
        assert_eq!(parse(format, "<|tool_call_begin|>functions.f:1<|tool_call_argument_begin|>{"), None);
        assert_eq!(parse(format, "nothing"), None);
    }

    #[test]
    fn pythons_calls_are_read() {
        let text = "[weather(city=\"Rome \\\"A\\\" \\u00e9\", days=-3, places=['a', 2.5, True, None, {'k': []}]), f()]";
        let arguments = "{\"city\":\"Rome \\\"A\\\" é\",\"days\":-3,\"places\":[\"a\",2.5,true,null,{\"k\":[]}]}";
        let wanted = Some(vec![call("weather", arguments), call("f", "{}")]);
        assert_eq!(parse(ToolFormat::Lfm, text), wanted);
        assert_eq!(parse(ToolFormat::Llama, &format!("<|python_start|>{text}<|python_end|>")), wanted);
        for wrong in ["[f(]", "[f(x=)]", "[f(x=y)]", "[f(\"x\")]", "f()", "[f()", "[f()] and", "[1]", "[]", "[f(x='a)]"]
        {
            assert_eq!(parse(ToolFormat::Lfm, wrong), None, "{wrong}");
        }
        let deep = format!("[f(x={}1{})]", "[".repeat(1000), "]".repeat(1000));
        assert_eq!(parse(ToolFormat::Lfm, &deep), None);
    }

    #[test]
    fn templates_show_their_form() {
        let of = |source: &str| ToolFormat::of(Some(&ChatTemplate::new(source, "t").unwrap()));
        for (source, wanted) in [
            ("<tool_call>", ToolFormat::Hermes { told: true }),
            ("<tool_call>\n<function=a>\n<parameter=b>", ToolFormat::Tagged(Tags::QwenCoder)),
            ("<tool_call>{name}<arg_key>", ToolFormat::Tagged(Tags::Glm)),
            ("'<minimax:tool_call>'", ToolFormat::Tagged(Tags::MiniMax)),
            ("<｜tool▁calls▁begin｜>```json", ToolFormat::Section(Section::DeepSeek { fenced: true })),
            ("<｜tool▁calls▁begin｜>", ToolFormat::Section(Section::DeepSeek { fenced: false })),
            ("<|tool_calls_section_begin|>", ToolFormat::Section(Section::Kimi)),
            ("<|tool_call|>", ToolFormat::Granite),
            ("<|tool_list_start|>", ToolFormat::Lfm),
            ("<|python_start|>", ToolFormat::Llama),
            ("", ToolFormat::Hermes { told: false }),
        ] {
            assert_eq!(of(source), wanted, "{source}");
        }
    }
}
