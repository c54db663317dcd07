//! Calls as Python writes them: `[name(key="text", other=[1, 2.5, None]), …]`.

use serde_json::{Map, Number, Value};

use super::super::tools::Tool;
use super::{Call, quoted};

/// How deep lists and dictionaries may stand inside each other.
const DEEPEST: usize = 32;

/// The calls of a list; none if the text is something else.
pub(super) fn parse(text: &str) -> Option<Vec<Call>> {
    let text = text.trim();
    let text = text.strip_prefix("<|python_start|>").unwrap_or(text).trim();
    let text = text.strip_suffix("<|python_end|>").unwrap_or(text).trim();
    let mut reader = Reader { rest: text };
    reader.take("[")?;
    let mut calls = Vec::new();
    loop {
        let name = reader.name(true)?;
        reader.take("(")?;
        let mut arguments = Map::new();
        while reader.take(")").is_none() {
            let key = reader.name(false)?;
            reader.take("=")?;
            arguments.insert(key, reader.value(0)?);
            if reader.take(",").is_none() {
                reader.take(")")?;
                break;
            }
        }
        calls.push(Call { name, arguments: Value::Object(arguments).to_string() });
        if reader.take(",").is_none() {
            reader.take("]")?;
            return reader.rest.trim().is_empty().then_some(calls);
        }
    }
}

/// A tool's call in a grammar, and the rules that it needs: values are JSON, whose words a reader of Python's takes too.
pub(super) fn rules(index: usize, tool: &Tool) -> (String, String) {
    let needed: Vec<&str> =
        tool.parameters["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let properties = tool.parameters["properties"].as_object();
    let (mut rules, mut arguments) = (String::new(), String::new());
    // Those that must be there come first, so that commas stand between what is there.
    let mut keys: Vec<(&String, &Value)> = properties.into_iter().flatten().collect();
    keys.sort_by_key(|(key, _)| !needed.contains(&&key[..]));
    let mut open = 0;
    for (number, (key, schema)) in keys.into_iter().enumerate() {
        let begin = quoted(&if number == 0 { format!("{key}=") } else { format!(", {key}=") });
        let rule = format!("argument_{index}_{number}");
        rules.push_str(&format!("{rule}: %json {schema}\n"));
        if needed.contains(&&key[..]) {
            arguments.push_str(&format!(" {begin} {rule}"));
        } else {
            // One that may be left out takes those behind it along.
            arguments.push_str(&format!(" ({begin} {rule}"));
            open += 1;
        }
    }
    arguments.push_str(&")?".repeat(open));
    (format!("{}{arguments} \")\"", quoted(&format!("{}(", tool.name))), rules)
}

struct Reader<'t> {
    rest: &'t str,
}

impl Reader<'_> {
    fn take(&mut self, mark: &str) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(mark)?;
        Some(())
    }

    /// A name of Python's, or `with_points` of something inside of something.
    fn name(&mut self, with_points: bool) -> Option<String> {
        let text = self.rest.trim_start();
        let is_part = |c: char| c.is_alphanumeric() || c == '_' || (with_points && matches!(c, '.' | '-'));
        let end = text.find(|c| !is_part(c)).unwrap_or(text.len());
        let name = text[..end].to_string();
        self.rest = &text[end..];
        (!name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit())).then_some(name)
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        let text = self.rest.trim_start();
        if depth > DEEPEST {
            return None;
        }
        match text.chars().next()? {
            '"' | '\'' => self.text().map(Value::String),
            '[' | '(' => self.list(depth),
            '{' => self.dictionary(depth),
            c if c.is_ascii_digit() || "+-.".contains(c) => self.number(),
            _ => match &self.name(false)?[..] {
                "True" | "true" => Some(Value::Bool(true)),
                "False" | "false" => Some(Value::Bool(false)),
                "None" | "null" => Some(Value::Null),
                _ => None,
            },
        }
    }

    fn list(&mut self, depth: usize) -> Option<Value> {
        let close = if self.take("[").is_some() { "]" } else { self.take("(").map(|()| ")")? };
        let mut values = Vec::new();
        while self.take(close).is_none() {
            values.push(self.value(depth + 1)?);
            if self.take(",").is_none() {
                self.take(close)?;
                break;
            }
        }
        Some(Value::Array(values))
    }

    fn dictionary(&mut self, depth: usize) -> Option<Value> {
        self.take("{")?;
        let mut map = Map::new();
        while self.take("}").is_none() {
            let Value::String(key) = self.value(depth + 1)? else { return None };
            self.take(":")?;
            map.insert(key, self.value(depth + 1)?);
            if self.take(",").is_none() {
                self.take("}")?;
                break;
            }
        }
        Some(Value::Object(map))
    }

    fn number(&mut self) -> Option<Value> {
        let text = self.rest.trim_start();
        let end = text.find(|c: char| !c.is_ascii_alphanumeric() && !"+-._".contains(c)).unwrap_or(text.len());
        let (digits, rest) = text.split_at(end);
        self.rest = rest;
        let digits = digits.replace('_', "");
        match digits.trim_start_matches('+').parse::<i64>() {
            Ok(whole) => Some(Value::from(whole)),
            Err(_) => Number::from_f64(digits.parse().ok()?).map(Value::Number),
        }
    }

    /// A text in either of the quotes.
    fn text(&mut self) -> Option<String> {
        let text = self.rest.trim_start();
        let quote = text.chars().next()?;
        let mut letters = text.char_indices().skip(1);
        let mut out = String::new();
        while let Some((at, letter)) = letters.next() {
            if letter == quote {
                self.rest = &text[at + quote.len_utf8()..];
                return Some(out);
            }
            if letter != '\\' {
                out.push(letter);
                continue;
            }
            let (at, escaped) = letters.next()?;
            match escaped {
                'n' => out.push('\n'),
                't' => out.push('\t'),
                'r' => out.push('\r'),
                'u' => {
                    let code = text.get(at + 1..at + 5)?;
                    out.push(char::from_u32(u32::from_str_radix(code, 16).ok()?)?);
                    letters.nth(3)?;
                }
                '\\' | '\'' | '"' => out.push(escaped),
                other => out.extend(['\\', other]),
            }
        }
        None
    }
}
