//! From a row of logits to the next token.
//!
//! The chain, in this order: repetition penalty, temperature, top-k, top-p, min-p, draw. Probabilities are f64 and every
//! sum runs in one fixed order, so that a seed gives the same tokens on any number of threads.
//!
//! - repetition penalty (Keskar et al., CTRL, 2019): a token already seen has its positive logit divided by it and its
//!   negative logit multiplied;
//! - temperature 0 takes the greatest logit, the lower id where two are equal;
//! - top-p (Holtzman et al., 2019): the fewest most likely tokens whose probabilities reach p;
//! - min-p (Nguyen et al., 2024): tokens at least `min_p` times as likely as the likeliest.

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
    /// Seeds the draw.
    pub seed: u64,
}

impl SamplingOptions {
    /// The greatest logit, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
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
        check("repetition penalty", "a positive number", penalty, penalty.is_finite() && penalty > 0.0)
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
}

impl Sampler {
    /// A sampler at the start of its seed's sequence.
    ///
    /// # Errors
    /// [`EngineError::Sampling`] if an option is outside its range.
    pub fn new(options: SamplingOptions) -> Result<Self, EngineError> {
        options.validate()?;
        Ok(Self { options, random: ChaCha8Rng::seed_from_u64(options.seed) })
    }

    /// The next token after `history` (prompt and text so far, which only the repetition penalty reads).
    ///
    /// One number is drawn a call, also where one candidate is left; greedy choice draws none.
    ///
    /// # Errors
    /// [`EngineError::Logits`] for a logit that is NaN or +inf, [`EngineError::NoCandidate`] if all are -inf.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, EngineError> {
        let candidates = self.distribution(logits, history)?;
        if self.options.temperature == 0.0 {
            return Ok(candidates[0].token);
        }
        // 53 bits: every f64 step of [0, 1) is equally likely.
        let draw = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut cumulative = 0.0;
        for candidate in &candidates {
            cumulative += candidate.probability;
            if draw < cumulative {
                return Ok(candidate.token);
            }
        }
        // Rounding can leave the sum a hair below 1.
        Ok(candidates[candidates.len() - 1].token)
    }

    /// What [`Sampler::sample`] draws from: the survivors, most likely first, with probabilities that sum to 1.
    /// At temperature 0 the one greedy choice.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn distribution(&self, logits: &[f32], history: &[u32]) -> Result<Vec<Candidate>, EngineError> {
        if let Some((token, &found)) = logits.iter().enumerate().find(|(_, x)| x.is_nan() || **x == f32::INFINITY) {
            return Err(EngineError::Logits { token, found });
        }
        let mut scores = Self::scores(logits);
        if scores.is_empty() {
            return Err(EngineError::NoCandidate(logits.len()));
        }
        self.penalise_repetition(&mut scores, history);
        if self.options.temperature == 0.0 {
            let best = scores.iter().copied().min_by(by_score).expect("not empty");
            return Ok(vec![Candidate { token: best.0, probability: 1.0 }]);
        }
        self.keep_top_k(&mut scores);
        let mut candidates = softmax(&scores, self.options.temperature);
        self.keep_top_p(&mut candidates);
        self.keep_min_p(&mut candidates);
        normalise(&mut candidates);
        Ok(candidates)
    }

    /// (token, logit) of the tokens that are not ruled out.
    fn scores(logits: &[f32]) -> Vec<(u32, f32)> {
        logits.iter().enumerate().filter(|(_, x)| x.is_finite()).map(|(i, &x)| (i as u32, x)).collect()
    }

    /// Once a token, however often it has occurred.
    fn penalise_repetition(&self, scores: &mut [(u32, f32)], history: &[u32]) {
        let penalty = self.options.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut seen = history.to_vec();
        seen.sort_unstable();
        for (token, logit) in scores {
            if seen.binary_search(token).is_ok() {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// Sorts, most likely first, and keeps k.
    fn keep_top_k(&self, scores: &mut Vec<(u32, f32)>) {
        let k = self.options.top_k;
        if k > 0 && k < scores.len() {
            scores.select_nth_unstable_by(k - 1, by_score);
            scores.truncate(k);
        }
        scores.sort_unstable_by(by_score);
    }

    /// Keeps a candidate while those before it have not reached p: always the first, and the one that reaches it.
    fn keep_top_p(&self, candidates: &mut Vec<Candidate>) {
        let p = f64::from(self.options.top_p);
        if p == 1.0 {
            return;
        }
        let mut before = 0.0;
        let keep = candidates
            .iter()
            .take_while(|candidate| {
                let kept = before < p;
                before += candidate.probability;
                kept
            })
            .count();
        candidates.truncate(keep);
    }

    fn keep_min_p(&self, candidates: &mut Vec<Candidate>) {
        let least = f64::from(self.options.min_p) * candidates[0].probability;
        candidates.retain(|candidate| candidate.probability >= least);
    }
}

/// Descending, ties to the lower id: a total order, so that sorting has one result.
fn by_score(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Probabilities of sorted scores at a temperature above 0.
fn softmax(scores: &[(u32, f32)], temperature: f32) -> Vec<Candidate> {
    let (temperature, greatest) = (f64::from(temperature), f64::from(scores[0].1));
    let unnormalised = |&(token, logit): &(u32, f32)| Candidate {
        token,
        probability: ((f64::from(logit) - greatest) / temperature).exp(),
    };
    let mut candidates: Vec<Candidate> = scores.iter().map(unnormalised).collect();
    normalise(&mut candidates);
    candidates
}

fn normalise(candidates: &mut [Candidate]) {
    let sum: f64 = candidates.iter().map(|candidate| candidate.probability).sum();
    candidates.iter_mut().for_each(|candidate| candidate.probability /= sum);
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
