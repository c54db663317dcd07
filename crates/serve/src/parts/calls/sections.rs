//! Calls between special tokens.
//!
//! DeepSeek-V3 and R1: `<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, a fence with the arguments,
//! `<｜tool▁call▁end｜><｜tool▁calls▁end｜>`; V3.1 without the word and the fence, `NAME<｜tool▁sep｜>{…}`.
//! Kimi-K2: `<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}
//! <|tool_call_end|><|tool_calls_section_end|>`.

use serde_json::Value;

use super::{Call, quoted};

/// A family's marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// DeepSeek's.
    DeepSeek {
        /// Whether arguments stand in a fence behind the name, and the kind of the tool before it.
        fenced: bool,
    },
    /// Kimi's.
    Kimi,
}

impl Section {
    pub(super) fn opening(self) -> &'static str {
        match self {
            Self::DeepSeek { .. } => "<｜tool▁calls▁begin｜>",
            Self::Kimi => "<|tool_calls_section_begin|>",
        }
    }

    pub(super) fn closing(self) -> &'static str {
        match self {
            Self::DeepSeek { .. } => "<｜tool▁calls▁end｜>",
            Self::Kimi => "<|tool_calls_section_end|>",
        }
    }

    /// Where a call begins, what divides it, and where it ends.
    fn marks(self) -> [&'static str; 3] {
        match self {
            Self::DeepSeek { .. } => ["<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"],
            Self::Kimi => ["<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"],
        }
    }

    pub(super) fn parse(self, text: &str) -> Option<Vec<Call>> {
        let [begin, divide, end] = self.marks();
        let calls = text.split(begin).skip(1).map(|call| {
            let call = call.split_once(end).map_or(call, |(call, _)| call);
            let (before, behind) = call.split_once(divide)?;
            let (name, arguments) = match behind.split_once("```json") {
                Some((name, fenced)) => (name, fenced.trim().trim_end_matches("```")),
                None => (before, behind),
            };
            let name = name.trim();
            let name = if self == Self::Kimi { kimi_name(name) } else { name };
            let arguments: Value = serde_json::from_str(arguments.trim()).ok().filter(|_| !name.is_empty())?;
            Some(Call { name: name.to_string(), arguments: arguments.to_string() })
        });
        calls.collect()
    }

    /// What stands before and after the arguments in a grammar.
    pub(super) fn around_arguments(self, name: &str, special: &dyn Fn(&str) -> String) -> (String, String) {
        let [begin, divide, end] = self.marks().map(special);
        match self {
            Self::DeepSeek { fenced: true } => {
                let before = quoted(&format!("{name}\n```json\n"));
                (format!("{begin} \"function\" {divide} {before}"), format!("{} {end}", quoted("\n```")))
            }
            Self::DeepSeek { fenced: false } => (format!("{begin} {} {divide}", quoted(name)), end),
            // The number counts the calls of the conversation; nothing depends on it.
            Self::Kimi => {
                let name = quoted(&format!("functions.{name}:"));
                (format!("{begin} {name} /[0-9]/ {divide}"), end)
            }
        }
    }
}

/// `functions.NAME:NUMBER` without what is around the name.
fn kimi_name(id: &str) -> &str {
    let id = id.strip_prefix("functions.").unwrap_or(id);
    match id.rsplit_once(':') {
        Some((name, number)) if number.chars().all(|c| c.is_ascii_digit()) => name,
        _ => id,
    }
}
