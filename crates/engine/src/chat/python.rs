//! What templates expect of Python: methods of values, `json.dumps`, `strftime`, and transformers' own tag.

use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, Output, State, Value};

/// Lists and objects inside each other that `tojson` follows.
const DEEPEST: usize = 100;

fn refuse(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

fn texts(pieces: &[&str]) -> Value {
    Value::from(pieces.iter().map(|piece| Value::from(*piece)).collect::<Vec<_>>())
}

/// JSON as a template sees it.
pub(super) fn value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(flag) => Value::from(*flag),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => Value::from(items.iter().map(value).collect::<Vec<_>>()),
        serde_json::Value::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(name, item)| (name.as_str(), value(item))))
        }
    }
}

/// `raise_exception(message)`: the template refuses the conversation.
pub(super) fn raise_exception(message: String) -> Result<Value, Error> {
    Err(refuse(message))
}

/// `strftime_now(format)`: the local time.
pub(super) fn time_now(format: String) -> Result<String, Error> {
    jiff::fmt::strtime::format(&format, &jiff::Zoned::now())
        .map_err(|error| refuse(format!("strftime_now({format:?}): {error}")))
}

/// Methods of Python's values: those of minijinja-contrib and a few more.
pub(super) fn method(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let text = if value.kind() == ValueKind::String { value.as_str() } else { None };
    match (text, method) {
        (Some(text), "title") => {
            let () = from_args(arguments)?;
            Ok(title(text).into())
        }
        (Some(text), "removeprefix") => {
            let (prefix,): (&str,) = from_args(arguments)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        (Some(text), "removesuffix") => {
            let (suffix,): (&str,) = from_args(arguments)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        (Some(text), "partition") => {
            let (separator,): (&str,) = from_args(arguments)?;
            let (before, between, after) = match text.split_once(separator) {
                Some((before, after)) => (before, separator, after),
                None => (text, "", ""),
            };
            Ok(texts(&[before, between, after]))
        }
        (Some(text), "rpartition") => {
            let (separator,): (&str,) = from_args(arguments)?;
            let (before, between, after) = match text.rsplit_once(separator) {
                Some((before, after)) => (before, separator, after),
                None => ("", "", text),
            };
            Ok(texts(&[before, between, after]))
        }
        (Some(text), "rsplit") => {
            let (separator, most): (&str, Option<i64>) = from_args(arguments)?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX - 1);
            let mut pieces: Vec<&str> = text.rsplitn(most + 1, separator).collect();
            pieces.reverse();
            Ok(texts(&pieces))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments),
    }
}

/// Letters after anything but a letter become capitals, all others small.
fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        if inside {
            out.extend(letter.to_lowercase())
        } else {
            out.extend(letter.to_uppercase())
        }
        inside = letter.is_alphabetic();
    }
    out
}

/// Prints a value as Python does.
pub(super) fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            let mut text = String::new();
            write_repr(&mut text, value, 0)?;
            out.write_str(&text).map_err(Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// The filter `string`: Python's `str`, which is `repr` but for texts.
pub(super) fn string(value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            let mut text = String::new();
            write_repr(&mut text, value, 0)?;
            Ok(Value::from(text))
        }
        ValueKind::String => Ok(value.clone()),
        _ => Ok(Value::from(value.to_string())),
    }
}

