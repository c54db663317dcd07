//! What a model wrote, told apart: thoughts, text, calls of tools, while it is still writing.

use super::harmony::HarmonyReader;
use super::tools::{Call, ToolFormat};

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
pub enum OutputReader {
    /// Text in which marks stand.
    Marks(MarkReader),
    /// Messages in channels.
    Harmony(HarmonyReader),
}

impl OutputReader {
    /// A reader for a model whose calls have a form: at the beginning of an answer, or inside the thoughts that the prompt
    /// has opened. `offered` says whether there are tools to be called.
    pub fn new(format: ToolFormat, offered: bool, thinks: bool, in_thoughts: bool) -> Self {
        match format {
            ToolFormat::Harmony => Self::Harmony(HarmonyReader::new()),
            format => Self::Marks(MarkReader::new(thinks, in_thoughts, offered.then_some(format))),
        }
    }

    /// Takes a piece; gives what became certain.
    pub fn push(&mut self, piece: &str) -> Vec<Delta> {
        match self {
            Self::Marks(reader) => reader.push(piece),
            Self::Harmony(reader) => reader.push(piece),
        }
    }

    /// What was held back, when nothing more will come.
    pub fn finish(&mut self) -> Vec<Delta> {
        match self {
            Self::Marks(reader) => reader.finish(),
            Self::Harmony(reader) => reader.finish(),
        }
    }
}

/// Reads text with marks. What may become a mark is held back.
#[derive(Clone, Debug)]
pub struct MarkReader {
    /// Whether the model has thoughts.
    thinks: bool,
    /// The form of calls, where tools were offered.
    calls: Option<ToolFormat>,
    place: Place,
    /// Whether white space at the beginning only separates: it stands behind thoughts or a call.
    separated: bool,
    held: String,
}

impl MarkReader {
    /// A reader at the beginning of an answer, or inside the thoughts that the prompt has opened.
    pub fn new(thinks: bool, in_thoughts: bool, calls: Option<ToolFormat>) -> Self {
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
        match (self.place, self.calls) {
            (Place::Thoughts, _) => vec![Delta::Thoughts(rest)],
            (Place::Beginning, _) if self.separated && rest.trim().is_empty() => Vec::new(),
            (Place::Call, Some(format)) => match format.parse(&rest) {
                Some(calls) => calls.into_iter().map(Delta::Call).collect(),
                // No call after all: the reader gets it as it was written.
                None if format == ToolFormat::Llama => vec![Delta::Text(rest)],
                None => vec![Delta::Text(format!("{}{rest}", format.opening()))],
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
                let opening = self.calls.map(ToolFormat::opening);
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
                let Some(format) = self.calls else { return false };
                let Some((closing, at)) =
                    format.closing().and_then(|closing| Some((closing, self.held.find(closing)?)))
                else {
                    return false;
                };
                let inside: String = self.held.drain(..at).collect();
                self.held.drain(..closing.len());
                let calls = format.parse(&inside);
                (self.place, self.separated) = (Place::Beginning, calls.is_some());
                match calls {
                    Some(calls) => deltas.extend(calls.into_iter().map(Delta::Call)),
                    None => push(deltas, Delta::Text, format!("{}{inside}{closing}", format.opening())),
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
        // Llama's calls have no mark: an answer that is an object is one.
        if self.calls == Some(ToolFormat::Llama) && text.starts_with('{') {
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

    /// Reads a whole text.
    pub fn read(mut reader: OutputReader, text: &str) -> Self {
        let mut answer = Self::default();
        reader.push(text).into_iter().for_each(|delta| answer.add(delta));
        reader.finish().into_iter().for_each(|delta| answer.add(delta));
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However a text is cut, the same is read.
    fn read(reader: &MarkReader, text: &str) -> Answer {
        let whole = Answer::read(OutputReader::Marks(reader.clone()), text);
        for size in 1..text.len().min(9) {
            let (mut cut, mut answer) = (reader.clone(), Answer::default());
            let letters: Vec<char> = text.chars().collect();
            for piece in letters.chunks(size) {
                cut.push(&piece.iter().collect::<String>()).into_iter().for_each(|delta| answer.add(delta));
            }
            cut.finish().into_iter().for_each(|delta| answer.add(delta));
            assert_eq!(answer, whole, "{text:?} in pieces of {size}");
        }
        whole
    }

    fn answer(text: &str, thoughts: &str, calls: &[&str]) -> Answer {
        let calls = calls.iter().map(|name| Call { name: name.to_string(), arguments: "{}".into() }).collect();
        Answer { text: text.into(), thoughts: thoughts.into(), calls }
    }

    const HERMES: Option<ToolFormat> = Some(ToolFormat::Hermes { told: true });

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
        let reader = MarkReader::new(false, false, HERMES);
        let call = |name: &str| format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {{}}}}\n</tool_call>");
        assert_eq!(read(&reader, &format!("so:\n{}\n{}", call("f"), call("g"))), answer("so:", "", &["f", "g"]));
        assert_eq!(read(&reader, "a <tool_call>b</tool_call> c"), answer("a<tool_call>b</tool_call> c", "", &[]));
        assert_eq!(read(&reader, "<tool_call>{\"name\": \"f\", \"arguments\": {}}"), answer("", "", &["f"]));
        assert_eq!(read(&reader, "1 < 2"), answer("1 < 2", "", &[]));
        let mistral = MarkReader::new(false, false, Some(ToolFormat::Mistral { named: false }));
        assert_eq!(read(&mistral, "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {}}]"), answer("", "", &["f"]));
        let llama = MarkReader::new(false, false, Some(ToolFormat::Llama));
        assert_eq!(read(&llama, "{\"name\": \"f\", \"parameters\": {}}"), answer("", "", &["f"]));
        assert_eq!(read(&llama, "{\"title\": 1}"), answer("{\"title\": 1}", "", &[]));
        let none = MarkReader::new(false, false, None);
        assert_eq!(read(&none, &call("f")), answer(&call("f"), "", &[]));
    }
}
