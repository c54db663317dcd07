//! What a model wrote, told apart: thoughts, text, calls of tools, while it is still writing.

use super::calls::{Call, ToolFormat};
use super::generation::Written;
use super::harmony::HarmonyReader;
use super::tools::Tool;
use std::sync::Arc;

const THOUGHTS_OPEN: &str = "<think>";
const THOUGHTS_CLOSE: &str = "</think>";

/// More of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Delta {
    /// Text for the reader.
    Text(String),
    /// Thoughts before it.
    Thoughts(String),
    /// A whole call.
    Call(Call),
}

/// Where in an answer the model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before anything but white space.
    Beginning,
    Thoughts,
    Text,
    Call,
}

/// Reads an answer piece by piece.
#[derive(Clone, Debug)]
pub struct OutputReader {
    form: Form,
    thought_tokens: usize,
}

#[derive(Clone, Debug)]
enum Form {
    /// Text in which marks stand.
    Marks(MarkReader),
    /// Messages in channels.
    Harmony(HarmonyReader),
}

impl OutputReader {
    /// A reader for a model whose calls have a form: at the beginning of an answer, or inside the thoughts that the prompt
    /// has opened. `tools` are those that may be called.
    pub fn new(format: ToolFormat, tools: &[Tool], thinks: bool, in_thoughts: bool) -> Self {
        let form = match format {
            ToolFormat::Harmony => Form::Harmony(HarmonyReader::new()),
            format => {
                let calls = (!tools.is_empty()).then(|| Calls { format, tools: tools.into() });
                Form::Marks(MarkReader::new(thinks, in_thoughts, calls))
            }
        };
        Self { form, thought_tokens: 0 }
    }

    /// Takes a piece, which so many tokens made; gives what became certain.
    pub fn push(&mut self, piece: &str, tokens: usize) -> Vec<Delta> {
        let was_thinking = self.is_thinking();
        let deltas = match &mut self.form {
            Form::Marks(reader) => reader.push(piece),
            Form::Harmony(reader) => reader.push(piece),
        };
        if was_thinking || self.is_thinking() {
            self.thought_tokens += tokens;
        }
        deltas
    }

    /// What was held back, when nothing more will come.
    pub fn finish(&mut self) -> Vec<Delta> {
        match &mut self.form {
            Form::Marks(reader) => reader.finish(),
            Form::Harmony(reader) => reader.finish(),
        }
    }

    /// Tokens that made the thoughts so far, with the marks around them.
    pub fn thought_tokens(&self) -> usize {
        self.thought_tokens
    }

    /// Whether the answer is inside of its thoughts.
    pub fn is_thinking(&self) -> bool {
        match &self.form {
            Form::Marks(reader) => reader.place == Place::Thoughts,
            Form::Harmony(reader) => reader.is_thinking(),
        }
    }
}

/// The form of calls, and the tools that may be called.
#[derive(Clone, Debug)]
pub struct Calls {
    format: ToolFormat,
    tools: Arc<[Tool]>,
}

impl Calls {
    fn parse(&self, text: &str) -> Option<Vec<Call>> {
        self.format.parse(text, &self.tools)
    }
}

/// Reads text with marks. What may become a mark is held back.
#[derive(Clone, Debug)]
pub struct MarkReader {
    /// Whether the model has thoughts.
    thinks: bool,
    /// The form of calls, where tools were offered.
    calls: Option<Calls>,
    place: Place,
    /// Whether white space at the beginning only separates: it stands behind thoughts or a call.
    separated: bool,
    held: String,
}

impl MarkReader {
    /// A reader at the beginning of an answer, or inside the thoughts that the prompt has opened.
    pub fn new(thinks: bool, in_thoughts: bool, calls: Option<Calls>) -> Self {
        let place = if in_thoughts { Place::Thoughts } else { Place::Beginning };
        Self { thinks, calls, place, separated: false, held: String::new() }
    }

    /// Takes a piece; gives what became certain.
    pub fn push(&mut self, piece: &str) -> Vec<Delta> {
        self.held.push_str(piece);
        let mut deltas = Vec::new();
        while self.advance(&mut deltas) {}
        deltas
    }

    /// What was held back, when nothing more will come.
    pub fn finish(&mut self) -> Vec<Delta> {
        let rest = std::mem::take(&mut self.held);
        if rest.is_empty() {
            return Vec::new();
        }
        match (self.place, &self.calls) {
            (Place::Thoughts, _) => vec![Delta::Thoughts(rest)],
            (Place::Beginning, _) if self.separated && rest.trim().is_empty() => Vec::new(),
            (Place::Call, Some(form)) => match form.parse(&rest) {
                Some(calls) => calls.into_iter().map(Delta::Call).collect(),
                // No call after all: the reader gets it as it was written.
                None if form.format.begins(&rest) => vec![Delta::Text(rest)],
                None => vec![Delta::Text(format!("{}{rest}", form.format.opening()))],
            },
            _ => vec![Delta::Text(rest)],
        }
    }

