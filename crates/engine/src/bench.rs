//! How fast a model runs: prefill, decode, and several sequences decoding together, each with what it must read and
//! compute at least.
//!
//! Tokens are random: speed does not depend on what a text says, but a model's routers should meet many tokens.

use std::time::Instant;

use moebius_model::{Batch, Cost, ExpertUse, Model, ModelError, Numerics};
use moebius_tensor::Rng;

use crate::{EngineError, Session};

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Tokens of the prompt.
    pub prefill: usize,
    /// Tokens read one by one after it.
    pub decode: usize,
    /// Sequences that decode together; fewer than two leave that out.
    pub batch: usize,
    /// How often everything is measured.
    pub rounds: usize,
    /// The prompt is read this many tokens at a time.
    pub prefill_chunk: usize,
    /// The random tokens' seed.
    pub seed: u64,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self { prefill: 512, decode: 64, batch: 1, rounds: 3, prefill_chunk: 512, seed: 1 }
    }
}

impl BenchOptions {
    /// The longest prompt that leaves room for `decode` tokens after it.
    pub fn longest_prefill(model: &Model, decode: usize) -> usize {
        // A token for warming up stands between prompt and decode.
        model.config.max_positions.saturating_sub(1 + decode)
    }

    /// # Errors
    /// Nothing to measure, or a sequence longer than the model's context.
    pub fn check(&self, model: &Model) -> Result<(), EngineError> {
        if self.prefill == 0 || self.decode == 0 || self.rounds == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        if self.prefill > Self::longest_prefill(model, self.decode) {
            let found = self.prefill + 1 + self.decode;
            return Err(ModelError::Context { found, context: model.config.max_positions }.into());
        }
        Ok(())
    }
}

/// One kind of work, measured in every round.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    /// Tokens read in a round.
    pub tokens: usize,
    /// Forward passes in a round.
    pub passes: usize,
    /// Seconds of each round.
    pub seconds: Vec<f64>,
    /// What a round reads and computes at least.
    pub cost: Cost,
    /// Experts with work in a layer and pass, in the mean.
    pub experts: Option<f64>,
}

/// Middle and extremes of the rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The median; of an even number the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Spread {
    /// Of some numbers, at least one.
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = numbers.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = ((sorted.len() - 1) / 2, sorted.len() / 2);
        Self { median: (sorted[low] + sorted[high]) / 2.0, min: sorted[0], max: sorted[sorted.len() - 1] }
    }
}

impl Phase {
    /// Tokens a second.
    pub fn rate(&self) -> Spread {
        self.a_second(self.tokens as f64)
    }

    /// Bytes of weights and cache that must be read, a second.
    pub fn bytes_a_second(&self) -> Spread {
        self.a_second(self.cost.bytes() as f64)
    }

    /// Operations a second.
    pub fn operations_a_second(&self) -> Spread {
        self.a_second(self.cost.operations as f64)
    }

    fn a_second(&self, amount: f64) -> Spread {
        Spread::of(self.seconds.iter().map(|seconds| amount / seconds))
    }
}

/// What was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchResult {
    /// Seconds that the first token took: the first use of the model's weights.
    pub first_token_seconds: f64,
    /// Reading the prompt.
    pub prefill: Phase,
    /// One sequence, token by token.
    pub decode: Phase,
    /// Several sequences, a token of each at a time.
    pub batched_decode: Option<Phase>,
}

/// Prompts of the sequences that decode together: short, for their cache is not what is measured.
const BATCH_PROMPT: usize = 16;

/// Steps that the batched decode takes, at most.
const BATCH_STEPS: usize = 32;

