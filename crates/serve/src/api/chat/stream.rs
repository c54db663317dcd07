//! Conversations whose answers arrive while they are written.

use moebius_engine::scheduler::News;
use serde_json::{Map, Value, json};

use super::{Answering, call_object, reason};
use crate::parts::generation::{Usage, finish_reason};
use crate::parts::output::{Delta, OutputReader};
use crate::sse::{Event, Events};

/// Turns news into OpenAI's chunks.
pub(super) struct Chunks {
    answering: Answering,
    choices: Vec<Choice>,
    include_usage: bool,
    usage: Usage,
}

/// One of the answers.
struct Choice {
    reader: OutputReader,
    /// Whether the role was told.
    begun: bool,
    calls: usize,
    /// Scores of text that the reader still holds back.
    scores: Vec<Value>,
}

impl Chunks {
    pub(super) fn new(answering: Answering, n: usize, include_usage: bool) -> Self {
        let choice = || Choice { reader: answering.reader.clone(), begun: false, calls: 0, scores: Vec::new() };
        let choices = std::iter::repeat_with(choice).take(n).collect();
        Self { answering, choices, include_usage, usage: Usage::default() }
    }

    /// A chunk with one choice.
    fn chunk(&mut self, index: usize, delta: Map<String, Value>, finish: Option<&str>) -> Value {
        let mut delta = delta;
        let choice = &mut self.choices[index];
        if !choice.begun {
            choice.begun = true;
            delta.insert("role".into(), "assistant".into());
            delta.entry("content").or_insert("".into());
        }
        let scores = std::mem::take(&mut choice.scores);
        let scores = if scores.is_empty() { Value::Null } else { json!({"content": scores, "refusal": null}) };
        let choice = json!({"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish});
        let mut chunk = self.answering.object("chat.completion.chunk", vec![choice]);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn deltas(&mut self, index: usize, deltas: Vec<Delta>, chunks: &mut Vec<Value>) {
        for delta in deltas {
            let mut fields = Map::new();
            match delta {
                Delta::Text(text) => fields.insert("content".into(), text.into()),
                Delta::Thoughts(text) => fields.insert("reasoning_content".into(), text.into()),
                Delta::Call(call) => {
                    let mut object = call_object(&self.answering.app, &call);
                    object["index"] = self.choices[index].calls.into();
                    self.choices[index].calls += 1;
                    fields.insert("tool_calls".into(), vec![object].into())
                }
            };
            chunks.push(self.chunk(index, fields, None));
        }
    }
}

impl Events for Chunks {
    fn events(&mut self, news: Vec<(usize, News)>) -> Vec<Event> {
        let (mut chunks, mut routing) = (Vec::new(), Vec::new());
        for (index, news) in news {
            match news {
                News::Begun { .. } => chunks.push(self.chunk(index, Map::new(), None)),
                News::Text(piece) => {
                    let scores = piece.scores.iter().map(|score| self.answering.app.chat_score(score));
                    let scores: Vec<Value> = scores.collect();
                    self.choices[index].scores.extend(scores);
                    let deltas = self.choices[index].reader.push(&piece.text, piece.tokens);
                    self.deltas(index, deltas, &mut chunks);
                }
                News::Experts(experts) => routing.push(self.answering.app.routing_entry(&experts)),
                News::Finished(outcome) => {
                    self.usage.add(&outcome);
                    let deltas = self.choices[index].reader.finish();
                    self.usage.reasoning += self.choices[index].reader.thought_tokens();
                    self.deltas(index, deltas, &mut chunks);
                    let why = reason(self.choices[index].calls > 0, finish_reason(&outcome.finish));
                    let chunk = self.chunk(index, Map::new(), Some(why));
                    chunks.push(chunk);
                }
                News::PromptScores(_) | News::Embedding(_) | News::Failed(_) | News::Dropped(_) => {}
            }
        }
        if self.answering.routing {
            if chunks.is_empty() && !routing.is_empty() {
                chunks.push(self.chunk(0, Map::new(), None));
            }
            if let Some(last) = chunks.last_mut() {
                last["routing"] = routing.into();
            }
            chunks.iter_mut().rev().skip(1).for_each(|chunk| chunk["routing"] = json!([]));
        }
        chunks.iter().map(Event::data).collect()
    }

    fn last(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        if self.include_usage {
            let mut chunk = self.answering.object("chat.completion.chunk", Vec::new());
            chunk["usage"] = self.usage.object();
            if self.answering.routing {
                chunk["routing"] = json!([]);
            }
            events.push(Event::data(&chunk));
        }
        events.push(Event::done());
        events
    }
}
