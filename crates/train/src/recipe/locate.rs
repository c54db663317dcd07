//! From keys and byte spans to lines: what turns a parser's complaint into `recipes/x.toml:12: train.steps: ...`.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use crate::TrainError;

/// The sections that every recipe has.
const SECTIONS: [&str; 6] = ["model", "vision", "tokenizer", "data", "train", "optimizer"];

/// A key of the file with the bytes of its name and of its value.
struct Entry {
    key: String,
    name: Range<usize>,
    value: Range<usize>,
}

/// A parsed TOML text in which every key can be found again.
pub(crate) struct Located<'a> {
    file: &'a str,
    text: &'a str,
    entries: Vec<Entry>,
}

impl<'a> Located<'a> {
    /// Parses `text` for its structure alone.
    pub(crate) fn parse(file: &'a str, text: &'a str) -> Result<Self, TrainError> {
        let mut located = Self { file, text, entries: Vec::new() };
        let table = DeTable::parse(text).map_err(|error| TrainError::Syntax {
            file: file.to_owned(),
            line: located.line(error.span().map_or(0, |span| span.start)),
            message: error.message().replace('\n', ", "),
        })?;
        collect(table.get_ref(), "", &mut located.entries);
        Ok(located)
    }

    /// Whether the file itself says `key` (rather than leaving it to its default).
    pub(crate) fn says(&self, key: &str) -> bool {
        self.entries.iter().any(|entry| entry.key == key)
    }

    /// An error at `key`: on its line, else on its section's, else on the first.
    pub(crate) fn error(&self, key: &str, message: String) -> TrainError {
        let section = key.split('.').next().unwrap_or(key);
        let find = |wanted: &str| self.entries.iter().find(|entry| entry.key == wanted);
        let start = find(key).or_else(|| find(section)).map_or(0, |entry| entry.name.start);
        TrainError::Recipe { file: self.file.to_owned(), line: self.line(start), key: key.to_owned(), message }
    }

    /// The deserialiser's complaint in our words, at the key it is about.
    pub(crate) fn explain(&self, error: &toml::de::Error) -> TrainError {
        let start = error.span().map_or(0, |span| span.start);
        let message = error.message().trim();
        if let Some(field) = between_ticks(message.strip_prefix("missing field ")) {
            // A section that is missing is missing from the file, not from the section that the span happens to touch.
            let is_section = SECTIONS.contains(&field.as_str());
            let section = self.enclosing(start).filter(|entry| !is_section && !entry.key.contains('.'));
            let key = section.map_or(field.clone(), |entry| format!("{}.{field}", entry.key));
            return self.error(&key, "missing".to_owned());
        }
        let key = self.enclosing(start).map_or_else(String::new, |entry| entry.key.clone());
        let (found, wanted) = message.split_once(", expected ").unwrap_or((message, ""));
        let wanted = if wanted.is_empty() { String::new() } else { format!("wanted {}, ", plain_type(wanted)) };
        let message = if found.starts_with("unknown field") {
            format!("unknown key; {}found {}", wanted, found.trim_start_matches("unknown field "))
        } else {
            let found = ["invalid type: ", "invalid value: ", "unknown variant "]
                .iter()
                .find_map(|prefix| found.strip_prefix(prefix))
                .unwrap_or(found);
            format!("{wanted}found {found}")
        };
        TrainError::Recipe { file: self.file.to_owned(), line: self.line(start), key, message }
    }

    /// The innermost key whose name or value covers the byte `offset`.
    fn enclosing(&self, offset: usize) -> Option<&Entry> {
        let covers = |range: &Range<usize>| range.start <= offset && offset < range.end.max(range.start + 1);
        self.entries
            .iter()
            .filter(|entry| covers(&entry.name) || covers(&entry.value))
            .max_by_key(|entry| entry.key.matches('.').count())
    }

    /// The line of a byte, from 1.
    fn line(&self, offset: usize) -> usize {
        1 + self.text.as_bytes()[..offset.min(self.text.len())].iter().filter(|&&byte| byte == b'\n').count()
    }
}

/// Puts every key of `table` and of the tables inside it into `entries`.
fn collect(table: &DeTable<'_>, prefix: &str, entries: &mut Vec<Entry>) {
    for (name, value) in table {
        let key = format!("{prefix}{}", name.get_ref());
        if let DeValue::Table(inner) = value.get_ref() {
            collect(inner, &format!("{key}."), entries);
        }
        entries.push(Entry { key, name: name.span(), value: value.span() });
    }
}

/// The text between the first two backticks.
fn between_ticks(text: Option<&str>) -> Option<String> {
    text?.split('`').nth(1).map(str::to_owned)
}

/// Rust's names of types in words.
fn plain_type(wanted: &str) -> String {
    match wanted {
        "usize" | "u64" => "a whole number from 0".to_owned(),
        "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "a list".to_owned(),
        other if other.starts_with("struct ") => "a section".to_owned(),
        other => other.to_owned(),
    }
}