    /// Goes on by a mark, or as far as is certain; false when more text is needed.
    fn advance(&mut self, deltas: &mut Vec<Delta>) -> bool {
        match self.place {
            Place::Beginning => self.begin(),
            Place::Thoughts => {
                let found = self.held.find(THOUGHTS_CLOSE);
                let before = self.take_before(found, &[THOUGHTS_CLOSE]);
                push(deltas, Delta::Thoughts, before);
                if found.is_some() {
                    self.held.drain(..THOUGHTS_CLOSE.len());
                    (self.place, self.thinks, self.separated) = (Place::Beginning, false, true);
                }
                found.is_some()
            }
            Place::Text => {
                let opening = self.calls.as_ref().map(|calls| calls.format.opening());
                let found = opening.and_then(|opening| self.held.find(opening));
                let mut before = self.take_before(found, opening.as_slice());
                if let (Some(_), Some(opening)) = (found, opening) {
                    self.held.drain(..opening.len());
                    self.place = Place::Call;
                    before.truncate(before.trim_end().len());
                }
                push(deltas, Delta::Text, before);
                found.is_some()
            }
            Place::Call => {
                let Some(form) = &self.calls else { return false };
                let Some((closing, at)) =
                    form.format.closing().and_then(|closing| Some((closing, self.held.find(closing)?)))
                else {
                    return false;
                };
                let inside: String = self.held.drain(..at).collect();
                self.held.drain(..closing.len());
                let calls = form.parse(&inside);
                (self.place, self.separated) = (Place::Beginning, calls.is_some());
                match calls {
                    Some(calls) => deltas.extend(calls.into_iter().map(Delta::Call)),
                    None => push(deltas, Delta::Text, format!("{}{inside}{closing}", form.format.opening())),
                }
                true
            }
        }
    }

    /// Leaves the beginning when it is known what stands there.
    fn begin(&mut self) -> bool {
        let text = self.held.trim_start();
        if self.thinks && text.starts_with(THOUGHTS_OPEN) {
            self.held = text[THOUGHTS_OPEN.len()..].to_string();
            self.place = Place::Thoughts;
            return true;
        }
        if text.is_empty() || (self.thinks && THOUGHTS_OPEN.starts_with(text)) {
            return false;
        }
        // Llama's calls have no mark: an answer that is an object or a list is one.
        if self.calls.as_ref().is_some_and(|calls| calls.format.begins(text)) {
            self.place = Place::Call;
            return true;
        }
        if self.separated {
            self.held = text.to_string();
        }
        self.place = Place::Text;
        true
    }

    /// Takes the text before a mark that was found, or all that cannot be the beginning of one.
    fn take_before(&mut self, found: Option<usize>, marks: &[&str]) -> String {
        let end = found.unwrap_or_else(|| {
            let may_begin = |at: usize| marks.iter().any(|mark| mark.starts_with(&self.held[at..]));
            let mut places = self.held.char_indices().map(|(at, _)| at);
            let end = places.find(|&at| may_begin(at)).unwrap_or(self.held.len());
            // White space before a call belongs to it.
            if self.calls.is_some() { self.held[..end].trim_end().len() } else { end }
        });
        self.held.drain(..end).collect()
    }
}

fn push(deltas: &mut Vec<Delta>, kind: fn(String) -> Delta, text: String) {
    if !text.is_empty() {
        deltas.push(kind(text));
    }
}

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Text for the reader.
    pub text: String,
    /// Thoughts before it.
    pub thoughts: String,
    /// Calls of tools.
    pub calls: Vec<Call>,
    /// Tokens that made the thoughts.
    pub thought_tokens: usize,
}

impl Answer {
    /// Adds what became certain.
    pub fn add(&mut self, delta: Delta) {
        match delta {
            Delta::Text(text) => self.text.push_str(&text),
            Delta::Thoughts(text) => self.thoughts.push_str(&text),
            Delta::Call(call) => self.calls.push(call),
        }
    }

