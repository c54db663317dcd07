//! One sequence on its way: tokens, what of them was read, and the text that became certain.
//!
//! Prefill, decoding and reading anew after memory ran short are one thing: tokens that were not read yet are read, and when
//! none is left, the next is drawn.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use moebius_model::{KvCache, Model, Numerics};

use super::pages::Paged;
use super::queue::Waiting;
use super::request::{Dropped, Generate, News, Outcome, Piece, Pooling, Receiver, Request, Task, TokenScore};
use crate::sampler::log_probabilities;
use crate::{
    EngineError, ExpertTrace, Finish, Sampler, Session, StopRule, TextStream, TokenExperts, Tokenizer, Verdict, Wanted,
};

/// Rows whose logits are made together where those of all rows are wanted: a row may have 200,000.
const SCORED_ROWS: usize = 64;

/// A sequence that runs.
pub(super) struct Sequence<'m> {
    pub(super) client: u64,
    pub(super) tenant: u64,
    /// Prompt and text.
    pub(super) tokens: Vec<u32>,
    pub(super) paged: Paged<'m>,
    pub(super) cached_tokens: usize,
    prompt: usize,
    receiver: Box<dyn Receiver>,
    work: Work<'m>,
    /// Positions that were reported, not to be reported anew when they are read again.
    reported: usize,
    since: Instant,
    begun: Instant,
    prompt_read: Option<Instant>,
}

/// What is done with what was read.
enum Work<'m> {
    Generate(Box<Writer<'m>>),
    Embed {
        pooling: Pooling,
        /// Sums over positions, each in their order.
        sums: Vec<f64>,
        /// Positions summed.
        rows: usize,
    },
}

/// Draws tokens and turns them into text.
struct Writer<'m> {
    options: Generate,
    sampler: Sampler,
    stop: StopRule,
    text: TextStream<'m>,
    /// Scores of tokens whose text may still become part of a stop string, with where it begins and ends.
    held: VecDeque<(usize, usize, TokenScore)>,
    /// Bytes of text made, and those of it given out.
    made: usize,
    shown: usize,
    /// Tokens that no piece of text has told of yet.
    untold: usize,
    log_probability: f64,
    prompt_scores: Vec<TokenScore>,
    /// How it ends once the last token was read for its experts.
    ending: Option<Finish>,
}

impl<'m> Sequence<'m> {
    /// Takes a request that waited.
    pub(super) fn new(
        waiting: Waiting,
        paged: Paged<'m>,
        tokenizer: &'m Tokenizer,
    ) -> Result<Self, (Box<dyn Receiver>, EngineError)> {
        let Waiting { request: Request { prompt, task, client, tenant, receiver }, since } = waiting;
        let work = match task {
            Task::Embed(pooling) => Work::Embed { pooling, sums: Vec::new(), rows: 0 },
            Task::Generate(options) => match Writer::new(*options, &prompt, tokenizer) {
                Ok(writer) => Work::Generate(Box::new(writer)),
                Err(error) => return Err((receiver, error)),
            },
        };
        let cached_tokens = paged.session.position();
        Ok(Self {
            client,
            tenant,
            prompt: prompt.len(),
            tokens: prompt,
            paged,
            cached_tokens,
            receiver,
            work,
            reported: 0,
            since,
            begun: Instant::now(),
            prompt_read: None,
        })
    }

    /// Whether what others have read may stand in for what this one would read.
    pub(super) fn may_share(task: &Task) -> bool {
        match task {
            Task::Embed(_) => false,
            Task::Generate(options) => !options.trace_experts && options.prompt_scores.is_none(),
        }
    }

    pub(super) fn shares(&self) -> bool {
        match &self.work {
            Work::Embed { .. } => false,
            Work::Generate(writer) => !writer.options.trace_experts && writer.options.prompt_scores.is_none(),
        }
    }

    pub(super) fn writes(&self) -> bool {
        matches!(self.work, Work::Generate(_))
    }

