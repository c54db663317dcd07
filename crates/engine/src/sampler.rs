//! From a row of logits to the next token.
//!
//! The chain, in this order: bias, repetition penalty, presence and frequency penalties, temperature, top-k, top-p, min-p,
//! draw. Probabilities are f64 and every sum runs in one fixed order, so that a seed gives the same tokens on any number
//! of threads.
//!
//! - bias: a number added to the logit of each token that it names (OpenAI's `logit_bias`);
//! - repetition penalty (Keskar et al., CTRL, 2019): a token already seen has its positive logit divided by it and its
//!   negative logit multiplied;
//! - presence and frequency penalties (OpenAI): the first is taken off the logit of every token that was generated, the
//!   second as many times as it was generated; the prompt does not count;
//! - temperature 0 takes the greatest logit, the lower id where two are equal;
//! - top-p (Holtzman et al., 2019): the fewest most likely tokens whose probabilities reach p;
//! - min-p (Nguyen et al., 2024): tokens at least `min_p` times as likely as the likeliest.

use std::borrow::Cow;
use std::cmp::Ordering;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::EngineError;

/// The options of the chain. [`SamplingOptions::greedy`] and the fields' "off" values leave a link out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keeps this many of the likeliest tokens; 0 is off.
    pub top_k: usize,
    /// Keeps the likeliest tokens up to this probability; 1 is off.
    pub top_p: f32,
    /// Keeps tokens at least this many times as likely as the likeliest; 0 is off.
    pub min_p: f32,
    /// Weakens tokens that have occurred; 1 is off.
    pub repetition_penalty: f32,
    /// Taken off the logits of tokens that were generated; 0 is off.
    pub presence_penalty: f32,
    /// Taken off as many times as a token was generated; 0 is off.
    pub frequency_penalty: f32,
    /// Seeds the draw.
    pub seed: u64,
}

impl SamplingOptions {
    /// The greatest logit, always.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }

    /// Checks every range.
    ///
    /// # Errors
    /// [`EngineError::Sampling`] names the first option outside its range.
    pub fn validate(&self) -> Result<(), EngineError> {
        let check = |option, wanted, found: f32, inside: bool| match inside {
            true => Ok(()),
            false => Err(EngineError::Sampling { option, wanted, found: f64::from(found) }),
        };
        let (temperature, penalty) = (self.temperature, self.repetition_penalty);
        check("temperature", "0 or a positive number", temperature, temperature.is_finite() && temperature >= 0.0)?;
        check("top-p", "above 0 and at most 1", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0)?;
        check("min-p", "from 0 to 1", self.min_p, (0.0..=1.0).contains(&self.min_p))?;
        check("repetition penalty", "a positive number", penalty, penalty.is_finite() && penalty > 0.0)?;
        let number = "a number";
        check("presence penalty", number, self.presence_penalty, self.presence_penalty.is_finite())?;
        check("frequency penalty", number, self.frequency_penalty, self.frequency_penalty.is_finite())
    }
}

/// A token that survived the chain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The token's id.
    pub token: u32,
    /// Its probability among the survivors.
    pub probability: f64,
}

