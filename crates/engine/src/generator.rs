//! A prompt goes in, text comes out piece by piece: prefill, decode, sampling, stop rules, timings.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use moebius_kernels::gemm::Precision;
use moebius_model::Model;

use crate::trace::{ExpertTrace, LayerChoice};
use crate::{EngineError, Sampler, SamplingOptions, Session, StopRule, TextStream, Tokenizer, Verdict};

/// What to generate and how.
#[derive(Clone, Debug)]
pub struct GenerationOptions {
    /// The sampling chain.
    pub sampling: SamplingOptions,
    /// The most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the generation and are not shown.
    pub stop: Vec<String>,
    /// Tokens that end the generation.
    pub end_tokens: Vec<u32>,
    /// The prompt is read this many tokens at a time. It bounds memory; the results do not depend on it.
    pub prefill_chunk: usize,
    /// Whether to report [`Event::Experts`]. The last token, which nothing follows, is read too then.
    pub trace_experts: bool,
}

impl Default for GenerationOptions {
    fn default() -> Self {
        Self {
            sampling: SamplingOptions::greedy(),
            max_tokens: 200,
            stop: Vec::new(),
            end_tokens: Vec::new(),
            prefill_chunk: 512,
            trace_experts: false,
        }
    }
}

/// What happens while text is generated.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// More text, never empty, never half a character, never part of a stop string.
    Text(String),
    /// The model has read a token: of the prompt, or one that it wrote.
    Experts(TokenExperts),
}

/// The experts that each MoE layer chose when the model read a token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenExperts {
    /// The token.
    pub token: u32,
    /// Where it stands.
    pub position: usize,
    /// Whether it belongs to the prompt.
    pub in_prompt: bool,
    /// One entry for each MoE layer, bottom to top.
    pub layers: Vec<LayerChoice>,
}

/// Why the text ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model wrote an end token.
    EndToken(u32),
    /// A stop string appeared.
    Stop(String),
    /// The most tokens asked for.
    MaxTokens,
    /// The model's context is full.
    ContextFull,
    /// The receiver of the events said so.
    Cancelled,
}

/// What was done, and how long it took.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, an end token included.
    pub tokens: Vec<u32>,
    /// Why the text ended.
    pub finish: Finish,
    /// Time until the prompt was read.
    pub prompt_time: Duration,
    /// Time from there to the end.
    pub generation_time: Duration,
    /// Tokens read one by one in that time: the first token comes from the prompt's pass, so usually one less than
    /// were generated.
    pub decode_steps: usize,
}

impl Summary {
    /// Tokens of the prompt read in a second.
    pub fn prompt_rate(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt_time.as_secs_f64()
    }

    /// Decode steps in a second; `None` where there was none.
    pub fn generation_rate(&self) -> Option<f64> {
        (self.decode_steps > 0).then(|| self.decode_steps as f64 / self.generation_time.as_secs_f64())
    }
}

/// A model with its tokenizer, ready to write.
#[derive(Clone, Copy)]
pub struct Generator<'m> {
    model: &'m Model,
    tokenizer: &'m Tokenizer,
    precision: Precision,
}

impl<'m> Generator<'m> {
    /// Joins the two; `precision` is that of the matrix products.
    pub fn new(model: &'m Model, tokenizer: &'m Tokenizer, precision: Precision) -> Self {
        Self { model, tokenizer, precision }
    }

