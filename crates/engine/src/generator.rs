//! A prompt goes in, text comes out piece by piece: prefill, decode, sampling, stop rules, timings.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use moebius_model::{Model, Numerics};

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
    /// The longest time allowed.
    TimeLimit,
    /// The receiver of the events said so.
    Cancelled,
}

/// What was done, and how long it took.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// How many of them the session had read before.
    pub cached_tokens: usize,
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
    /// Tokens of the prompt, those read before left out, in a second.
    pub fn prompt_rate(&self) -> f64 {
        (self.prompt_tokens - self.cached_tokens) as f64 / self.prompt_time.as_secs_f64()
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
    numerics: Numerics,
}

impl<'m> Generator<'m> {
    /// Joins the two.
    pub fn new(model: &'m Model, tokenizer: &'m Tokenizer, numerics: impl Into<Numerics>) -> Self {
        Self { model, tokenizer, numerics: numerics.into() }
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
        self.continue_session(&mut self.session(), &prompt, options, on_event)
    }

    /// An empty sequence of this generator's model.
    pub fn session(&self) -> Session<'m> {
        Session::new(self.model, self.numerics)
    }

    /// As [`Generator::generate`], in a session that may have read something: the tokens that `prompt` shares with it
    /// from the beginning are not read again, what else it has read is forgotten. The text is the same as in an empty
    /// session.
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn continue_session(
        &self,
        session: &mut Session<'m>,
        prompt: &[u32],
        options: &GenerationOptions,
        on_event: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Summary, EngineError> {
        let context = self.model.config.max_positions;
        if prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if prompt.len() >= context {
            return Err(EngineError::PromptTooLong { found: prompt.len(), context });
        }
        let shared = session.tokens().iter().zip(prompt).take_while(|(read, wanted)| read == wanted).count();
        // The last token is read in any case: the text begins with the logits behind it.
        let cached_tokens = session.rewind(shared.min(prompt.len() - 1));
        let mut run = Run {
            options,
            context,
            session,
            sampler: Sampler::new(options.sampling)?,
            stop: StopRule::new(&options.stop),
            text: self.tokenizer.stream().after(prompt)?,
            history: prompt.to_vec(),
            on_event,
        };
        let started = Instant::now();
        let prefilled = run.prefill(&prompt[cached_tokens..])?;
        let prompt_time = started.elapsed();
        let started = Instant::now();
        let (finish, decode_steps) = match prefilled {
            ControlFlow::Break(finish) => (finish, 0),
            ControlFlow::Continue(logits) => run.decode(logits)?,
        };
        let tokens = run.history.split_off(prompt.len());
        let generation_time = started.elapsed();
        let prompt_tokens = prompt.len();
        Ok(Summary { prompt_tokens, cached_tokens, tokens, finish, prompt_time, generation_time, decode_steps })
    }
}

/// One generation on its way.
struct Run<'r, 'm> {
    options: &'r GenerationOptions,
    /// Positions that the model has.
    context: usize,
    session: &'r mut Session<'m>,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{byte_level, small_model};
    use moebius_kernels::gemm::Precision;

    fn model() -> Model {
        small_model(48)
    }

    fn sampled(seed: u64) -> GenerationOptions {
        let sampling = SamplingOptions { temperature: 1.0, seed, ..SamplingOptions::greedy() };
        GenerationOptions { sampling, max_tokens: 30, ..GenerationOptions::default() }
    }

    fn generate(model: &Model, options: &GenerationOptions) -> (Summary, Vec<Event>) {
        let mut events = Vec::new();
        let tokenizer = byte_level();
        let generator = Generator::new(model, &tokenizer, Precision::F32);
        let summary = generator.generate("The sea", options, &mut |event| {
            events.push(event);
            ControlFlow::Continue(())
        });
        (summary.unwrap(), events)
    }

    fn text_of(events: &[Event]) -> String {
        let piece = |event: &Event| match event {
            Event::Text(text) => text.clone(),
            Event::Experts(_) => String::new(),
        };
        events.iter().map(piece).collect()
    }

    #[test]
    fn chunks_of_the_prompt_and_traces_change_nothing() {
        let model = model();
        let (wanted, events) = generate(&model, &sampled(1));
        assert_eq!((wanted.prompt_tokens, wanted.tokens.len(), wanted.decode_steps), (7, 30, 29));
        assert_eq!(wanted.finish, Finish::MaxTokens);
        for prefill_chunk in [1, 2, 3, 6, 7] {
            let (summary, _) = generate(&model, &GenerationOptions { prefill_chunk, ..sampled(1) });
            assert_eq!(summary.tokens, wanted.tokens, "chunks of {prefill_chunk}");
        }
        let (traced, traced_events) = generate(&model, &GenerationOptions { trace_experts: true, ..sampled(1) });
        assert_eq!(traced.tokens, wanted.tokens);
        assert_eq!(text_of(&traced_events), text_of(&events));
        assert_ne!(generate(&model, &sampled(2)).0.tokens, wanted.tokens);
    }