    /// Reads what was written, piece by piece.
    pub fn read(mut reader: OutputReader, written: &Written) -> Self {
        let mut answer = Self::default();
        let mut from = 0;
        for &(length, tokens) in &written.pieces {
            let piece = &written.text[from..from + length];
            from += length;
            reader.push(piece, tokens).into_iter().for_each(|delta| answer.add(delta));
        }
        reader.finish().into_iter().for_each(|delta| answer.add(delta));
        answer.thought_tokens = reader.thought_tokens();
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However a text is cut, the same is read.
    fn read(reader: &MarkReader, text: &str) -> Answer {
        let in_pieces = |size: usize| {
            let mut reader = OutputReader { form: Form::Marks(reader.clone()), thought_tokens: 0 };
            let (letters, mut answer): (Vec<char>, _) = (text.chars().collect(), Answer::default());
            for piece in letters.chunks(size) {
                reader.push(&piece.iter().collect::<String>(), 1).into_iter().for_each(|delta| answer.add(delta));
            }
            reader.finish().into_iter().for_each(|delta| answer.add(delta));
            answer
        };
        let whole = in_pieces(text.len());
        for size in 1..text.len().min(9) {
            assert_eq!(in_pieces(size), whole, "{text:?} in pieces of {size}");
        }
        whole
    }

    fn answer(text: &str, thoughts: &str, calls: &[&str]) -> Answer {
        let calls = calls.iter().map(|name| Call { name: name.to_string(), arguments: "{}".into() }).collect();
        Answer { text: text.into(), thoughts: thoughts.into(), calls, thought_tokens: 0 }
    }

    fn calls(format: ToolFormat) -> Option<Calls> {
        Some(Calls { format, tools: [].into() })
    }

    #[test]
    fn thoughts_stand_before_the_text() {
        let thinks = MarkReader::new(true, false, None);
        assert_eq!(read(&thinks, "<think>a < b</think>\n\ntext <think>"), answer("text <think>", "a < b", &[]));
        assert_eq!(read(&thinks, "no <think>thoughts"), answer("no <think>thoughts", "", &[]));
        assert_eq!(read(&thinks, "<thin"), answer("<thin", "", &[]));
        assert_eq!(read(&MarkReader::new(true, true, None), "a</think>b"), answer("b", "a", &[]));
        assert_eq!(read(&MarkReader::new(true, true, None), "a</thi"), answer("", "a</thi", &[]));
        assert_eq!(read(&MarkReader::new(false, false, None), "<think>a"), answer("<think>a", "", &[]));
    }

    #[test]
    fn calls_are_taken_out_of_the_text() {
        let reader = MarkReader::new(false, false, calls(ToolFormat::Hermes { told: true }));
        let call = |name: &str| format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {{}}}}\n</tool_call>");
        assert_eq!(read(&reader, &format!("so:\n{}\n{}", call("f"), call("g"))), answer("so:", "", &["f", "g"]));
        assert_eq!(read(&reader, "a <tool_call>b</tool_call> c"), answer("a<tool_call>b</tool_call> c", "", &[]));
        assert_eq!(read(&reader, "<tool_call>{\"name\": \"f\", \"arguments\": {}}"), answer("", "", &["f"]));
        assert_eq!(read(&reader, "1 < 2"), answer("1 < 2", "", &[]));
        let mistral = MarkReader::new(false, false, calls(ToolFormat::Mistral { named: false }));
        assert_eq!(read(&mistral, "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {}}]"), answer("", "", &["f"]));
        let llama = MarkReader::new(false, false, calls(ToolFormat::Llama));
        assert_eq!(read(&llama, "{\"name\": \"f\", \"parameters\": {}}"), answer("", "", &["f"]));
        assert_eq!(read(&llama, "{\"title\": 1}"), answer("{\"title\": 1}", "", &[]));
        let none = MarkReader::new(false, false, None);
        assert_eq!(read(&none, &call("f")), answer(&call("f"), "", &[]));
    }

    #[test]
    fn tokens_of_thoughts_are_counted_with_their_marks() {
        let pieces = ["<think>", "a", " b", "</think>", "\n\n", "text"];
        let written = Written {
            text: pieces.concat(),
            pieces: pieces.iter().map(|piece| (piece.len(), 1)).collect(),
            ..Written::default()
        };
        let reader = OutputReader::new(ToolFormat::Hermes { told: false }, &[], true, false);
        let answer = Answer::read(reader, &written);
        assert_eq!((&answer.text[..], answer.thought_tokens), ("text", 4));
        let opened = OutputReader::new(ToolFormat::Hermes { told: false }, &[], true, true);
        let written = Written { text: "a</think>b".into(), pieces: vec![(1, 2), (8, 1), (1, 1)], ..Written::default() };
        assert_eq!(Answer::read(opened, &written).thought_tokens, 3);
        let channels = "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>yes";
        let pieces: Vec<(usize, usize)> = channels.split_inclusive('>').map(|piece| (piece.len(), 1)).collect();
        let written = Written { text: channels.into(), pieces, ..Written::default() };
        let answer = Answer::read(OutputReader::new(ToolFormat::Harmony, &[], false, false), &written);
        // Of the header, the mark that ends it; of the message, its text with the mark behind.
        assert_eq!((&answer.thoughts[..], &answer.text[..], answer.thought_tokens), ("so", "yes", 2));
    }
}