/// The chain with its random state.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplingOptions,
    random: ChaCha8Rng,
    /// Tokens at the beginning of the history that were not generated.
    prompt: usize,
    bias: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence.
    ///
    /// # Errors
    /// [`EngineError::Sampling`] if an option is outside its range.
    pub fn new(options: SamplingOptions) -> Result<Self, EngineError> {
        options.validate()?;
        Ok(Self { options, random: ChaCha8Rng::seed_from_u64(options.seed), prompt: 0, bias: Vec::new() })
    }

    /// Tells how many tokens at the beginning of every history are the prompt.
    #[must_use]
    pub fn after_prompt(mut self, tokens: usize) -> Self {
        self.prompt = tokens;
        self
    }

    /// Adds numbers to the logits of tokens; tokens that the model lacks are ignored.
    #[must_use]
    pub fn with_bias(mut self, bias: &[(u32, f32)]) -> Self {
        self.bias = bias.to_vec();
        self
    }

    /// The next token after `history`: prompt and text so far, which only the penalties read.
    ///
    /// One number is drawn a call, also where one candidate is left; greedy choice draws none.
    ///
    /// # Errors
    /// [`EngineError::Logits`] for a logit that is NaN or +inf, [`EngineError::NoCandidate`] if all are -inf.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, EngineError> {
        let mut ranked = self.ranked(logits, history)?;
        if self.options.temperature == 0.0 {
            return Ok(ranked.best());
        }
        // 53 bits: every f64 step of [0, 1) is equally likely.
        let fraction = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        if !self.cuts() && ranked.holds_all() {
            return Ok(ranked.draw(fraction));
        }
        let survivors = self.survivors(&mut ranked);
        let draw = fraction * survivors.probability;
        let mut cumulative = 0.0;
        for place in 0..survivors.count - 1 {
            cumulative += ranked.at(place).probability;
            if draw < cumulative {
                return Ok(ranked.at(place).token);
            }
        }
        Ok(ranked.at(survivors.count - 1).token)
    }

    /// What [`Sampler::sample`] draws from: the survivors, most likely first, with probabilities that sum to 1.
    /// At temperature 0 the one greedy choice.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn distribution(&self, logits: &[f32], history: &[u32]) -> Result<Vec<Candidate>, EngineError> {
        let mut ranked = self.ranked(logits, history)?;
        if self.options.temperature == 0.0 {
            return Ok(vec![Candidate { token: ranked.best(), probability: 1.0 }]);
        }
        let survivors = self.survivors(&mut ranked);
        let candidates = (0..survivors.count).map(|place| ranked.at(place));
        Ok(candidates.map(|c| Candidate { probability: c.probability / survivors.probability, ..c }).collect())
    }

    /// The candidates before top-p and min-p, to be looked at from the likeliest on.
    fn ranked<'l>(&self, logits: &'l [f32], history: &[u32]) -> Result<Ranked<'l>, EngineError> {
        if let Some((token, &found)) = logits.iter().enumerate().find(|(_, x)| x.is_nan() || **x == f32::INFINITY) {
            return Err(EngineError::Logits { token, found });
        }
        let mut logits = Cow::Borrowed(logits);
        if (self.penalises() && !history.is_empty()) || !self.bias.is_empty() {
            self.change(logits.to_mut(), history);
        }
        let count = logits.iter().filter(|x| x.is_finite()).count();
        if count == 0 {
            return Err(EngineError::NoCandidate(logits.len()));
        }
        Ok(Ranked::new(logits, count, self.options.top_k, self.options.temperature))
    }

    /// Whether top-p or min-p is on.
    fn cuts(&self) -> bool {
        self.options.top_p != 1.0 || self.options.min_p != 0.0
    }

    fn penalises(&self) -> bool {
        let options = &self.options;
        options.repetition_penalty != 1.0 || options.presence_penalty != 0.0 || options.frequency_penalty != 0.0
    }

    /// Bias and penalties.
    fn change(&self, logits: &mut [f32], history: &[u32]) {
        for &(token, bias) in &self.bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        let penalty = self.options.repetition_penalty;
        if penalty != 1.0 {
            let mut seen = history.to_vec();
            seen.sort_unstable();
            seen.dedup();
            for token in seen {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                }
            }
        }
        let (presence, frequency) = (self.options.presence_penalty, self.options.frequency_penalty);
        if presence != 0.0 || frequency != 0.0 {
            let mut generated = history.get(self.prompt..).unwrap_or_default().to_vec();
            generated.sort_unstable();
            for same in generated.chunk_by(|a, b| a == b) {
                if let Some(logit) = logits.get_mut(same[0] as usize) {
                    *logit -= presence + frequency * same.len() as f32;
                }
            }
        }
    }

    /// How many of the likeliest are left by top-p and min-p, and their probability together.
    fn survivors(&self, ranked: &mut Ranked) -> Survivors {
        let (p, min_p) = (f64::from(self.options.top_p), f64::from(self.options.min_p));
        if !self.cuts() {
            return Survivors { count: ranked.len(), probability: 1.0 };
        }
        let least = min_p * ranked.at(0).probability;
        let mut survivors = Survivors { count: 0, probability: 0.0 };
        while survivors.count < ranked.len() && (p == 1.0 || survivors.probability < p) {
            let candidate = ranked.at(survivors.count);
            if candidate.probability < least {
                break;
            }
            survivors.count += 1;
            survivors.probability += candidate.probability;
        }
        survivors
    }
}

/// The likeliest candidates that may be drawn.
struct Survivors {
    count: usize,
    probability: f64,
}

/// Logits whose weights the compiler computes side by side.
const BLOCK: usize = 16;

