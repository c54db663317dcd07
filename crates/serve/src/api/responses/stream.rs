//! Answers that arrive while they are written, item by item.

use moebius_engine::scheduler::{News, TokenScore};
use serde_json::{Value, json};

use super::{Answering, TextScores, call_item, message_item, reasoning_item, text_part};
use crate::error::ApiError;
use crate::parts::output::Delta;
use crate::sse::{self, Event};

/// Turns news into OpenAI's events.
pub(super) struct Events {
    answering: Answering,
    begun: bool,
    number: usize,
    open: Option<Item>,
    scores: TextScores,
    /// Items that are complete.
    output: Vec<Value>,
    /// Entries of the extension `routing` that no event has told yet.
    routing: Vec<Value>,
}

/// An item that is being written.
struct Item {
    is_text: bool,
    id: String,
    text: String,
    /// The scores of its tokens.
    scores: Vec<Value>,
}

impl Events {
    pub(super) fn new(answering: Answering) -> Self {
        Self {
            answering,
            begun: false,
            number: 0,
            open: None,
            scores: TextScores::default(),
            output: Vec::new(),
            routing: Vec::new(),
        }
    }

    fn event(&mut self, kind: &str, mut fields: Value) -> Event {
        fields["type"] = kind.into();
        fields["sequence_number"] = self.number.into();
        if self.answering.routing {
            fields["routing"] = std::mem::take(&mut self.routing).into();
        }
        self.number += 1;
        Event::named(kind, &fields)
    }

    fn begin(&mut self, events: &mut Vec<Event>) {
        if !std::mem::replace(&mut self.begun, true) {
            for kind in ["response.created", "response.in_progress"] {
                let fields = json!({"response": self.answering.object});
                events.push(self.event(kind, fields));
            }
        }
    }

    /// Opens an item unless one of its kind is open.
    fn open(&mut self, is_text: bool, events: &mut Vec<Event>) {
        if self.open.as_ref().is_some_and(|item| item.is_text == is_text) {
            return;
        }
        self.close(events);
        let id = self.answering.app.new_id(if is_text { "msg_" } else { "rs_" });
        let item = if is_text { message_item(&id, "", &[], "in_progress") } else { reasoning_item(&id, "") };
        let index = self.output.len();
        events.push(self.event("response.output_item.added", json!({"output_index": index, "item": item})));
        if is_text {
            let fields = json!({"item_id": id, "output_index": index, "content_index": 0, "part": text_part("", &[])});
            events.push(self.event("response.content_part.added", fields));
        }
        self.open = Some(Item { is_text, id, text: String::new(), scores: Vec::new() });
    }

    fn close(&mut self, events: &mut Vec<Event>) {
        let Some(Item { is_text, id, text, scores }) = self.open.take() else { return };
        let index = self.output.len();
        let place = json!({"item_id": id, "output_index": index, "content_index": 0});
        let mut fields = place.clone();
        fields["text"] = text.clone().into();
        let item = if is_text {
            fields["logprobs"] = json!(scores);
            events.push(self.event("response.output_text.done", fields));
            let mut fields = place;
            fields["part"] = text_part(&text, &scores);
            events.push(self.event("response.content_part.done", fields));
            message_item(&id, &text, &scores, "completed")
        } else {
            events.push(self.event("response.reasoning_text.done", fields));
            reasoning_item(&id, &text)
        };
        events.push(self.event("response.output_item.done", json!({"output_index": index, "item": item})));
        self.output.push(item);
    }

    fn delta(&mut self, text: String, is_text: bool, scores: &[Value], events: &mut Vec<Event>) {
        self.open(is_text, events);
        let index = self.output.len();
        let Some(item) = &mut self.open else { return };
        item.text.push_str(&text);
        let mut fields = json!({"item_id": item.id, "output_index": index, "content_index": 0, "delta": text});
        let kind = if is_text { "response.output_text.delta" } else { "response.reasoning_text.delta" };
        if is_text {
            item.scores.extend_from_slice(scores);
            fields["logprobs"] = json!(scores);
        }
        events.push(self.event(kind, fields));
    }

    /// The scores that belong to the text that became certain.
    fn scores_of(&mut self, scores: &[TokenScore], is_thought: bool, deltas: &[Delta]) -> Vec<Value> {
        let from = self.scores.add(scores, is_thought, deltas);
        self.scores.told[from..].iter().map(|score| self.answering.app.chat_score(score)).collect()
    }

    /// Tells what became certain; `scores` are those of the text in it.
    fn deltas(&mut self, deltas: Vec<Delta>, mut scores: Vec<Value>, events: &mut Vec<Event>) {
        for delta in deltas {
            match delta {
                Delta::Text(text) => self.delta(text, true, &std::mem::take(&mut scores), events),
                Delta::Thoughts(text) => self.delta(text, false, &[], events),
                Delta::Call(call) => {
                    self.close(events);
                    let item = call_item(&self.answering.app, &call);
                    let index = self.output.len();
                    let mut empty = item.clone();
                    (empty["arguments"], empty["status"]) = ("".into(), "in_progress".into());
                    let place = json!({"item_id": item["id"], "output_index": index});
                    events
                        .push(self.event("response.output_item.added", json!({"output_index": index, "item": empty})));
                    let mut fields = place.clone();
                    fields["delta"] = call.arguments.clone().into();
                    events.push(self.event("response.function_call_arguments.delta", fields));
                    let mut fields = place;
                    fields["name"] = call.name.into();
                    fields["arguments"] = call.arguments.into();
                    events.push(self.event("response.function_call_arguments.done", fields));
                    events.push(self.event("response.output_item.done", json!({"output_index": index, "item": item})));
                    self.output.push(item);
                }
            }
        }
    }
}

impl sse::Events for Events {
    fn events(&mut self, news: Vec<(usize, News)>) -> Vec<Event> {
        let mut events = Vec::new();
        self.begin(&mut events);
        for (_, news) in news {
            match news {
                News::Text(piece) => {
                    let was_thinking = self.answering.reader.is_thinking();
                    let deltas = self.answering.reader.push(&piece.text, piece.tokens);
                    let is_thought = was_thinking || self.answering.reader.is_thinking();
                    let scores = self.scores_of(&piece.scores, is_thought, &deltas);
                    self.deltas(deltas, scores, &mut events);
                }
                News::Experts(experts) => self.routing.push(self.answering.app.routing_entry(&experts)),
                News::Finished(outcome) => {
                    let deltas = self.answering.reader.finish();
                    let scores = self.scores_of(&[], false, &deltas);
                    self.deltas(deltas, scores, &mut events);
                    if self.output.is_empty() {
                        self.open(true, &mut events);
                    }
                    self.close(&mut events);
                    let object = self.answering.completed(
                        self.output.clone(),
                        Some(&outcome),
                        self.answering.reader.thought_tokens(),
                    );
                    let kind = format!("response.{}", object["status"].as_str().unwrap_or("completed"));
                    events.push(self.event(&kind, json!({"response": object})));
                }
                _ => {}
            }
        }
        events
    }

    fn last(&mut self) -> Vec<Event> {
        Vec::new()
    }

    fn failure(&mut self, error: &ApiError) -> Vec<Event> {
        let mut object = self.answering.object.clone();
        let error = error.object();
        object["status"] = "failed".into();
        object["error"] = json!({"code": "server_error", "message": error["error"]["message"]});
        vec![self.event("response.failed", json!({"response": object}))]
    }
}
