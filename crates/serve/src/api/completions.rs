//! `POST /v1/completions`: texts that are written on.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use moebius_engine::scheduler::{Generate, News, Task, TokenScore};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::chat::{ResponseFormat, StreamOptions};
use super::request;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::parts::conversation::compile;
use crate::parts::generation::{Caller, Running, Usage, Written, finish_reason, finite};
use crate::parts::sampling::{Ignored, MOST_CHOICES, choices, refuse};
use crate::sse::{Event, Events, stream_events};
use crate::state::{App, now};

/// Likeliest tokens that may be asked for.
const MOST_LOGPROBS: usize = 20;

request! {
    /// What is asked.
    CompletionRequest {
        /// The model's name.
        model: String,
        /// What is written on.
        prompt: Option<Prompt>,
        /// Whether the answer arrives while it is written.
        stream: Option<bool>,
        /// What else arrives then.
        stream_options: Option<StreamOptions>,
        /// How many texts for each prompt.
        n: Option<usize>,
        /// Of how many the likeliest are given.
        best_of: Option<usize>,
        /// Whether the prompt is repeated before the text.
        echo: Option<bool>,
        /// Each token's score, and those of so many of the likeliest.
        logprobs: Option<usize>,
        /// Not supported.
        suffix: Ignored,
        /// Extension: what the text must be.
        response_format: Option<ResponseFormat>,
        /// Extension: each token's experts.
        routing: Option<bool>,
    } ignored { user, }
}

/// Texts or tokens.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Tokens.
    Tokens(Vec<u32>),
    /// Several texts.
    Texts(Vec<String>),
    /// Several rows of tokens.
    TokenRows(Vec<Vec<u32>>),
}

impl Prompt {
    /// The tokens of each prompt.
    ///
    /// # Errors
    /// 400 for none or too many, and what the tokenizer says.
    pub async fn tokens(self, app: &App, name: &str) -> Result<Vec<Vec<u32>>, ApiError> {
        let texts = match self {
            Self::Tokens(tokens) => return Ok(vec![tokens]),
            Self::TokenRows(rows) => return Ok(rows),
            Self::Text(text) => vec![text],
            Self::Texts(texts) => texts,
        };
        if texts.is_empty() || texts.len() > MOST_CHOICES {
            let message = format!("Invalid '{name}': wanted 1 to {MOST_CHOICES} texts, found {}.", texts.len());
            return Err(ApiError::invalid(name, message));
        }
        let mut all = Vec::with_capacity(texts.len());
        for text in texts {
            all.push(app.encode(text, true).await?);
        }
        Ok(all)
    }
}

/// Answers a request.
pub async fn answer(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    JsonBody(mut request): JsonBody<CompletionRequest>,
) -> Result<Response, ApiError> {
    app.check_model(&request.model)?;
    refuse("suffix", &request.suffix)?;
    let n = choices("n", request.n)?;
    let best_of = choices("best_of", request.best_of.or(Some(n)))?;
    let streams = request.stream.unwrap_or(false);
    if best_of < n || (streams && best_of > n) {
        let message = "Invalid 'best_of': wanted at least 'n', and when streaming no more.";
        return Err(ApiError::invalid("best_of", message));
    }
    let prompts = match request.prompt.take() {
        Some(prompt) => prompt.tokens(&app, "prompt").await?,
        None => return Err(ApiError::invalid("prompt", "Missing required parameter: 'prompt'.")),
    };
    if prompts.is_empty() || prompts.len() * best_of > MOST_CHOICES {
        let message = format!("Wanted 1 to {MOST_CHOICES} texts in all, found {}.", prompts.len() * best_of);
        return Err(ApiError::invalid("prompt", message));
    }
    let routing = request.routing.unwrap_or(false);
    if routing && prompts.len() * best_of > 1 {
        return Err(ApiError::invalid("routing", "'routing' wants one prompt and one text."));
    }
    let asked = Asked {
        n,
        best_of,
        echo: request.echo.unwrap_or(false),
        scores: request.logprobs,
        routing,
        include_usage: request.stream_options.and_then(|options| options.include_usage).unwrap_or(false),
        id: app.new_id("cmpl-"),
        created: now(),
        prompts: prompts.clone(),
        app: app.clone(),
    };
    let mut tasks = Vec::new();
    for prompt in prompts {
        let generates = asked.generates(&mut request).await?;
        tasks.extend(generates.into_iter().map(|generate| (prompt.clone(), Task::Generate(Box::new(generate)))));
    }
    let count = tasks.len();
    let running = Running::submit(&app, caller, tasks).await?;
    if streams {
        return Ok(stream_events(running, Chunks::new(asked, count)));
    }
    let written = running.collect(count).await?;
    Ok(Json(asked.whole(written)?).into_response())
}