/// Candidates that are gathered and sorted only as far as somebody looks: of a hundred thousand tokens a few dozen matter.
struct Ranked<'l> {
    logits: Cow<'l, [f32]>,
    /// Candidates whose logits are at least `floor`, which is infinite before the first look.
    scores: Vec<(u32, f32)>,
    floor: f32,
    /// All candidates.
    count: usize,
    /// Places from the first that are sorted.
    sorted: usize,
    greatest: f32,
    temperature: f32,
    /// The sum of what [`Ranked::weight`] gives for all candidates.
    sum: f64,
    /// The same for each [`BLOCK`] logits; empty where top-k has cut candidates off.
    blocks: Vec<f64>,
}

impl<'l> Ranked<'l> {
    /// Places sorted at the first look; each further look sorts four times as many.
    const FIRST: usize = 64;
    /// Tokens less likely than the likeliest by a factor of e to this power are gathered only when the others are used up.
    const RARE: f32 = 12.0;

    fn new(logits: Cow<'l, [f32]>, count: usize, top_k: usize, temperature: f32) -> Self {
        let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (scores, floor, blocks) = (Vec::new(), f32::INFINITY, Vec::new());
        let mut ranked = Self { logits, scores, floor, count, sorted: 0, greatest, temperature, sum: 1.0, blocks };
        if top_k > 0 && top_k < count {
            ranked.gather(f32::NEG_INFINITY);
            ranked.scores.select_nth_unstable_by(top_k - 1, by_score);
            ranked.scores.truncate(top_k);
            ranked.scores.sort_unstable_by(by_score);
            (ranked.sorted, ranked.count) = (top_k, top_k);
            ranked.sum = ranked.scores.iter().map(|score| f64::from(ranked.weight(score.1))).sum();
        } else if temperature > 0.0 {
            let sum_of = |logits: &[f32]| {
                let mut weights = [0.0f32; BLOCK];
                weights.iter_mut().zip(logits).for_each(|(weight, &logit)| {
                    *weight = if logit == f32::NEG_INFINITY { 0.0 } else { ranked.weight(logit) };
                });
                weights.iter().map(|&weight| f64::from(weight)).sum::<f64>()
            };
            ranked.blocks = ranked.logits.chunks(BLOCK).map(sum_of).collect();
            ranked.sum = ranked.blocks.iter().sum();
        }
        ranked
    }

    /// Whether every candidate may still be drawn.
    fn holds_all(&self) -> bool {
        !self.blocks.is_empty()
    }

    /// The token at `fraction` of the way through all candidates, in the order of their ids: where none is cut off, the
    /// order is of no account, and ranking half a vocabulary takes longer than everything else here.
    fn draw(&self, fraction: f64) -> u32 {
        let draw = fraction * self.sum;
        // The block, and the sum before it. Rounding may leave the draw behind all: then it is the last candidate's.
        let (mut block, mut before, mut end) = (0, 0.0, 0.0);
        for (number, &sum) in self.blocks.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
            (block, before, end) = (number, end, end + sum);
            if draw < end {
                break;
            }
        }
        let first = block * BLOCK;
        let mut chosen = first;
        for (token, logit) in (first..).zip(self.logits.iter().skip(first).take(BLOCK)) {
            if *logit != f32::NEG_INFINITY {
                chosen = token;
                before += f64::from(self.weight(*logit));
                if draw < before {
                    break;
                }
            }
        }
        chosen as u32
    }

    /// Adds the candidates from `floor` up to what was the floor before.
    fn gather(&mut self, floor: f32) {
        let below = std::mem::replace(&mut self.floor, floor);
        let wanted = |x: &f32| x.is_finite() && *x >= floor && *x < below;
        let found = self.logits.iter().enumerate().filter(|(_, x)| wanted(x)).map(|(id, &x)| (id as u32, x));
        self.scores.extend(found);
    }

    fn len(&self) -> usize {
        self.count
    }

    /// The greatest logit's token, the lower id where two are equal.
    fn best(&self) -> u32 {
        self.logits.iter().position(|&x| x == self.greatest).unwrap_or(0) as u32
    }

    fn weight(&self, logit: f32) -> f32 {
        exp_of_negative((logit - self.greatest) / self.temperature)
    }

    /// The candidate of a place, the likeliest being that of place 0.
    fn at(&mut self, place: usize) -> Candidate {
        while place >= self.sorted {
            if self.sorted == self.scores.len() {
                let is_first = self.floor == f32::INFINITY;
                self.gather(if is_first { self.greatest - Self::RARE * self.temperature } else { f32::NEG_INFINITY });
            }
            let rest = &mut self.scores[self.sorted..];
            let more = (3 * self.sorted).max(Self::FIRST).min(rest.len());
            if more < rest.len() {
                rest.select_nth_unstable_by(more, by_score);
            }
            rest[..more].sort_unstable_by(by_score);
            self.sorted += more;
        }
        let (token, logit) = self.scores[place];
        Candidate { token, probability: f64::from(self.weight(logit)) / self.sum }
    }
}

