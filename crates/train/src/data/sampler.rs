//! The order of training windows: a seeded permutation an epoch, with an exact position that a checkpoint carries.
//!
//! Several streams are mixed by weight: the next window is taken from the stream that has the least of what its weight
//! promises it. After any number of windows no stream is a whole window away from its share, so batches are mixed alike,
//! and which stream comes next follows from the positions alone.
//!
//! Letters: `L` tokens a window. Window `i` covers tokens `i L ..= (i + 1) L`: inputs are the first `L`, targets the last
//! `L`. Windows do not overlap but for that one token; a tail shorter than a window is left out.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// Where in the stream of windows a run stands. With the seed it says everything about what comes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Full passes over the data so far.
    pub epoch: u64,
    /// Windows taken in this pass.
    pub taken: usize,
}

/// Yields window numbers for ever; each number once an epoch.
#[derive(Clone, Debug)]
pub struct WindowSampler {
    seed: u64,
    position: Position,
    order: Vec<u32>,
}

/// Number of windows of `length` tokens in `tokens` tokens (the last target needs one token more).
pub fn count_windows(tokens: usize, length: usize) -> usize {
    tokens.saturating_sub(1) / length
}

impl WindowSampler {
    /// A sampler over `windows` windows that stands at `position`.
    ///
    /// # Panics
    /// Without windows, with 2^32 or more of them, or with a position beyond them.
    pub fn new(seed: u64, windows: usize, position: Position) -> Self {
        assert!(windows > 0 && u32::try_from(windows).is_ok(), "{windows} windows");
        assert!(position.taken <= windows, "{} of {windows} windows taken", position.taken);
        Self { seed, position, order: permutation(seed, position.epoch, windows) }
    }

    /// Where the sampler stands.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Windows taken in all epochs.
    fn taken(&self) -> u64 {
        self.position.epoch * self.order.len() as u64 + self.position.taken as u64
    }

    /// The next window.
    pub fn next_window(&mut self) -> usize {
        if self.position.taken == self.order.len() {
            self.position = Position { epoch: self.position.epoch + 1, taken: 0 };
            self.order = permutation(self.seed, self.position.epoch, self.order.len());
        }
        self.position.taken += 1;
        self.order[self.position.taken - 1] as usize
    }
}

/// Yields windows of several streams, mixed by weight.
#[derive(Clone, Debug)]
pub struct MixedSampler {
    streams: Vec<WindowSampler>,
    /// Shares, which sum to one.
    shares: Vec<f64>,
}

impl MixedSampler {
    /// A sampler over streams of so many windows and such weights, that stands at `positions` (all at the start if there
    /// are none).
    ///
    /// # Panics
    /// Where [`WindowSampler::new`] does; with another number of positions than of streams.
    pub fn new(seed: u64, streams: &[(usize, f64)], positions: &[Position]) -> Self {
        assert!(positions.is_empty() || positions.len() == streams.len(), "{} positions", positions.len());
        let position = |at: usize| positions.get(at).copied().unwrap_or_default();
        // Streams of the same length must not be shuffled alike.
        let seed_of = |at: usize| seed.wrapping_add((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let total: f64 = streams.iter().map(|stream| stream.1).sum();
        let samplers = streams.iter().enumerate();
        Self {
            streams: samplers.map(|(at, stream)| WindowSampler::new(seed_of(at), stream.0, position(at))).collect(),
            shares: streams.iter().map(|stream| stream.1 / total).collect(),
        }
    }

    /// Where it stands, stream by stream.
    pub fn positions(&self) -> Vec<Position> {
        self.streams.iter().map(WindowSampler::position).collect()
    }

    /// The stream and the number of the next window.
    pub fn next_window(&mut self) -> (usize, usize) {
        let taken = self.streams.iter().map(WindowSampler::taken).collect::<Vec<_>>();
        let total = taken.iter().sum::<u64>() + 1;
        let lacks = |at: usize| self.shares[at] * total as f64 - taken[at] as f64;
        // The first of equals: `max_by` would give the last.
        let chosen = (0..taken.len()).rev().max_by(|&a, &b| lacks(a).total_cmp(&lacks(b))).expect("a stream");
        (chosen, self.streams[chosen].next_window())
    }
}

/// Fisher and Yates's shuffle of `0..windows`, drawn from ChaCha8 with the seed as key and the epoch as stream.
fn permutation(seed: u64, epoch: u64, windows: usize) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(epoch);
    let mut order: Vec<u32> = (0..windows as u32).collect();
    for last in (1..windows).rev() {
        // The high half of the product is uniform up to windows / 2^64, which no run can notice.
        let chosen = (u128::from(random.next_u64()) * (last as u128 + 1)) >> 64;
        order.swap(last, chosen as usize);
    }
    order
}

/// `count` windows spread evenly over `windows`, the same each time: what validation looks at.
pub fn fixed_windows(windows: usize, count: usize) -> Vec<usize> {
    let count = count.min(windows);
    (0..count).map(|i| i * windows / count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_window_once_an_epoch() {
        let mut sampler = WindowSampler::new(3, 17, Position::default());
        let mut epochs = Vec::new();
        for epoch in 0..4 {
            let order: Vec<usize> = (0..17).map(|_| sampler.next_window()).collect();
            assert_eq!(sampler.position(), Position { epoch, taken: 17 });
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..17).collect::<Vec<_>>());
            epochs.push(order);
        }
        assert_ne!(epochs[0], epochs[1], "epochs are shuffled apart");
    }

    #[test]
    fn the_position_says_everything() {
        let mut unbroken = WindowSampler::new(11, 5, Position::default());
        for _ in 0..23 {
            let mut resumed = WindowSampler::new(11, 5, unbroken.position());
            for _ in 0..12 {
                assert_eq!(resumed.next_window(), unbroken.clone().next_window());
                unbroken.next_window();
            }
        }
    }

    #[test]
    fn streams_are_mixed_by_weight() {
        let streams = [(100, 3.0), (7, 1.0), (5, 4.0)];
        let mut sampler = MixedSampler::new(3, &streams, &[]);
        let mut counts = [0.0; 3];
        for total in 1..=200 {
            let resumed = MixedSampler::new(3, &streams, &sampler.positions()).next_window();
            let (stream, window) = sampler.next_window();
            assert_eq!(resumed, (stream, window), "the positions say everything");
            assert!(window < streams[stream].0);
            counts[stream] += 1.0;
            for (at, count) in counts.iter().enumerate() {
                assert!((count - f64::from(total) * streams[at].1 / 8.0).abs() < 1.0 + 1e-9, "{counts:?}");
            }
        }
    }

    #[test]
    fn one_stream_is_the_plain_sampler() {
        let (mut mixed, mut plain) =
            (MixedSampler::new(5, &[(9, 1.0)], &[]), WindowSampler::new(5, 9, Position::default()));
        (0..30).for_each(|_| assert_eq!(mixed.next_window(), (0, plain.next_window())));
    }

    #[test]
    fn another_seed_another_order() {
        let order = |seed| permutation(seed, 0, 100);
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
    }

    #[test]
    fn windows_on_paper() {
        // 9 tokens, windows of 4: tokens 0..=4 and 4..=8.
        assert_eq!(count_windows(9, 4), 2);
        assert_eq!(count_windows(8, 4), 1);
        assert_eq!(count_windows(4, 4), 0);
        assert_eq!(count_windows(0, 4), 0);
        assert_eq!(fixed_windows(10, 4), [0, 2, 5, 7]);
        assert_eq!(fixed_windows(2, 4), [0, 1]);
    }
}