/// Python's `repr`. minijinja's own differs in fractions: 1e-5 where Python has 1e-05.
fn write_repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > DEEPEST {
        return Err(refuse(format!("wanted at most {DEEPEST} lists or objects inside each other")));
    }
    match value.kind() {
        ValueKind::Number if !value.is_integer() => {
            let number = f64::try_from(value.clone())?;
            out.push_str(&if number.is_finite() { python_float(number) } else { value.to_string() });
        }
        ValueKind::String => {
            // A list shows its texts in quotes.
            let list = Value::from(vec![value.clone()]).to_string();
            out.push_str(list.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(&list));
        }
        ValueKind::Map => {
            out.push('{');
            for (at, key) in value.try_iter()?.enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                write_repr(out, &key, depth + 1)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        ValueKind::Seq if value.downcast_object_ref::<Tuple>().is_none() => {
            out.push('[');
            for (at, item) in value.try_iter()?.enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                write_repr(out, &item, depth + 1)?;
            }
            out.push(']');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// `x is iterable`: None is not.
pub(super) fn is_iterable(value: &Value) -> bool {
    !matches!(
        value.kind(),
        ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Plain | ValueKind::Invalid
    )
}

/// `tojson(indent=None, ensure_ascii=False, separators=None, sort_keys=False)` with the spacing of Python's `json.dumps`.
pub(super) fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    if indent.is_some_and(|indent| indent > 16) {
        return Err(refuse("tojson: wanted an indent of at most 16"));
    }
    let item = if indent.is_some() { "," } else { ", " };
    let [item, key] = separators
        .unwrap_or_else(|| vec![item.to_string(), ": ".to_string()])
        .try_into()
        .map_err(|found: Vec<String>| refuse(format!("tojson: wanted two separators, found {}", found.len())))?;
    let mut writer = JsonWriter {
        out: String::new(),
        indent,
        item,
        key,
        ensure_ascii: ensure_ascii.unwrap_or(false),
        sort_keys: sort_keys.unwrap_or(false),
    };
    writer.write(value, 0)?;
    Ok(Value::from(writer.out))
}

struct JsonWriter {
    out: String,
    indent: Option<usize>,
    item: String,
    key: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl JsonWriter {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(refuse(format!("tojson: wanted at most {DEEPEST} lists or objects inside each other")));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value)?,
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list('[', ']', &items, depth, |writer, item| writer.write(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.list('{', '}', &keys, depth, |writer, key| {
                    writer.text(&key.to_string());
                    let between = writer.key.clone();
                    writer.out.push_str(&between);
                    writer.write(&value.get_item(key)?, depth + 1)
                })?;
            }
            other => return Err(refuse(format!("tojson: wanted a value that JSON has, found {other}"))),
        }
        Ok(())
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        items: &[Value],
        depth: usize,
        mut each: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (at, item) in items.iter().enumerate() {
            if at > 0 {
                let between = self.item.clone();
                self.out.push_str(&between);
            }
            self.line(depth + 1);
            each(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.push_str(&" ".repeat(indent * depth));
        }
    }

    fn number(&mut self, value: &Value) -> Result<(), Error> {
        if value.is_integer() {
            self.out.push_str(&value.to_string());
            return Ok(());
        }
        let number = f64::try_from(value.clone())?;
        self.out.push_str(&match number {
            n if n.is_nan() => "NaN".to_string(),
            n if n.is_infinite() => if n > 0.0 { "Infinity" } else { "-Infinity" }.to_string(),
            n => python_float(n),
        });
        Ok(())
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for letter in text.chars() {
            match letter {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                letter if (letter as u32) < 32 || (self.ensure_ascii && !(' '..='~').contains(&letter)) => {
                    for unit in letter.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                letter => self.out.push(letter),
            }
        }
        self.out.push('"');
    }
}

/// A number as Python's `repr` writes it: 1e-05, 1e+16.
fn python_float(number: f64) -> String {
    let short = format!("{number:?}");
    match short.split_once('e') {
        Some((digits, exponent)) => {
            let exponent: i32 = exponent.parse().unwrap_or_default();
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        None => short,
    }
}

/// transformers marks the assistant's words by `{% generation %}` and `{% endgeneration %}`, which print nothing.
/// Written as a condition that holds, they do the same here; lines keep their numbers.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        rest = tag;
        // Inside a text there may be an opening without a tag, so a tag counts only if it is whole.
        let Some((inside, behind)) = tag.split_once("%}") else { continue };
        let word = inside.trim_matches(|letter: char| letter.is_whitespace() || letter == '-' || letter == '+');
        let condition = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&inside.replacen(word, condition, 1));
        out.push_str("%}");
        rest = behind;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_in_python() {
        let written: Vec<String> =
            [1.0, 0.1, 1e-5, 1e16, 1.5e300, 123_456.789, -0.0].iter().map(|&n| python_float(n)).collect();
        assert_eq!(written, ["1.0", "0.1", "1e-05", "1e+16", "1.5e+300", "123456.789", "-0.0"]);
    }

    #[test]
    fn values_become_texts_as_in_python() {
        let json = value(&serde_json::json!({"a": [1e-5, 2, "x"]}));
        for (value, wanted) in [(json, "{'a': [1e-05, 2, 'x']}"), (Value::from(1e-5), "1e-05"), (Value::from("x"), "x")]
        {
            assert_eq!(string(&value).unwrap().as_str(), Some(wanted));
        }
    }

    #[test]
    fn generation_tags_become_conditions() {
        let source = "{{ '{%' }}a{%- generation -%}b{% endgeneration %}{% if x %}{% endif %}";
        assert_eq!(without_generation_tags(source), "{{ '{%' }}a{%- if true -%}b{% endif %}{% if x %}{% endif %}");
        assert_eq!(without_generation_tags("open {% gen"), "open {% gen");
    }
}