    /// Writes on from `prompt`, which the summary counts but the events do not repeat as text.
    ///
    /// # Errors
    /// [`EngineError`] for an empty prompt, one that leaves no room in the context, a token that the model lacks, an
    /// option outside its range, and whatever the model reports.
    pub fn generate(
        &self,
        prompt: &str,
        options: &GenerationOptions,
        on_event: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Summary, EngineError> {
        let prompt = self.tokenizer.encode(prompt)?;
        let context = self.model.config.max_positions;
        if prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if prompt.len() >= context {
            return Err(EngineError::PromptTooLong { found: prompt.len(), context });
        }
        let mut run = Run {
            options,
            context,
            session: Session::new(self.model, self.precision),
            sampler: Sampler::new(options.sampling)?,
            stop: StopRule::new(&options.stop),
            text: self.tokenizer.stream().after(&prompt)?,
            history: prompt.clone(),
            on_event,
        };
        let started = Instant::now();
        let prefilled = run.prefill(&prompt)?;
        let prompt_time = started.elapsed();
        let started = Instant::now();
        let (finish, decode_steps) = match prefilled {
            ControlFlow::Break(finish) => (finish, 0),
            ControlFlow::Continue(logits) => run.decode(logits)?,
        };
        let tokens = run.history.split_off(prompt.len());
        let generation_time = started.elapsed();
        Ok(Summary { prompt_tokens: prompt.len(), tokens, finish, prompt_time, generation_time, decode_steps })
    }
}

/// One generation on its way.
struct Run<'r, 'm> {
    options: &'r GenerationOptions,
    /// Positions that the model has.
    context: usize,
    session: Session<'m>,
    sampler: Sampler,
    stop: StopRule,
    text: TextStream<'m>,
    /// The prompt and what was generated.
    history: Vec<u32>,
    on_event: &'r mut dyn FnMut(Event) -> ControlFlow<()>,
}

impl Run<'_, '_> {
    /// Reads the prompt in chunks; gives the logits of its last position.
    fn prefill(&mut self, prompt: &[u32]) -> Result<ControlFlow<Finish, Vec<f32>>, EngineError> {
        let mut logits = Vec::new();
        for chunk in prompt.chunks(self.options.prefill_chunk.max(1)) {
            match self.read(chunk, true)? {
                ControlFlow::Continue(row) => logits = row,
                ControlFlow::Break(()) => return Ok(ControlFlow::Break(Finish::Cancelled)),
            }
        }
        Ok(ControlFlow::Continue(logits))
    }

    /// Samples and reads token by token until something ends it; gives the number of steps too.
    fn decode(&mut self, mut logits: Vec<f32>) -> Result<(Finish, usize), EngineError> {
        let prompt = self.history.len();
        let mut steps = 0;
        loop {
            if self.history.len() - prompt >= self.options.max_tokens {
                return Ok((self.finish(Finish::MaxTokens), steps));
            }
            if self.history.len() >= self.context {
                return Ok((self.finish(Finish::ContextFull), steps));
            }
            let token = self.sampler.sample(&logits, &self.history)?;
            self.history.push(token);
            let ended = self.show(token)?;
            let last = ended.is_some() || self.history.len() - prompt == self.options.max_tokens;
            if self.options.trace_experts || !last {
                match self.read(&[token], false)? {
                    ControlFlow::Continue(row) => logits = row,
                    ControlFlow::Break(()) => return Ok((Finish::Cancelled, steps)),
                }
                steps += 1;
            }
            if let Some(finish) = ended {
                return Ok((finish, steps));
            }
        }
    }

    /// Gives out the text that a token makes certain; says whether the text ends with it.
    fn show(&mut self, token: u32) -> Result<Option<Finish>, EngineError> {
        if self.options.end_tokens.contains(&token) {
            return Ok(Some(self.finish(Finish::EndToken(token))));
        }
        let piece = self.text.push(token)?;
        let (text, finish) = match self.stop.push(&piece) {
            Verdict::Continue(text) => (text, None),
            Verdict::Stop { text, matched } => (text, Some(Finish::Stop(matched))),
        };
        match self.emit(text) {
            ControlFlow::Continue(()) => Ok(finish),
            ControlFlow::Break(()) => Ok(Some(Finish::Cancelled)),
        }
    }

    /// Gives out what was held back for a stop string that did not come.
    fn finish(&mut self, finish: Finish) -> Finish {
        let held = self.stop.finish();
        match self.emit(held) {
            ControlFlow::Continue(()) => finish,
            ControlFlow::Break(()) => Finish::Cancelled,
        }
    }

    fn emit(&mut self, text: String) -> ControlFlow<()> {
        if text.is_empty() { ControlFlow::Continue(()) } else { (self.on_event)(Event::Text(text)) }
    }

    /// Has the model read tokens and reports their experts; gives the logits that follow the last one.
    fn read(&mut self, tokens: &[u32], in_prompt: bool) -> Result<ControlFlow<(), Vec<f32>>, EngineError> {
        let position = self.session.position();
        let mut trace = ExpertTrace::new(self.options.trace_experts);
        let logits = self.session.read(tokens, &mut trace)?;
        if self.options.trace_experts {
            for (row, &token) in tokens.iter().enumerate() {
                let experts = TokenExperts { token, position: position + row, in_prompt, layers: trace.of_row(row) };
                if (self.on_event)(Event::Experts(experts)).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        Ok(ControlFlow::Continue(logits))
    }
}
