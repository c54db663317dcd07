//! Running a request: from the prompt to the news that the scheduler tells, and what stays of it at the end.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use moebius_engine::scheduler::{Generate, News, Outcome, Piece, Receiver, Request, Task, TokenScore};
use moebius_engine::{Finish, TokenExperts};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::error::ApiError;
use crate::state::App;

/// Who asks: a place among the keys, and a number for fairness.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caller {
    /// Shares what was read with the same tenant only.
    pub tenant: u64,
    /// Shares the machine evenly with other clients.
    pub client: u64,
}

/// News of several sequences, by their places. Dropping it ends them.
pub struct Running {
    news: UnboundedReceiver<(usize, News)>,
    /// Heard already, while looking whether the request begins at all.
    heard: VecDeque<(usize, News)>,
    left: usize,
}

struct Sender {
    index: usize,
    to: UnboundedSender<(usize, News)>,
}

impl Receiver for Sender {
    fn news(&mut self, news: News) -> ControlFlow<()> {
        match self.to.send((self.index, news)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }

    fn is_listening(&self) -> bool {
        !self.to.is_closed()
    }
}

impl Running {
    /// Submits a task for each prompt, and waits until the first has begun: what fails before is the answer's status.
    ///
    /// # Errors
    /// What the scheduler refuses, and what drops a request that waits.
    pub async fn submit(app: &App, caller: Caller, tasks: Vec<(Vec<u32>, Task)>) -> Result<Self, ApiError> {
        let (to, news) = unbounded_channel();
        let left = tasks.len();
        let request = |(index, (prompt, task))| {
            let receiver = Box::new(Sender { index, to: to.clone() });
            Request { prompt, task, client: caller.client, tenant: caller.tenant, receiver }
        };
        app.scheduler.submit(tasks.into_iter().enumerate().map(request).collect())?;
        drop(to);
        let mut running = Self { news, heard: VecDeque::new(), left };
        if let Some(first) = running.next().await? {
            running.heard.push_back(first);
        }
        Ok(running)
    }

    /// As [`Running::submit`], one prompt and several ways to go on.
    ///
    /// # Errors
    /// As [`Running::submit`].
    pub async fn generate(
        app: &App,
        caller: Caller,
        prompt: Vec<u32>,
        generates: Vec<Generate>,
    ) -> Result<Self, ApiError> {
        let tasks = generates.into_iter().map(|generate| (prompt.clone(), Task::Generate(Box::new(generate))));
        Self::submit(app, caller, tasks.collect()).await
    }

    /// The next news; none when all sequences have ended.
    ///
    /// # Errors
    /// A sequence that failed or was dropped: the request has failed then.
    pub async fn next(&mut self) -> Result<Option<(usize, News)>, ApiError> {
        if let Some(heard) = self.heard.pop_front() {
            return Ok(Some(heard));
        }
        if self.left == 0 {
            return Ok(None);
        }
        match self.news.recv().await {
            None => Err(ApiError::internal("the computation ended before the answer")),
            Some(news) => self.check(news).map(Some),
        }
    }

    /// News that is there already.
    ///
    /// # Errors
    /// As [`Running::next`].
    pub fn next_now(&mut self) -> Result<Option<(usize, News)>, ApiError> {
        match self.news.try_recv() {
            Ok(news) => self.check(news).map(Some),
            Err(_) => Ok(None),
        }
    }

    fn check(&mut self, (index, news): (usize, News)) -> Result<(usize, News), ApiError> {
        match news {
            News::Failed(error) => Err(error.into()),
            News::Dropped(dropped) => Err(dropped.into()),
            News::Finished(outcome) => {
                self.left -= 1;
                Ok((index, News::Finished(outcome)))
            }
            news => Ok((index, news)),
        }
    }