    pub(super) fn traces(&self) -> bool {
        matches!(&self.work, Work::Generate(writer) if writer.options.trace_experts)
    }

    pub(super) fn is_listening(&self) -> bool {
        self.receiver.is_listening()
    }

    /// Tokens that were not read yet.
    pub(super) fn unread(&self) -> usize {
        self.tokens.len() - self.paged.session.position()
    }

    /// Whether the text is being written, token by token.
    pub(super) fn is_decoding(&self) -> bool {
        self.unread() == 1 && self.tokens.len() > self.prompt
    }

    /// The most tokens that it reads in a step, and what is wanted of them.
    pub(super) fn wants(&self, tokens: usize) -> (usize, Wanted) {
        let tokens = tokens.min(self.unread());
        let (first, prompt) = (self.paged.session.position(), self.prompt);
        match &self.work {
            Work::Embed { .. } => (tokens, Wanted::Hidden),
            Work::Generate(writer) if writer.options.prompt_scores.is_some() && first < prompt => {
                (tokens.min(SCORED_ROWS).min(prompt - first), Wanted::AllLogits)
            }
            Work::Generate(_) if tokens == self.unread() => (tokens, Wanted::LastLogits),
            Work::Generate(_) => (tokens, Wanted::Nothing),
        }
    }

    /// Whether what was read last belongs to the prompt, or comes from its end.
    pub(super) fn is_in_prompt(&self) -> bool {
        self.paged.session.position() <= self.prompt
    }

