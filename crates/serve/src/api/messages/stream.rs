//! Answers that arrive while they are written, block by block.

use moebius_engine::scheduler::News;
use serde_json::{Value, json};

use super::{Answering, call_block, stop, usage};
use crate::error::ApiError;
use crate::parts::output::Delta;
use crate::sse::{self, Event};

/// Turns news into Anthropic's events.
pub(super) struct Events {
    answering: Answering,
    prompt_tokens: usize,
    begun: bool,
    /// The kind of the block that is open.
    open: Option<&'static str>,
    blocks: usize,
    called: bool,
}

impl Events {
    pub(super) fn new(answering: Answering, prompt_tokens: usize) -> Self {
        Self { answering, prompt_tokens, begun: false, open: None, blocks: 0, called: false }
    }

    fn begin(&mut self, events: &mut Vec<Event>) {
        if !std::mem::replace(&mut self.begun, true) {
            let mut message = self.answering.message(Vec::new());
            message["usage"]["input_tokens"] = self.prompt_tokens.into();
            events.push(event("message_start", json!({"message": message})));
            events.push(event("ping", json!({})));
        }
    }

    fn close(&mut self, events: &mut Vec<Event>) {
        if self.open.take().is_some() {
            events.push(event("content_block_stop", json!({"index": self.blocks - 1})));
        }
    }

    /// Opens a block unless one of its kind is open.
    fn open(&mut self, kind: &'static str, block: Value, events: &mut Vec<Event>) {
        if self.open != Some(kind) {
            self.close(events);
            events.push(event("content_block_start", json!({"index": self.blocks, "content_block": block})));
            self.open = Some(kind);
            self.blocks += 1;
        }
    }

    fn delta(&mut self, delta: Value, events: &mut Vec<Event>) {
        events.push(event("content_block_delta", json!({"index": self.blocks - 1, "delta": delta})));
    }

    fn deltas(&mut self, deltas: Vec<Delta>, events: &mut Vec<Event>) {
        for delta in deltas {
            match delta {
                Delta::Text(text) => {
                    self.open("text", json!({"type": "text", "text": ""}), events);
                    self.delta(json!({"type": "text_delta", "text": text}), events);
                }
                Delta::Thoughts(text) => {
                    self.open("thinking", json!({"type": "thinking", "thinking": "", "signature": ""}), events);
                    self.delta(json!({"type": "thinking_delta", "thinking": text}), events);
                }
                Delta::Call(call) => {
                    self.called = true;
                    self.close(events);
                    let block = call_block(&self.answering.app, &call, json!({}));
                    self.open("tool_use", block, events);
                    self.delta(json!({"type": "input_json_delta", "partial_json": call.arguments}), events);
                    self.close(events);
                }
            }
        }
    }
}

fn event(kind: &str, mut fields: Value) -> Event {
    fields["type"] = kind.into();
    Event::named(kind, &fields)
}

impl sse::Events for Events {
    fn events(&mut self, news: Vec<(usize, News)>) -> Vec<Event> {
        let mut events = Vec::new();
        self.begin(&mut events);
        for (_, news) in news {
            match news {
                News::Text(piece) => {
                    let deltas = self.answering.reader.push(&piece.text, piece.tokens);
                    self.deltas(deltas, &mut events);
                }
                News::Finished(outcome) => {
                    let deltas = self.answering.reader.finish();
                    self.deltas(deltas, &mut events);
                    self.close(&mut events);
                    let (reason, sequence) = stop(&outcome, self.called);
                    let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
                    events.push(event("message_delta", json!({"delta": delta, "usage": usage(&outcome)})));
                }
                _ => {}
            }
        }
        events
    }

    fn last(&mut self) -> Vec<Event> {
        vec![event("message_stop", json!({}))]
    }

    fn failure(&mut self, error: &ApiError) -> Vec<Event> {
        vec![Event::named("error", &error.anthropic_object())]
    }
}