    /// All that was written.
    ///
    /// # Errors
    /// As [`Running::next`].
    pub async fn collect(mut self, n: usize) -> Result<Vec<Written>, ApiError> {
        let mut all: Vec<Written> = std::iter::repeat_with(Written::default).take(n).collect();
        while let Some((index, news)) = self.next().await? {
            let written = &mut all[index];
            match news {
                News::Text(Piece { text, scores, tokens }) => {
                    written.text.push_str(&text);
                    written.pieces.push((text.len(), tokens));
                    written.scores.push(scores);
                }
                News::PromptScores(scores) => written.prompt_scores = scores,
                News::Experts(experts) => written.experts.push(experts),
                News::Embedding(vector) => written.embedding = vector,
                News::Finished(outcome) => written.outcome = Some(outcome),
                News::Begun { .. } | News::Failed(_) | News::Dropped(_) => {}
            }
        }
        Ok(all)
    }
}

/// What a sequence wrote.
#[derive(Default)]
pub struct Written {
    /// The text.
    pub text: String,
    /// The pieces that it came in: bytes, and tokens that made them.
    pub pieces: Vec<(usize, usize)>,
    /// Its tokens' scores by piece, where asked for.
    pub scores: Vec<Vec<TokenScore>>,
    /// The prompt's, from its second token on.
    pub prompt_scores: Vec<TokenScore>,
    /// Each token's experts, where asked for.
    pub experts: Vec<TokenExperts>,
    /// The vector, where asked for.
    pub embedding: Vec<f32>,
    /// How it ended.
    pub outcome: Option<Outcome>,
}

impl Written {
    /// Why the text ended, in OpenAI's words.
    pub fn finish_reason(&self) -> &'static str {
        self.outcome.as_ref().map_or("stop", |outcome| finish_reason(&outcome.finish))
    }
}

/// Why a text ended, in OpenAI's words.
pub fn finish_reason(finish: &Finish) -> &'static str {
    match finish {
        Finish::EndToken(_) | Finish::Stop(_) | Finish::Cancelled => "stop",
        Finish::MaxTokens | Finish::ContextFull | Finish::TimeLimit => "length",
    }
}

/// What the texts of one request took: the prompt counts once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Those of them that were known.
    pub cached: usize,
    /// Tokens written.
    pub completion: usize,
    /// Those of them that made thoughts.
    pub reasoning: usize,
}

impl Usage {
    /// Adds one text; prompts of the same request are the same, so the greatest counts.
    pub fn add(&mut self, outcome: &Outcome) {
        self.prompt = self.prompt.max(outcome.prompt_tokens);
        self.cached = self.cached.max(outcome.cached_tokens);
        self.completion += outcome.generated_tokens;
    }

    /// OpenAI's object.
    pub fn object(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        })
    }
}

impl App {
    /// The extension `routing`: an entry for a token, with its experts layer by layer.
    pub fn routing_entry(&self, experts: &TokenExperts) -> Value {
        // Six digits: more would only make the answer longer.
        let round = |weight: &f32| (f64::from(*weight) * 1e6).round() / 1e6;
        let layer = |choice: &moebius_engine::LayerChoice| {
            let weights: Vec<f64> = choice.weights.iter().map(round).collect();
            json!({"layer": choice.layer, "experts": choice.experts, "weights": weights})
        };
        json!({
            "token": experts.token,
            "text": self.tokenizer.show(experts.token),
            "position": experts.position,
            "in_prompt": experts.in_prompt,
            "layers": experts.layers.iter().map(layer).collect::<Vec<_>>(),
        })
    }

    /// A token's text as OpenAI's scores have it: bytes that are no UTF-8 become U+FFFD.
    pub fn token_text(&self, token: u32) -> String {
        match self.token_bytes.get(token as usize) {
            Some(bytes) if !bytes.is_empty() => String::from_utf8_lossy(bytes).into_owned(),
            _ => self.tokenizer.show(token),
        }
    }

    /// A score as conversations have it.
    pub fn chat_score(&self, score: &TokenScore) -> Value {
        let entry = |token: u32, log_probability: f32| {
            let bytes = self.token_bytes.get(token as usize).filter(|bytes| !bytes.is_empty());
            json!({"token": self.token_text(token), "logprob": finite(log_probability), "bytes": bytes})
        };
        let mut value = entry(score.token, score.log_probability);
        value["top_logprobs"] = score.top.iter().map(|&(token, score)| entry(token, score)).collect();
        value
    }
}

/// JSON has no infinity; OpenAI writes this for what cannot happen.
pub fn finite(log_probability: f32) -> f32 {
    log_probability.max(-9999.0)
}
