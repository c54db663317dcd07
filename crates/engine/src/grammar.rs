//! Text that must have a form: JSON, JSON of a schema, a regular expression, a Lark grammar (through `llguidance`).
//!
//! Before a token is chosen, the tokens that cannot go on are ruled out. Grammars come from strangers: building one and
//! every step in it have a budget, and what exceeds it is an error of that request alone.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use crate::{EngineError, Tokenizer};

/// The form that a text must have.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that a JSON schema describes.
    JsonSchema(Value),
    /// All of the text matches a regular expression.
    Regex(String),
    /// A grammar in llguidance's dialect of Lark.
    Lark(String),
}

/// Larger grammars are refused unread.
const LONGEST: usize = 1 << 18;
/// Values inside values that a schema may have: building a grammar takes stack for each.
const DEEPEST: usize = 64;

/// Makes constraints for the texts of one tokenizer.
pub struct GrammarCompiler {
    factory: ParserFactory,
}

impl GrammarCompiler {
    /// Reads the vocabulary; `end_tokens` are those that end a text, `vocabulary` is the number of logits.
    ///
    /// # Errors
    /// [`EngineError::Grammar`]: a tokenizer of which llguidance can make nothing.
    pub fn new(tokenizer: &Tokenizer, vocabulary: usize, end_tokens: &[u32]) -> Result<Self, EngineError> {
        let mut words = tokenizer.token_bytes();
        for (id, special) in tokenizer.special_tokens() {
            if let Some(word) = words.get_mut(id as usize) {
                *word = special_word(&special);
            }
        }
        // Ids without a token, and those that the model has beyond the tokenizer's, can never be part of a text.
        words.resize(vocabulary.max(words.len()), Vec::new());
        for (id, word) in words.iter_mut().enumerate().filter(|(_, word)| word.is_empty()) {
            *word = special_word(&format!("<[{id}]>"));
        }
        let end = end_tokens.iter().copied().filter(|&id| (id as usize) < words.len());
        let mut end: Vec<u32> = end.collect();
        if end.is_empty() {
            end.push(words.len() as u32);
            words.push(special_word("<|end of text|>"));
        }
        let info = TokRxInfo::new(words.len() as u32, end[0]);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&end);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|error| failed(&error.to_string()))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory })
    }

    /// A constraint at its beginning.
    ///
    /// # Errors
    /// [`EngineError::Grammar`]: no grammar, a schema that uses what is not supported, one that is too large.
    pub fn compile(&self, grammar: &Grammar) -> Result<Constraint, EngineError> {
        let top = match grammar {
            Grammar::JsonObject => TopLevelGrammar::from_json_schema(json!({"type": "object"})),
            Grammar::JsonSchema(schema) => {
                if deeper_than(schema, DEEPEST) {
                    return Err(failed(&format!("wanted at most {DEEPEST} values inside each other in the schema")));
                }
                check_length(schema.to_string().len())?;
                TopLevelGrammar::from_json_schema(schema.clone())
            }
            Grammar::Regex(text) => {
                check_length(text.len())?;
                TopLevelGrammar::from_regex(text)
            }
            Grammar::Lark(text) => {
                check_length(text.len())?;
                TopLevelGrammar::from_lark(text.clone())
            }
        };
        let parser = self.factory.create_parser(top).map_err(|error| failed(&format!("{error:#}")))?;
        Ok(Constraint { matcher: Matcher::new(Ok(parser)) })
    }
}

fn check_length(found: usize) -> Result<(), EngineError> {
    if found > LONGEST { Err(failed(&format!("wanted at most {LONGEST} bytes, found {found}"))) } else { Ok(()) }
}

fn deeper_than(value: &Value, levels: usize) -> bool {
    match value {
        Value::Array(_) | Value::Object(_) if levels == 0 => true,
        Value::Array(items) => items.iter().any(|item| deeper_than(item, levels - 1)),
        Value::Object(fields) => fields.values().any(|item| deeper_than(item, levels - 1)),
        _ => false,
    }
}

fn special_word(name: &str) -> Vec<u8> {
    let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
    word.extend_from_slice(name.as_bytes());
    word
}