/// e to a power that is not positive, to 2 units in the last place; below -87 as at -87. The same bits on every processor.
fn exp_of_negative(x: f32) -> f32 {
    /// Added and taken off again, it rounds to a whole number, which then stands in the last bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.max(-87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    // ln 2 in two parts, the first exact in its product with a small whole number.
    let rest = (x - whole * 0.693_359_4) + whole * 2.121_944_4e-4;
    let polynomial = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let fraction = polynomial.iter().fold(0.0, |sum, coefficient| sum * rest + coefficient);
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    fraction * f32::from_bits(exponent << 23)
}

/// Descending, ties to the lower id: a total order, so that sorting has one result.
fn by_score(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The logarithms of the probabilities that logits stand for, without any option: of `token`, and of the `top` likeliest
/// tokens, likeliest first.
///
/// # Shapes
/// logits `[vocab]`.
pub fn log_probabilities(logits: &[f32], token: u32, top: usize) -> (f32, Vec<(u32, f32)>) {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - greatest).exp()).sum();
    let log_sum = f64::from(greatest) + sum.ln();
    let of = |logit: f32| (f64::from(logit) - log_sum) as f32;
    let mut scores: Vec<(u32, f32)> = Vec::new();
    if top > 0 {
        scores = logits.iter().enumerate().map(|(token, &logit)| (token as u32, logit)).collect();
        let top = top.min(scores.len());
        if top < scores.len() {
            scores.select_nth_unstable_by(top, by_score);
            scores.truncate(top);
        }
        scores.sort_unstable_by(by_score);
        scores.iter_mut().for_each(|score| score.1 = of(score.1));
    }
    (of(logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY)), scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of the probabilities 0.1, 0.4, 0.2, 0.3 (tokens 0 to 3).
    fn paper() -> Vec<f32> {
        [0.1f32, 0.4, 0.2, 0.3].iter().map(|p| p.ln()).collect()
    }

    fn plain() -> SamplingOptions {
        SamplingOptions { temperature: 1.0, ..SamplingOptions::greedy() }
    }

    fn survivors(options: SamplingOptions, history: &[u32]) -> Vec<(u32, f64)> {
        let sampler = Sampler::new(options).expect("valid options");
        let candidates = sampler.distribution(&paper(), history).expect("finite logits");
        candidates.iter().map(|c| (c.token, (c.probability * 1e4).round() / 1e4)).collect()
    }

    #[test]
    fn each_link_on_paper() {
        let all = vec![(1, 0.4), (3, 0.3), (2, 0.2), (0, 0.1)];
        assert_eq!(survivors(plain(), &[]), all);
        assert_eq!(survivors(SamplingOptions { top_k: 4, ..plain() }, &[]), all);
        assert_eq!(survivors(SamplingOptions { top_k: 2, ..plain() }, &[]), [(1, 0.5714), (3, 0.4286)]);
        assert_eq!(survivors(SamplingOptions { top_p: 0.1, ..plain() }, &[]), [(1, 1.0)]);
        assert_eq!(survivors(SamplingOptions { top_p: 0.65, ..plain() }, &[]), [(1, 0.5714), (3, 0.4286)]);
        assert_eq!(survivors(SamplingOptions { top_p: 0.75, ..plain() }, &[]), [(1, 0.4444), (3, 0.3333), (2, 0.2222)]);
        assert_eq!(survivors(SamplingOptions { min_p: 0.6, ..plain() }, &[]), [(1, 0.5714), (3, 0.4286)]);
        assert_eq!(survivors(SamplingOptions { min_p: 1.0, ..plain() }, &[]), [(1, 1.0)]);
        // Squares of the probabilities: 1, 16, 4, 9 of 30.
        assert_eq!(
            survivors(SamplingOptions { temperature: 0.5, ..plain() }, &[]),
            [(1, 0.5333), (3, 0.3), (2, 0.1333), (0, 0.0333)]
        );
    }

    #[test]
    fn links_apply_in_the_stated_order() {
        // top-k 2 leaves 4/7 and 3/7; 0.5 of that is reached by the first alone, of the whole it would take two.
        assert_eq!(survivors(SamplingOptions { top_k: 2, top_p: 0.5, ..plain() }, &[]), [(1, 1.0)]);
        assert_eq!(survivors(SamplingOptions { top_p: 0.5, ..plain() }, &[]).len(), 2);
        // Temperature before min-p: at 0.5 token 3 is 9/16 as likely as token 1, no longer 3/4.
        let options = SamplingOptions { temperature: 0.5, min_p: 0.6, ..plain() };
        assert_eq!(survivors(options, &[]), [(1, 1.0)]);
    }

    #[test]
    fn repetition_penalty_weakens_what_has_occurred_once() {
        // ln p is negative, so a penalty of 2 squares the probability: 0.16 among 0.1, 0.2, 0.3.
        let options = SamplingOptions { repetition_penalty: 2.0, ..plain() };
        let expected = [(3, 0.3947), (2, 0.2632), (1, 0.2105), (0, 0.1316)];
        assert_eq!(survivors(options, &[1]), expected);
        assert_eq!(survivors(options, &[1, 1, 1, 77]), expected);
        // A positive logit is divided: 4 becomes 2, below 3.
        let greedy = SamplingOptions { repetition_penalty: 2.0, ..SamplingOptions::greedy() };
        let mut sampler = Sampler::new(greedy).unwrap();
        assert_eq!(sampler.sample(&[4.0, 3.0], &[]).unwrap(), 0);
        assert_eq!(sampler.sample(&[4.0, 3.0], &[0]).unwrap(), 1);
    }

    #[test]
    fn presence_and_frequency_count_what_was_generated() {
        let logits = [2.0, 1.9, 1.0, 0.0];
        let best = |presence_penalty, frequency_penalty, history: &[u32]| {
            let options = SamplingOptions { presence_penalty, frequency_penalty, ..SamplingOptions::greedy() };
            Sampler::new(options).unwrap().after_prompt(2).sample(&logits, history).unwrap()
        };
        assert_eq!(best(0.2, 0.0, &[0, 0]), 0, "the prompt does not count");
        assert_eq!(best(0.2, 0.0, &[0, 0, 0]), 1);
        assert_eq!(best(0.2, 0.0, &[9, 9, 0, 1, 1, 1]), 0, "presence counts once");
        assert_eq!(best(0.0, 0.6, &[9, 9, 0, 1, 1]), 0, "2 - 0.6 above 1.9 - 1.2");
        assert_eq!(best(0.0, 1.2, &[9, 9, 0, 1]), 2);
        assert_eq!(best(-2.1, 0.0, &[9, 9, 3]), 3, "a negative penalty favours");
    }

    #[test]
    fn bias_is_added() {
        let mut sampler =
            Sampler::new(SamplingOptions::greedy()).unwrap().with_bias(&[(0, -100.0), (2, 0.5), (77, 9.0)]);
        assert_eq!(sampler.sample(&[9.0, 1.0, 0.8], &[]).unwrap(), 2);
    }

    #[test]
    fn ranking_in_part_is_ranking_the_whole() {
        let logits: Vec<f32> = (0..5000).map(|i| ((i * 7919) % 5003) as f32 / 500.0).collect();
        let sampler = Sampler::new(plain()).unwrap();
        let all = sampler.distribution(&logits, &[]).unwrap();
        assert_eq!(all.len(), 5000);
        assert!(all.windows(2).all(|pair| pair[0].probability >= pair[1].probability));
        let sum: f64 = all.iter().map(|c| c.probability).sum();
        assert!((sum - 1.0).abs() < 1e-9);
        let part = Sampler::new(SamplingOptions { top_p: 0.9, ..plain() }).unwrap().distribution(&logits, &[]).unwrap();
        assert!(part.len() < 5000 && part.iter().zip(&all).all(|(a, b)| a.token == b.token));
    }

    #[test]
    fn the_exponential_is_one() {
        for i in 0..=87_000 {
            let x = -(i as f32) / 1000.0;
            let (found, wanted) = (f64::from(exp_of_negative(x)), f64::from(x).exp());
            assert!((found / wanted - 1.0).abs() < 4e-7, "{x}: {found} instead of {wanted}");
        }
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert!(exp_of_negative(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn logarithms_of_probabilities() {
        let (own, top) = log_probabilities(&paper(), 3, 2);
        assert!((own - 0.3f32.ln()).abs() < 1e-6);
        assert_eq!(top.iter().map(|score| score.0).collect::<Vec<_>>(), [1, 3]);
        assert!((top[0].1 - 0.4f32.ln()).abs() < 1e-6);
        assert_eq!(log_probabilities(&paper(), 77, 9).1.len(), 4);
    }

    #[test]
    fn greedy_takes_the_greatest_and_the_lower_of_equals() {
        let mut sampler = Sampler::new(SamplingOptions::greedy()).unwrap();
        assert_eq!(sampler.sample(&[1.0, 5.0, 5.0, 2.0], &[]).unwrap(), 1);
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY, -9.0], &[]).unwrap(), 1);
        // Top-k cuts between equals in the same order.
        let sampler = Sampler::new(SamplingOptions { top_k: 2, ..plain() }).unwrap();
        let kept = sampler.distribution(&[0.0, 1.0, 0.0, 0.0], &[]).unwrap();
        assert_eq!(kept.iter().map(|c| c.token).collect::<Vec<_>>(), [1, 0]);
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_seed() {
        let draw = |seed| {
            let mut sampler = Sampler::new(SamplingOptions { seed, ..plain() }).unwrap();
            (0..20_000).map(|_| sampler.sample(&paper(), &[]).unwrap()).collect::<Vec<_>>()
        };
        let tokens = draw(7);
        assert_eq!(tokens, draw(7), "a seed repeats");
        assert_ne!(tokens, draw(8), "another seed differs");
        for (token, wanted) in [(0, 0.1), (1, 0.4), (2, 0.2), (3, 0.3)] {
            let share = tokens.iter().filter(|&&t| t == token).count() as f64 / tokens.len() as f64;
            // Four standard deviations of a binomial with 20,000 draws are at most 0.0139.
            assert!((share - wanted).abs() < 0.014, "token {token}: {share} instead of {wanted}");
        }
    }

    #[test]
    fn plain_draws_meet_every_candidate_and_no_other() {
        // Only tokens 20, 21 and 39 can be drawn; the rest of their blocks, and whole blocks, are excluded.
        let mut logits = vec![f32::NEG_INFINITY; 70];
        (logits[20], logits[21], logits[39]) = (1.0, 0.0, 1.0);
        let ranked = Ranked::new(Cow::Borrowed(&logits), 3, 0, 1.0);
        let share = 1.0 / (2.0 + f64::exp(-1.0));
        let drawn = |fraction| ranked.draw(fraction);
        assert_eq!([drawn(0.0), drawn(share - 1e-6), drawn(share + 1e-6)], [20, 20, 21]);
        assert_eq!([drawn(1.0 - share - 1e-6), drawn(1.0 - share + 1e-6), drawn(1.0)], [21, 39, 39]);
    }

    #[test]
    fn a_tiny_temperature_is_nearly_greedy_and_a_huge_one_nearly_uniform() {
        let cold = survivors(SamplingOptions { temperature: 1e-6, ..plain() }, &[]);
        assert_eq!(cold[0], (1, 1.0));
        let hot = survivors(SamplingOptions { temperature: 1e6, ..plain() }, &[]);
        assert!(hot.iter().all(|&(_, p)| p == 0.25), "{hot:?}");
    }

    #[test]
    fn unusable_logits_and_options_are_errors() {
        let mut sampler = Sampler::new(plain()).unwrap();
        let message = |result: Result<u32, EngineError>| result.unwrap_err().to_string();
        assert!(message(sampler.sample(&[0.0, f32::NAN], &[])).contains("NaN for token 1"));
        assert!(message(sampler.sample(&[f32::INFINITY], &[])).contains("inf for token 0"));
        assert!(message(sampler.sample(&[f32::NEG_INFINITY; 3], &[])).contains("all 3 tokens"));
        for options in [
            SamplingOptions { temperature: -1.0, ..plain() },
            SamplingOptions { temperature: f32::NAN, ..plain() },
            SamplingOptions { top_p: 0.0, ..plain() },
            SamplingOptions { top_p: 1.1, ..plain() },
            SamplingOptions { min_p: -0.1, ..plain() },
            SamplingOptions { min_p: f32::NAN, ..plain() },
            SamplingOptions { repetition_penalty: 0.0, ..plain() },
        ] {
            assert!(matches!(Sampler::new(options), Err(EngineError::Sampling { .. })), "{options:?}");
        }
    }
}