/// Measures a model. The first token and a pass of each kind of work warm up and count in no rate. `progress` hears what
/// is done.
///
/// # Errors
/// As [`BenchOptions::check`], and whatever the model reports.
pub fn measure(
    model: &Model,
    numerics: Numerics,
    options: &BenchOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<BenchResult, EngineError> {
    options.check(model)?;
    let mut bench = Bench { model, numerics, random: Rng::new(options.seed) };
    let started = Instant::now();
    bench.read(&mut [&mut Session::new(model, numerics)], 1)?;
    let first_token_seconds = started.elapsed().as_secs_f64();
    progress(&format!("first token after {first_token_seconds:.3} s"));
    let mut session = Session::new(model, numerics);
    bench.prefill(&mut session, options)?;
    let mut prefill = Phase::empty();
    let mut decode = Phase::empty();
    let mut batched = (options.batch > 1).then(Phase::empty);
    for round in 1..=options.rounds {
        let mut session = Session::new(model, numerics);
        prefill.add(bench.prefill(&mut session, options)?);
        progress(&format!("round {round} of {}: prefill {}", options.rounds, prefill.last()));
        bench.read(&mut [&mut session], 1)?;
        decode.add(bench.decode(&mut [&mut session], options.decode)?);
        progress(&format!("round {round} of {}: decode {}", options.rounds, decode.last()));
        drop(session);
        if let Some(batched) = &mut batched {
            batched.add(bench.batched_decode(options)?);
            progress(&format!("round {round} of {}: {} sequences {}", options.rounds, options.batch, batched.last()));
        }
    }
    Ok(BenchResult { first_token_seconds, prefill, decode, batched_decode: batched })
}

/// A model being measured.
struct Bench<'m> {
    model: &'m Model,
    numerics: Numerics,
    random: Rng,
}

impl<'m> Bench<'m> {
    fn prefill(&mut self, session: &mut Session<'m>, options: &BenchOptions) -> Result<Phase, EngineError> {
        let (mut phase, mut left) = (Phase::round(), options.prefill);
        while left > 0 {
            let chunk = left.min(options.prefill_chunk.max(1));
            phase.follow(self.read(&mut [&mut *session], chunk)?);
            left -= chunk;
        }
        Ok(phase.finish())
    }