/// A request with its prompts.
struct Asked {
    app: App,
    id: String,
    created: u64,
    prompts: Vec<Vec<u32>>,
    n: usize,
    best_of: usize,
    echo: bool,
    scores: Option<usize>,
    routing: bool,
    include_usage: bool,
}

impl Asked {
    /// What the engine is told for the texts of one prompt.
    async fn generates(&self, request: &mut CompletionRequest) -> Result<Vec<Generate>, ApiError> {
        if self.scores.is_some_and(|top| top > MOST_LOGPROBS) {
            return Err(ApiError::invalid("logprobs", format!("Invalid 'logprobs': wanted at most {MOST_LOGPROBS}.")));
        }
        // The fields are needed again for the next prompt.
        let (bias, stop) = (request.logit_bias.clone(), request.stop.clone());
        let mut fields = request.sampling();
        (request.logit_bias, request.stop) = (bias, stop);
        // OpenAI's default, and 0 is allowed here: then the prompt alone is scored.
        let nothing = fields.max_tokens == Some(0);
        fields.max_tokens = fields.max_tokens.or(Some(16)).filter(|_| !nothing);
        let mut generates = fields.generates(&self.app, self.best_of)?;
        let grammar = request.response_format.clone().and_then(ResponseFormat::grammar);
        let constraints = compile(&self.app, grammar, self.best_of).await?;
        for (generate, constraint) in generates.iter_mut().zip(constraints) {
            generate.scores = self.scores.or((self.best_of > self.n).then_some(0));
            generate.prompt_scores = self.scores.filter(|_| self.echo);
            generate.trace_experts = self.routing;
            generate.constraint = constraint;
            if nothing {
                generate.max_tokens = 0;
            }
        }
        Ok(generates)
    }

    /// The prompt's text, where it is to be repeated.
    fn echoed(&self, prompt: usize) -> Result<String, ApiError> {
        Ok(if self.echo { self.app.tokenizer.decode(&self.prompts[prompt])? } else { String::new() })
    }

    /// The whole answer at once.
    fn whole(&self, all: Vec<Written>) -> Result<Value, ApiError> {
        let mut total = Usage::default();
        let (mut choices, mut routing) = (Vec::new(), Vec::new());
        for (prompt, texts) in all.chunks(self.best_of).enumerate() {
            let mut usage = Usage::default();
            texts.iter().filter_map(|written| written.outcome.as_ref()).for_each(|outcome| usage.add(outcome));
            total.prompt += usage.prompt;
            total.cached += usage.cached;
            total.completion += usage.completion;
            for written in best(texts, self.n) {
                routing.extend(written.experts.iter().map(|experts| self.app.routing_entry(experts)));
                let mut text = self.echoed(prompt)?;
                let mut scores = Scores::default();
                if self.echo && self.scores.is_some() {
                    let first = self.prompts[prompt].first().copied();
                    scores.add_prompt(&self.app, first, &written.prompt_scores);
                }
                scores.offset = text.chars().count();
                scores.add(&self.app, &written.scores.concat());
                text.push_str(&written.text);
                choices.push(json!({
                    "index": choices.len(),
                    "text": text,
                    "logprobs": self.scores.map(|_| scores.object()),
                    "finish_reason": written.finish_reason(),
                }));
            }
        }
        let mut object = self.object(choices);
        object["usage"] = total.object();
        if self.routing {
            object["routing"] = routing.into();
        }
        Ok(object)
    }

    fn object(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.app.card.name,
            "system_fingerprint": crate::FINGERPRINT,
            "choices": choices,
        })
    }
}

