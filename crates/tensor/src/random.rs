//! Seeded random numbers whose state can be stored and restored.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// ChaCha with 8 rounds: the same numbers on every machine.
#[derive(Clone, Debug)]
pub struct Rng {
    seed: u64,
    generator: ChaCha8Rng,
}

impl Rng {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, generator: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// Where the stream stands: the seed and the words drawn.
    pub fn state(&self) -> (u64, u128) {
        (self.seed, self.generator.get_word_pos())
    }

    /// The stream that stands where [`Rng::state`] said.
    pub fn at((seed, position): (u64, u128)) -> Self {
        let mut rng = Self::new(seed);
        rng.generator.set_word_pos(position);
        rng
    }

    /// Uniform in 0 (included) to 1 (excluded).
    pub fn uniform(&mut self) -> f32 {
        self.generator.random()
    }

    /// Uniform among 0 to `below - 1`.
    ///
    /// # Panics
    /// If `below` is zero.
    pub fn below(&mut self, below: usize) -> usize {
        self.generator.random_range(0..below)
    }

    /// Normal numbers of mean zero (Box and Muller 1958).
    pub fn fill_normal(&mut self, out: &mut [f32], standard_deviation: f32) {
        for pair in out.chunks_mut(2) {
            let radius = (-2.0 * (1.0 - f64::from(self.uniform())).ln()).sqrt() * f64::from(standard_deviation);
            let angle = std::f64::consts::TAU * f64::from(self.uniform());
            pair[0] = (radius * angle.cos()) as f32;
            if let Some(second) = pair.get_mut(1) {
                *second = (radius * angle.sin()) as f32;
            }
        }
    }

    /// Normal numbers of mean zero, those beyond two deviations drawn again. `standard_deviation` is that of the
    /// normal before the cut; what remains has 0.88 of it.
    pub fn fill_truncated_normal(&mut self, out: &mut [f32], standard_deviation: f32) {
        for x in out {
            let mut draw = [f32::INFINITY];
            while draw[0].abs() > 2.0 {
                self.fill_normal(&mut draw, 1.0);
            }
            *x = draw[0] * standard_deviation;
        }
    }

    /// Uniform numbers from `low` (included) to `high` (excluded, but for rounding).
    pub fn fill_uniform(&mut self, out: &mut [f32], low: f32, high: f32) {
        out.iter_mut().for_each(|x| *x = low + (high - low) * self.uniform());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_state_continues_the_stream() {
        let mut rng = Rng::new(7);
        rng.fill_normal(&mut [0.0; 33], 1.0);
        let mut again = Rng::at(rng.state());
        assert_eq!((rng.uniform(), rng.below(100)), (again.uniform(), again.below(100)));
    }

    #[test]
    fn normal_numbers_have_their_mean_and_deviation() {
        let mut x = vec![0.0; 100_001];
        Rng::new(1).fill_normal(&mut x, 2.0);
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / x.len() as f32;
        assert!(mean.abs() < 0.03 && (variance - 4.0).abs() < 0.1, "{mean} {variance}");
    }

    #[test]
    fn truncated_and_uniform_numbers_stay_within_their_bounds() {
        let mut x = vec![0.0; 100_000];
        let deviation = |x: &[f32]| (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt();
        Rng::new(1).fill_truncated_normal(&mut x, 0.5);
        assert!(x.iter().all(|x| x.abs() <= 1.0) && x.iter().any(|x| x.abs() > 0.95));
        assert!((deviation(&x) - 0.88 * 0.5).abs() < 0.01, "{}", deviation(&x));
        Rng::new(1).fill_uniform(&mut x, -3.0, 3.0);
        assert!(x.iter().all(|x| (-3.0..=3.0).contains(x)) && x.iter().any(|&x| x < -2.9));
        assert!((deviation(&x) - 3.0 / 3f32.sqrt()).abs() < 0.02, "{}", deviation(&x));
    }
}