    fn decode(&mut self, sessions: &mut [&mut Session<'m>], steps: usize) -> Result<Phase, EngineError> {
        let mut phase = Phase::round();
        for _ in 0..steps {
            phase.follow(self.read(sessions, 1)?);
        }
        Ok(phase.finish())
    }

    fn batched_decode(&mut self, options: &BenchOptions) -> Result<Phase, EngineError> {
        let mut sessions: Vec<Session> = (0..options.batch).map(|_| Session::new(self.model, self.numerics)).collect();
        let mut sessions: Vec<&mut Session> = sessions.iter_mut().collect();
        let steps = options.decode.min(BATCH_STEPS);
        let prompt = BATCH_PROMPT.min(self.model.config.max_positions.saturating_sub(steps + 1)).max(1);
        self.read(&mut sessions, prompt)?;
        self.read(&mut sessions, 1)?;
        self.decode(&mut sessions, steps)
    }

    /// Reads random tokens in every session; a phase of one pass.
    fn read(&mut self, sessions: &mut [&mut Session<'m>], tokens: usize) -> Result<Phase, EngineError> {
        let vocabulary = self.model.config.vocab_size;
        let drawn: Vec<Vec<u32>> =
            sessions.iter().map(|_| (0..tokens).map(|_| self.random.below(vocabulary) as u32).collect()).collect();
        let drawn: Vec<&[u32]> = drawn.iter().map(Vec::as_slice).collect();
        let parts: Vec<(&[u32], usize)> =
            drawn.iter().zip(sessions.iter()).map(|(&tokens, session)| (tokens, session.position())).collect();
        let batch = Batch::continuing_together(&parts);
        let mut experts = ExpertUse::default();
        let started = Instant::now();
        Session::read_together(sessions, &drawn, &mut experts)?;
        Ok(Phase {
            tokens: batch.tokens.len(),
            passes: 1,
            seconds: vec![started.elapsed().as_secs_f64()],
            cost: self.model.cost(self.numerics, &batch, sessions.len(), &experts),
            experts: experts.mean_distinct(),
        })
    }
}

impl Phase {
    /// Before the first round.
    fn empty() -> Self {
        Self { tokens: 0, passes: 0, seconds: Vec::new(), cost: Cost::default(), experts: None }
    }

    /// A round before its first pass.
    fn round() -> Self {
        Self { seconds: vec![0.0], ..Self::empty() }
    }

    /// Adds another pass to a round; the experts are summed until [`Phase::finish`].
    fn follow(&mut self, pass: Self) {
        self.tokens += pass.tokens;
        self.passes += pass.passes;
        self.seconds[0] += pass.seconds[0];
        self.cost += pass.cost;
        self.experts = pass.experts.map(|distinct| distinct + self.experts.unwrap_or(0.0));
    }

    fn finish(mut self) -> Self {
        self.experts = self.experts.map(|sum| sum / self.passes as f64);
        self
    }

    /// Adds another round; what it cost is what the last one did.
    fn add(&mut self, round: Self) {
        let mut seconds = std::mem::take(&mut self.seconds);
        seconds.extend(&round.seconds);
        *self = Self { seconds, ..round };
    }

    /// The last round, for whoever watches.
    fn last(&self) -> String {
        let seconds = self.seconds.last().copied().unwrap_or(f64::NAN);
        format!("{} tokens in {seconds:.2} s, {:.1} tokens/s", self.tokens, self.tokens as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moebius_kernels::gemm::Precision;
    use moebius_model::{Ffn, QkNorm, UniformDecoder};

    fn model() -> Model {
        let decoder = UniformDecoder {
            family: "olmoe",
            n_heads: 2,
            n_kv_heads: 1,
            vocab_size: 300,
            max_positions: 64,
            qk_norm: QkNorm::Projection,
            ffn: Ffn::moe_of(8, 2, 32, true),
            ..UniformDecoder::default()
        };
        let config = decoder.config();
        Model::random_for_speed(&config, 3, moebius_model::RunFormat::F32).unwrap()
    }

    #[test]
    fn every_kind_of_work_is_measured_and_counted() {
        let options = BenchOptions { prefill: 20, decode: 5, batch: 3, rounds: 2, prefill_chunk: 8, seed: 1 };
        let (model, mut lines) = (model(), Vec::new());
        let found =
            measure(&model, Precision::Bf16.into(), &options, &mut |line| lines.push(line.to_string())).unwrap();
        assert_eq!((found.prefill.tokens, found.prefill.passes), (20, 3));
        assert_eq!((found.decode.tokens, found.decode.passes), (5, 5));
        let batched = found.batched_decode.unwrap();
        assert_eq!((batched.tokens, batched.passes), (15, 5));
        assert_eq!(found.decode.experts, Some(2.0), "one token has its two experts");
        assert!(batched.experts.unwrap() > 2.0 && batched.experts.unwrap() <= 6.0);
        for phase in [&found.prefill, &found.decode, &batched] {
            assert_eq!(phase.seconds.len(), 2);
            let (rate, bytes) = (phase.rate(), phase.bytes_a_second());
            assert!(0.0 < rate.min && rate.min <= rate.median && rate.median <= rate.max && rate.max.is_finite());
            assert!(bytes.median > 0.0 && phase.operations_a_second().median > 0.0);
        }
        // Three sequences share what a token reads, and compute three times as much.
        assert!(batched.cost.weight_bytes < 3 * found.decode.cost.weight_bytes);
        assert!(batched.cost.weight_bytes > found.decode.cost.weight_bytes);
        assert_eq!(lines.len(), 1 + 2 * 3);
    }

    #[test]
    fn what_cannot_be_measured_is_an_error() {
        let model = model();
        let fails = |options: BenchOptions| measure(&model, Precision::F32.into(), &options, &mut |_| ()).unwrap_err();
        let message = fails(BenchOptions { prefill: 60, decode: 5, ..BenchOptions::default() }).to_string();
        assert!(message.contains("66") && message.contains("64"), "{message}");
        fails(BenchOptions { prefill: 0, ..BenchOptions::default() });
    }

    #[test]
    fn medians() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of([4.0, 1.0]), Spread { median: 2.5, min: 1.0, max: 4.0 });
    }
}