fn failed(reason: &str) -> EngineError {
    EngineError::Grammar { reason: reason.split_whitespace().collect::<Vec<_>>().join(" ") }
}

/// A grammar in the middle of a text.
pub struct Constraint {
    matcher: Matcher,
}

impl Constraint {
    /// Rules out, with -inf, the tokens that cannot follow.
    ///
    /// # Errors
    /// [`EngineError::Grammar`] when the step exceeds its budget.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<(), EngineError> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|error| failed(&error.to_string()))?;
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= allowed.len() || !allowed.is_allowed(id as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Takes the token that was chosen.
    ///
    /// # Errors
    /// [`EngineError::Grammar`] for a token that cannot follow.
    pub fn accept(&mut self, token: u32) -> Result<(), EngineError> {
        self.matcher.consume_token(token).map_err(|error| failed(&error.to_string()))
    }

    /// Whether the text is complete and nothing can follow.
    pub fn is_finished(&self) -> bool {
        self.matcher.is_stopped()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::byte_level;

    /// The tokens that may follow a text; byte tokens, so ids are bytes and 256 is the end.
    fn next(grammar: &Grammar, text: &str) -> Vec<u32> {
        let compiler = GrammarCompiler::new(&byte_level(), 260, &[256]).unwrap();
        let mut constraint = compiler.compile(grammar).unwrap();
        for byte in text.bytes() {
            constraint.accept(byte.into()).unwrap();
        }
        let mut logits = vec![0.0; 260];
        constraint.mask(&mut logits).unwrap();
        (0..260).filter(|&id| logits[id as usize] == 0.0).collect()
    }

    #[test]
    fn only_what_can_follow_is_allowed() {
        let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        assert_eq!(next(&Grammar::Regex("ab|ac".into()), "a"), bytes("bc"));
        assert_eq!(next(&Grammar::Regex("ab".into()), "ab"), [256]);
        assert_eq!(next(&Grammar::Regex("ab*".into()), "a"), [98, 256]);
        assert_eq!(next(&Grammar::Lark("start: \"x\" (\"y\" | \"z\")".into()), "x"), bytes("yz"));
        assert_eq!(next(&Grammar::JsonObject, ""), bytes("{"));
        let schema = json!({"type": "object", "properties": {"n": {"enum": [true, null]}}, "required": ["n"],
            "additionalProperties": false});
        let schema = Grammar::JsonSchema(schema);
        assert!(next(&schema, "{\"n\":").contains(&u32::from(b't')));
        assert_eq!(next(&schema, "{\"n\":t"), bytes("r"));
        let recursive = json!({"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}});
        assert!(next(&Grammar::JsonSchema(recursive), "[[").contains(&u32::from(b'[')));
    }

    #[test]
    fn a_finished_text_says_so_and_a_wrong_token_is_an_error() {
        let compiler = GrammarCompiler::new(&byte_level(), 257, &[256]).unwrap();
        let mut constraint = compiler.compile(&Grammar::Regex("a".into())).unwrap();
        assert!(constraint.accept(98).is_err());
        let mut constraint = compiler.compile(&Grammar::Regex("a".into())).unwrap();
        constraint.accept(97).unwrap();
        assert!(constraint.is_finished());
    }

    #[test]
    fn strangers_grammars_are_refused_with_a_reason() {
        let compiler = GrammarCompiler::new(&byte_level(), 257, &[256]).unwrap();
        let mut deep = json!({"type": "string"});
        for _ in 0..100 {
            deep = json!({"type": "array", "items": deep});
        }
        for grammar in [
            Grammar::Regex("(".into()),
            Grammar::Lark("start: missing".into()),
            Grammar::JsonSchema(json!({"type": "nonsense"})),
            Grammar::JsonSchema(json!({"$ref": "https://example.org/schema"})),
            Grammar::JsonSchema(deep),
            Grammar::Regex("a".repeat(LONGEST + 1)),
        ] {
            let Err(error) = compiler.compile(&grammar) else { panic!("not refused: {grammar:?}") };
            let message = error.to_string();
            assert!(message.starts_with("grammar: ") && !message.contains('\n') && message.len() < 2000, "{message}");
        }
    }
}