    /// Time since it began.
    pub(super) fn ran(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Others have read so many of its tokens.
    pub(super) fn adopted(&mut self, tokens: usize) {
        if self.prompt_read.is_none() {
            self.cached_tokens += tokens;
        }
    }

    pub(super) fn drop_for(&mut self, why: Dropped) {
        let _ = self.receiver.news(News::Dropped(why));
    }

    pub(super) fn begin(&mut self) -> ControlFlow<()> {
        self.receiver.news(News::Begun { cached_tokens: self.cached_tokens })
    }

    pub(super) fn fail(mut self, error: EngineError) {
        let _ = self.receiver.news(News::Failed(error));
    }

    /// Takes what a pass gave for `read` tokens up to the session's position; gives the reason if it ends.
    pub(super) fn advance(
        &mut self,
        model: &Model,
        read: usize,
        given: &[f32],
        trace: Option<(&ExpertTrace, usize)>,
    ) -> Result<Option<Finish>, EngineError> {
        let end = self.paged.session.position();
        if let Some((trace, first_row)) = trace
            && self.report_experts(trace, first_row, end - read..end).is_break()
        {
            return Ok(Some(Finish::Cancelled));
        }
        match &mut self.work {
            Work::Embed { pooling, sums, rows } => {
                sum_rows(*pooling, sums, rows, given, model.config.hidden);
                if end < self.tokens.len() {
                    return Ok(None);
                }
                self.prompt_read = Some(Instant::now());
                let vector = sums.iter().map(|sum| (sum / *rows as f64) as f32).collect();
                let _ = self.receiver.news(News::Embedding(vector));
                Ok(Some(Finish::MaxTokens))
            }
            Work::Generate(writer) => {
                let vocabulary = model.config.vocab_size;
                if writer.options.prompt_scores.is_some() && end <= self.prompt {
                    writer.score_prompt(&self.tokens[..self.prompt], end - read, given, vocabulary);
                    if end == self.prompt {
                        let scores = std::mem::take(&mut writer.prompt_scores);
                        if self.receiver.news(News::PromptScores(scores)).is_break() {
                            return Ok(Some(Finish::Cancelled));
                        }
                    }
                }
                if end < self.tokens.len() {
                    return Ok(None);
                }
                self.prompt_read.get_or_insert_with(Instant::now);
                let logits = given.get(given.len().saturating_sub(vocabulary)..).unwrap_or_default();
                let context = model.config.max_positions;
                writer.write(logits, &mut self.tokens, self.prompt, context, &mut *self.receiver)
            }
        }
    }

    /// The last of it: what was held back, and how it went.
    pub(super) fn finish(mut self, finish: Finish) {
        if let Work::Generate(writer) = &mut self.work
            && !matches!(finish, Finish::Cancelled | Finish::Stop(_))
        {
            let _ = writer.flush(&mut *self.receiver);
        }
        let read = self.prompt_read.unwrap_or_else(Instant::now);
        let log_probability = match &self.work {
            Work::Generate(writer) => writer.log_probability,
            Work::Embed { .. } => 0.0,
        };
        let outcome = Outcome {
            finish,
            prompt_tokens: self.prompt,
            cached_tokens: self.cached_tokens,
            generated_tokens: self.tokens.len() - self.prompt,
            log_probability,
            waited: self.begun - self.since,
            prompt_time: read - self.begun,
            generation_time: read.elapsed(),
        };
        let _ = self.receiver.news(News::Finished(outcome));
    }

    fn report_experts(
        &mut self,
        trace: &ExpertTrace,
        first_row: usize,
        positions: std::ops::Range<usize>,
    ) -> ControlFlow<()> {
        let reported = self.reported;
        for (row, position) in (first_row..).zip(positions).skip_while(|(_, position)| *position < reported) {
            let layers = trace.of_row(row);
            let experts =
                TokenExperts { token: self.tokens[position], position, in_prompt: position < self.prompt, layers };
            self.reported = position + 1;
            self.receiver.news(News::Experts(experts))?;
        }
        ControlFlow::Continue(())
    }
}

/// Adds rows `[rows, hidden]` to what is pooled.
fn sum_rows(pooling: Pooling, sums: &mut Vec<f64>, rows: &mut usize, given: &[f32], hidden: usize) {
    sums.resize(hidden, 0.0);
    for row in given.chunks_exact(hidden) {
        if pooling == Pooling::Last {
            sums.fill(0.0);
            *rows = 0;
        }
        sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
        *rows += 1;
    }
}

impl<'m> Writer<'m> {
    fn new(options: Generate, prompt: &[u32], tokenizer: &'m Tokenizer) -> Result<Self, EngineError> {
        let text = if options.show_special { tokenizer.stream().with_special() } else { tokenizer.stream() };
        Ok(Self {
            sampler: Sampler::new(options.sampling)?.with_bias(&options.bias).after_prompt(prompt.len()),
            stop: StopRule::new(&options.stop),
            text: text.after(prompt)?,
            options,
            held: VecDeque::new(),
            made: 0,
            shown: 0,
            untold: 0,
            log_probability: 0.0,
            prompt_scores: Vec::new(),
            ending: None,
        })
    }

    /// Scores the tokens behind positions `first..`, as far as they belong to the prompt.
    fn score_prompt(&mut self, prompt: &[u32], first: usize, logits: &[f32], vocabulary: usize) {
        let top = self.options.prompt_scores.unwrap_or(0);
        for (logits, &token) in logits.chunks_exact(vocabulary).zip(prompt.iter().skip(first + 1)) {
            let (log_probability, top) = log_probabilities(logits, token, top);
            self.prompt_scores.push(TokenScore { token, log_probability, top });
        }
    }

