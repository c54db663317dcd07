//! Answers in gpt-oss' form ("harmony"): messages in channels, each with a header that says what it is.
//!
//! `<|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>final<|message|>text`; a call is a message to
//! a tool: `<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}`. The marks are special tokens, so the
//! text has to be made with them.

use super::calls::Call;
use super::output::Delta;

const MESSAGE: &str = "<|message|>";
/// Marks that end a message; the last two only where they are no end tokens.
const ENDS: [&str; 4] = ["<|end|>", "<|start|>", "<|call|>", "<|return|>"];

/// What the message that is being written is.
#[derive(Clone, Debug, PartialEq)]
enum Kind {
    /// Not known yet: the header is being written.
    Header,
    Thoughts,
    Text,
    Call(String),
}

/// Reads an answer piece by piece.
#[derive(Clone, Debug)]
pub struct HarmonyReader {
    kind: Kind,
    held: String,
}

impl HarmonyReader {
    /// A reader behind `<|start|>assistant`, with which the prompt ends.
    pub fn new() -> Self {
        Self { kind: Kind::Header, held: String::new() }
    }

    /// Whether thoughts are being written.
    pub fn is_thinking(&self) -> bool {
        self.kind == Kind::Thoughts
    }

    /// Takes a piece; gives what became certain.
    pub fn push(&mut self, piece: &str) -> Vec<Delta> {
        self.held.push_str(piece);
        let mut deltas = Vec::new();
        loop {
            if self.kind == Kind::Header {
                let Some(at) = self.held.find(MESSAGE) else { return deltas };
                self.kind = kind(&self.held[..at]);
                self.held.drain(..at + MESSAGE.len());
            }
            let end = ENDS.iter().filter_map(|end| Some((self.held.find(end)?, end.len()))).min();
            let (to, mark) = end.unwrap_or_else(|| (self.certain(), 0));
            let is_call = matches!(self.kind, Kind::Call(_));
            if end.is_some() || !is_call {
                let text: String = self.held.drain(..to).collect();
                deltas.extend(self.delta(text));
            }
            if end.is_none() {
                return deltas;
            }
            self.held.drain(..mark);
            self.kind = Kind::Header;
        }
    }

    /// What was held back, when no more will come.
    pub fn finish(&mut self) -> Vec<Delta> {
        let text = std::mem::take(&mut self.held);
        self.delta(text).into_iter().collect()
    }

    fn delta(&self, text: String) -> Option<Delta> {
        match &self.kind {
            // A header that was broken off says nothing to the reader.
            Kind::Header => None,
            _ if text.is_empty() => None,
            Kind::Thoughts => Some(Delta::Thoughts(text)),
            Kind::Text => Some(Delta::Text(text)),
            Kind::Call(name) => Some(Delta::Call(Call { name: name.clone(), arguments: text.trim().to_string() })),
        }
    }

    /// Bytes before what may be the beginning of a mark.
    fn certain(&self) -> usize {
        let may_begin = |at: usize| ENDS.iter().any(|end| end.starts_with(&self.held[at..]));
        let mut places = self.held.char_indices().map(|(at, _)| at);
        places.find(|&at| may_begin(at)).unwrap_or(self.held.len())
    }
}

/// What a header announces.
fn kind(header: &str) -> Kind {
    if let Some((_, rest)) = header.split_once("to=functions.") {
        let name: String = rest.chars().take_while(|c| c.is_ascii_alphanumeric() || "_-.".contains(*c)).collect();
        return Kind::Call(name);
    }
    if header.contains("<|channel|>analysis") { Kind::Thoughts } else { Kind::Text }
}

#[cfg(test)]
mod tests {
    use super::super::output::Answer;
    use super::*;

    #[test]
    fn channels_are_told_apart_however_the_text_is_cut() {
        let text = "<|channel|>analysis<|message|>a < b<|end|><|start|>assistant<|channel|>commentary to=functions.f \
                    <|constrain|>json<|message|>{\"x\": 1}<|call|><|start|>assistant<|channel|>final<|message|>so <|be it";
        let call = Call { name: "f".into(), arguments: "{\"x\": 1}".into() };
        let wanted =
            Answer { text: "so <|be it".into(), thoughts: "a < b".into(), calls: vec![call], thought_tokens: 0 };
        let letters: Vec<char> = text.chars().collect();
        for size in 1..40 {
            let (mut reader, mut answer) = (HarmonyReader::new(), Answer::default());
            for piece in letters.chunks(size) {
                reader.push(&piece.iter().collect::<String>()).into_iter().for_each(|delta| answer.add(delta));
            }
            reader.finish().into_iter().for_each(|delta| answer.add(delta));
            assert_eq!(answer, wanted, "pieces of {size}");
        }
    }

    #[test]
    fn a_header_without_a_message_is_no_text() {
        let mut reader = HarmonyReader::new();
        assert_eq!((reader.push("<|channel|>fin"), reader.finish()), (vec![], vec![]));
    }
}