/// The `n` texts of the greatest mean score, best first; all of them in their order if there are no more.
fn best(texts: &[Written], n: usize) -> Vec<&Written> {
    let mut all: Vec<&Written> = texts.iter().collect();
    if n < all.len() {
        let mean = |written: &Written| {
            let outcome = written.outcome.as_ref();
            outcome
                .map_or(f64::NEG_INFINITY, |outcome| outcome.log_probability / outcome.generated_tokens.max(1) as f64)
        };
        all.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        all.truncate(n);
    }
    all
}

/// Scores as this interface has them: lists beside each other.
#[derive(Default)]
struct Scores {
    tokens: Vec<Value>,
    values: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<usize>,
    /// Characters before the next token.
    offset: usize,
}

impl Scores {
    fn add_prompt(&mut self, app: &App, first: Option<u32>, scores: &[TokenScore]) {
        if let Some(first) = first {
            self.push(app, first, Value::Null, Value::Null);
        }
        self.add(app, scores);
    }

    fn add(&mut self, app: &App, scores: &[TokenScore]) {
        for score in scores {
            let top: Map<String, Value> =
                score.top.iter().map(|&(token, score)| (app.token_text(token), finite(score).into())).collect();
            self.push(app, score.token, finite(score.log_probability).into(), top.into());
        }
    }

    fn push(&mut self, app: &App, token: u32, value: Value, top: Value) {
        let text = app.token_text(token);
        self.offsets.push(self.offset);
        self.offset += text.chars().count();
        self.tokens.push(text.into());
        self.values.push(value);
        self.top.push(top);
    }

    fn object(&self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.values,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        })
    }
}

/// Turns news into chunks.
struct Chunks {
    asked: Asked,
    /// Characters given out, by text.
    offsets: Vec<usize>,
    usage: Vec<Usage>,
}

impl Chunks {
    fn new(asked: Asked, count: usize) -> Self {
        Self { asked, offsets: vec![0; count], usage: vec![Usage::default(); count] }
    }

    fn chunk(&mut self, index: usize, text: &str, scores: &Scores, finish: Option<&str>) -> Value {
        self.offsets[index] += text.chars().count();
        let choice = json!({
            "index": index,
            "text": text,
            "logprobs": (!scores.tokens.is_empty()).then(|| scores.object()),
            "finish_reason": finish,
        });
        let mut chunk = self.asked.object(vec![choice]);
        if self.asked.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

impl Events for Chunks {
    fn events(&mut self, news: Vec<(usize, News)>) -> Vec<Event> {
        let (mut chunks, mut routing) = (Vec::new(), Vec::new());
        for (index, news) in news {
            let mut scores = Scores { offset: self.offsets[index], ..Scores::default() };
            match news {
                News::Begun { .. } if self.asked.echo && self.asked.scores.is_none() => {
                    let text = self.asked.echoed(index / self.asked.n).unwrap_or_default();
                    chunks.push(self.chunk(index, &text, &scores, None));
                }
                News::PromptScores(found) => {
                    let prompt = index / self.asked.n;
                    let text = self.asked.echoed(prompt).unwrap_or_default();
                    scores.add_prompt(&self.asked.app, self.asked.prompts[prompt].first().copied(), &found);
                    chunks.push(self.chunk(index, &text, &scores, None));
                }
                News::Text(piece) => {
                    scores.add(&self.asked.app, &piece.scores);
                    chunks.push(self.chunk(index, &piece.text, &scores, None));
                }
                News::Experts(experts) => routing.push(self.asked.app.routing_entry(&experts)),
                News::Finished(outcome) => {
                    self.usage[index].add(&outcome);
                    chunks.push(self.chunk(index, "", &scores, Some(finish_reason(&outcome.finish))));
                }
                _ => {}
            }
        }
        if self.asked.routing {
            if chunks.is_empty() && !routing.is_empty() {
                chunks.push(self.chunk(0, "", &Scores::default(), None));
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
        if self.asked.include_usage {
            let mut total = Usage::default();
            for texts in self.usage.chunks(self.asked.n) {
                total.prompt += texts.iter().map(|usage| usage.prompt).max().unwrap_or(0);
                total.cached += texts.iter().map(|usage| usage.cached).max().unwrap_or(0);
                total.completion += texts.iter().map(|usage| usage.completion).sum::<usize>();
            }
            let mut chunk = self.asked.object(Vec::new());
            chunk["usage"] = total.object();
            events.push(Event::data(&chunk));
        }
        events.push(Event::done());
        events
    }
}