    /// Draws the next token and gives out what text it makes certain.
    fn write(
        &mut self,
        logits: &[f32],
        tokens: &mut Vec<u32>,
        prompt: usize,
        context: usize,
        receiver: &mut dyn Receiver,
    ) -> Result<Option<Finish>, EngineError> {
        // Reached with nothing left to draw where the last token was read for its experts only, or none was asked for.
        if let Some(finish) = self.ending.take().or_else(|| self.ended(tokens, prompt, context)) {
            return Ok(Some(finish));
        }
        let mut masked = Vec::new();
        let allowed = match &mut self.options.constraint {
            None => logits,
            Some(constraint) => {
                masked.extend_from_slice(logits);
                constraint.mask(&mut masked)?;
                &masked
            }
        };
        let token = self.sampler.sample(allowed, tokens)?;
        tokens.push(token);
        if let Some(constraint) = &mut self.options.constraint {
            constraint.accept(token)?;
        }
        if let Some(top) = self.options.scores {
            let (log_probability, top) = log_probabilities(logits, token, top);
            self.log_probability += f64::from(log_probability);
            if !self.options.end_tokens.contains(&token) {
                let score = TokenScore { token, log_probability, top };
                self.held.push_back((self.made, self.made, score));
            }
        }
        let finish = self.show(token, receiver)?;
        if self.options.trace_experts && finish != Some(Finish::Cancelled) {
            // The experts of the last token are known when it was read.
            self.ending = finish;
            return Ok(None);
        }
        Ok(finish.or_else(|| self.ended(tokens, prompt, context)))
    }

    /// Whether nothing more may be written.
    fn ended(&self, tokens: &[u32], prompt: usize, context: usize) -> Option<Finish> {
        let grammar_ended = self.options.constraint.as_ref().is_some_and(|constraint| constraint.is_finished());
        if grammar_ended && tokens.len() > prompt {
            return Some(Finish::EndToken(tokens[tokens.len() - 1]));
        }
        if tokens.len() - prompt >= self.options.max_tokens {
            return Some(Finish::MaxTokens);
        }
        (tokens.len() >= context).then_some(Finish::ContextFull)
    }

    /// Gives out the text that a token makes certain.
    fn show(&mut self, token: u32, receiver: &mut dyn Receiver) -> Result<Option<Finish>, EngineError> {
        if self.options.end_tokens.contains(&token) {
            return Ok(Some(Finish::EndToken(token)));
        }
        let piece = self.text.push(token)?;
        self.made += piece.len();
        self.untold += 1;
        if let Some(last) = self.held.back_mut() {
            last.1 = self.made;
        }
        let (text, finish) = match self.stop.push(&piece) {
            Verdict::Continue(text) => (text, None),
            Verdict::Stop { text, matched } => (text, Some(Finish::Stop(matched))),
        };
        match self.emit(text, finish.is_some(), receiver) {
            ControlFlow::Continue(()) => Ok(finish),
            ControlFlow::Break(()) => Ok(Some(Finish::Cancelled)),
        }
    }

    /// Gives out what was held back for a stop string that did not come.
    fn flush(&mut self, receiver: &mut dyn Receiver) -> ControlFlow<()> {
        let rest = self.stop.finish();
        self.emit(rest, false, receiver)?;
        if self.held.is_empty() && self.untold == 0 {
            return ControlFlow::Continue(());
        }
        // Tokens whose text never became whole.
        let scores = self.held.drain(..).map(|(.., score)| score).collect();
        receiver.news(News::Text(Piece { text: String::new(), scores, tokens: std::mem::take(&mut self.untold) }))
    }

    /// Gives out text with the tokens that it is made of: those that end in it, and where it is the last text before a
    /// stop string, also the one that goes on into that.
    fn emit(&mut self, text: String, last: bool, receiver: &mut dyn Receiver) -> ControlFlow<()> {
        self.shown += text.len();
        let mut scores = Vec::new();
        while let Some((start, end, _)) = self.held.front()
            && (*end <= self.shown || (last && *start < self.shown))
        {
            scores.extend(self.held.pop_front().map(|(.., score)| score));
        }
        if text.is_empty() && scores.is_empty() {
            return ControlFlow::Continue(());
        }
        receiver.news(News::Text(Piece { text, scores, tokens: std::mem::take(&mut self.untold) }))
    }
}

impl Session<'_> {
    /// Bytes that a page takes in a cache of this model.
    pub(super) fn page_bytes(model: &Model, numerics: Numerics) -> usize {
        Session::BLOCK * KvCache::position_bytes(&model.config, numerics.cache)
    }
}
