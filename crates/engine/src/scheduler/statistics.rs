//! What is remembered of the steps: counts for people and for dashboards.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use moebius_moe::LoadStatistics;

/// Upper bounds of the numbers of sequences in a step by which the bytes of experts are told apart; more than the last are
/// one group of their own.
pub const STEP_SIZES: [usize; 4] = [1, 4, 16, 64];
/// Seconds of which the tokens are remembered one by one.
const SECONDS: usize = 120;

/// Counts since the beginning.
#[derive(Clone, Debug)]
pub struct Statistics {
    /// When it began.
    pub since: Instant,
    /// Sequences that run now.
    pub running: usize,
    /// Sequences that ran to their end.
    pub finished: u64,
    /// Requests that were dropped while waiting.
    pub dropped: u64,
    /// Sequences whose memory was taken for others; their tokens were read again.
    pub yielded: u64,
    /// Steps.
    pub steps: u64,
    /// Seconds of all steps, and those of them inside the model.
    pub step_seconds: f64,
    /// Seconds inside the model.
    pub model_seconds: f64,
    /// Tokens of prompts read.
    pub prompt_tokens: u64,
    /// Tokens written.
    pub generated_tokens: u64,
    /// Prompts of which a beginning was known.
    pub prefix_hits: u64,
    /// Tokens that were not read for that.
    pub prefix_tokens: u64,
    /// Tokens of each expert, by MoE layer.
    pub experts: BTreeMap<usize, LoadStatistics>,
    /// What steps read of the experts, by the number of sequences in the step: those of [`STEP_SIZES`] and more than the last.
    pub loads: [Load; STEP_SIZES.len() + 1],
    /// Tokens written in each of the last seconds, the current one last.
    tokens: VecDeque<u32>,
    /// The second that is last, since the beginning.
    second: u64,
    /// How long a sequence ran lately, in seconds: a mean in which the older count less.
    run_seconds: f64,
}

/// What steps of a size read of the experts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Bytes of expert weights, each expert's once a step.
    pub expert_bytes: u64,
    /// Rows of those steps.
    pub tokens: u64,
    /// The steps.
    pub steps: u64,
}

impl Load {
    /// Bytes of expert weights that were read for a token; `None` without one.
    pub fn bytes_per_token(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.expert_bytes as f64 / self.tokens as f64)
    }
}

impl Statistics {
    pub(super) fn new() -> Self {
        Self {
            since: Instant::now(),
            running: 0,
            finished: 0,
            dropped: 0,
            yielded: 0,
            steps: 0,
            step_seconds: 0.0,
            model_seconds: 0.0,
            prompt_tokens: 0,
            generated_tokens: 0,
            prefix_hits: 0,
            prefix_tokens: 0,
            experts: BTreeMap::new(),
            loads: Default::default(),
            tokens: VecDeque::from([0]),
            second: 0,
            run_seconds: 1.0,
        }
    }

    /// Bytes of expert weights that were read for a token, over all steps; `None` without one.
    pub fn expert_bytes_per_token(&self) -> Option<f64> {
        let mut all = Load::default();
        for load in &self.loads {
            all.expert_bytes += load.expert_bytes;
            all.tokens += load.tokens;
        }
        all.bytes_per_token()
    }

    /// Tokens written in each of the last 120 seconds (fewer after a short time), the current one last.
    pub fn tokens_by_second(&mut self) -> Vec<u32> {
        self.catch_up();
        self.tokens.iter().copied().collect()
    }

    /// When somebody who comes now may begin, with `waiting` before him.
    pub(super) fn expected_wait(&self, waiting: usize) -> Duration {
        let seconds = self.run_seconds * waiting as f64 / self.running.max(1) as f64;
        Duration::from_secs(seconds.clamp(1.0, 60.0).ceil() as u64)
    }

    pub(super) fn generated(&mut self, tokens: usize) {
        self.catch_up();
        self.generated_tokens += tokens as u64;
        if let Some(last) = self.tokens.back_mut() {
            *last += tokens as u32;
        }
    }

    pub(super) fn ran(&mut self, time: Duration) {
        self.finished += 1;
        self.run_seconds += 0.1 * (time.as_secs_f64() - self.run_seconds);
    }

    pub(super) fn read_experts(&mut self, sequences: usize, tokens: usize, expert_bytes: u64) {
        let group = STEP_SIZES.iter().position(|&most| sequences <= most).unwrap_or(STEP_SIZES.len());
        let load = &mut self.loads[group];
        load.expert_bytes += expert_bytes;
        load.tokens += tokens as u64;
        load.steps += 1;
    }

    fn catch_up(&mut self) {
        let now = self.since.elapsed().as_secs();
        for _ in 0..(now - self.second).min(SECONDS as u64) {
            self.tokens.push_back(0);
        }
        self.second = now;
        while self.tokens.len() > SECONDS {
            self.tokens.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_grouped_by_their_sequences() {
        let mut statistics = Statistics::new();
        for (sequences, tokens) in [(1, 1), (3, 3), (4, 4), (16, 16), (17, 17), (65, 65)] {
            statistics.read_experts(sequences, tokens, 100);
        }
        let per_token: Vec<_> = statistics.loads.iter().map(|load| load.bytes_per_token().unwrap()).collect();
        assert_eq!(per_token[..3], [100.0, 200.0 / 7.0, 100.0 / 16.0]);
        assert_eq!(statistics.loads[4].tokens, 65);
        assert_eq!(statistics.expert_bytes_per_token(), Some(600.0 / 106.0));
        assert_eq!(Load::default().bytes_per_token(), None);
    }

    #[test]
    fn seconds_move_on() {
        let mut statistics = Statistics::new();
        statistics.generated(3);
        statistics.generated(2);
        assert_eq!(*statistics.tokens_by_second().iter().max().unwrap(), 5);
        statistics.since -= Duration::from_secs(500);
        let later = statistics.tokens_by_second();
        assert_eq!((later.len(), later.iter().sum::<u32>()), (SECONDS, 0));
    }

    #[test]
    fn the_wait_is_told_within_bounds() {
        let mut statistics = Statistics::new();
        assert_eq!(statistics.expected_wait(0).as_secs(), 1);
        statistics.running = 2;
        for _ in 0..100 {
            statistics.ran(Duration::from_secs(10));
        }
        assert_eq!(statistics.expected_wait(4).as_secs(), 20);
        assert_eq!(statistics.expected_wait(1000).as_secs(), 60);
    }
}