    #[test]
    fn every_token_is_traced_once_in_order() {
        let model = model();
        let options = GenerationOptions { trace_experts: true, prefill_chunk: 3, max_tokens: 5, ..sampled(1) };
        let (summary, events) = generate(&model, &options);
        let traced: Vec<&TokenExperts> = events
            .iter()
            .filter_map(|event| match event {
                Event::Experts(experts) => Some(experts),
                Event::Text(_) => None,
            })
            .collect();
        let tokens = [byte_level().encode("The sea").unwrap(), summary.tokens].concat();
        assert_eq!(traced.iter().map(|token| token.token).collect::<Vec<_>>(), tokens);
        assert!(traced.iter().enumerate().all(|(at, token)| token.position == at && token.in_prompt == (at < 7)));
        for layers in traced.iter().map(|token| &token.layers) {
            assert_eq!(layers.iter().map(|choice| choice.layer).collect::<Vec<_>>(), [0, 1]);
            for choice in layers {
                assert_eq!(choice.experts.len(), 2);
                assert!(
                    (choice.weights.iter().sum::<f32>() - 1.0).abs() < 1e-6 && choice.weights[0] >= choice.weights[1]
                );
            }
        }
    }

    #[test]
    fn the_text_ends_where_it_should() {
        let model = model();
        let (whole, _) = generate(&model, &sampled(1));
        // The first occurrence of the tenth token ends the text.
        let end = whole.tokens[9];
        let first = whole.tokens.iter().position(|&token| token == end).unwrap();
        let (ended, events) = generate(&model, &GenerationOptions { end_tokens: vec![end], ..sampled(1) });
        assert_eq!((ended.tokens.len(), ended.finish), (first + 1, Finish::EndToken(end)));
        assert!(byte_level().decode(&whole.tokens[..first]).unwrap().starts_with(&text_of(&events)));

        let (full, _) = generate(&model, &GenerationOptions { max_tokens: 1000, ..sampled(1) });
        assert_eq!((full.tokens.len(), full.finish), (48 - 7, Finish::ContextFull));
        let (none, events) = generate(&model, &GenerationOptions { max_tokens: 0, ..sampled(1) });
        assert_eq!((none.tokens.len(), none.finish, events.len()), (0, Finish::MaxTokens, 0));
    }

    #[test]
    fn a_stop_text_is_never_shown_and_a_receiver_may_cancel() {
        let model = model();
        let (_, events) = generate(&model, &sampled(1));
        let whole = text_of(&events);
        let letters: Vec<char> = whole.chars().collect();
        let stop: String = letters[3..5].iter().collect();
        let (stopped, events) = generate(&model, &GenerationOptions { stop: vec![stop.clone()], ..sampled(1) });
        assert_eq!(text_of(&events), whole[..whole.find(&stop).unwrap()]);
        assert_eq!(stopped.finish, Finish::Stop(stop));

        let tokenizer = byte_level();
        let generator = Generator::new(&model, &tokenizer, Precision::F32);
        let cancelled = generator.generate("The sea", &sampled(1), &mut |_| ControlFlow::Break(())).unwrap();
        assert_eq!(cancelled.finish, Finish::Cancelled);
    }

    #[test]
    fn a_session_goes_on_as_if_it_had_read_everything_anew() {
        let (model, tokenizer) = (model(), byte_level());
        let generator = Generator::new(&model, &tokenizer, Precision::F32);
        let mut session = generator.session();
        let mut go_on = |prompt: &str| {
            let prompt = tokenizer.encode(prompt).unwrap();
            let options = GenerationOptions { max_tokens: 6, ..sampled(1) };
            generator.continue_session(&mut session, &prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap()
        };
        for (prompt, cached) in [("The sea", 0), ("The sea", 6), ("The sea is old", 7), ("The sun", 5), ("A", 0)] {
            let summary = go_on(prompt);
            let anew = generator.generate(prompt, &GenerationOptions { max_tokens: 6, ..sampled(1) }, &mut |_| {
                ControlFlow::Continue(())
            });
            assert_eq!((summary.tokens, summary.cached_tokens), (anew.unwrap().tokens, cached), "{prompt}");
        }
    }

    #[test]
    fn prompts_that_leave_no_room_are_refused() {
        let (model, tokenizer) = (model(), byte_level());
        let generator = Generator::new(&model, &tokenizer, Precision::F32);
        let refuse = |prompt: &str| {
            generator.generate(prompt, &sampled(1), &mut |_| ControlFlow::Continue(())).unwrap_err().to_string()
        };
        assert!(refuse("").contains("the prompt is empty"));
        assert!(refuse(&"x".repeat(48)).contains("48 tokens, but the model's context holds 48"));
        let small = Tokenizer::from_bytes(
            br#"{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"x": 300}, "unk_token": "x"}}"#,
            "foreign.json",
        );
        let error = Generator::new(&model, &small.unwrap(), Precision::F32)
            .generate("x", &sampled(1), &mut |_| ControlFlow::Continue(()))
            .unwrap_err();
        assert!(error.to_string().contains("token 300 at position 0"), "{error}");
    }
}
