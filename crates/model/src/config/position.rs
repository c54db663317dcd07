//! Rotary positions (Su et al. 2021) in their forms.

pub use moebius_kernels::rope::RopePairs;

/// How queries and keys turn with their position.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies: pair `i` turns by `position · theta^(−2i / dims)`.
    pub theta: f64,
    /// How many of a head's features turn, its first ones; even.
    pub dims: usize,
    /// Which features turn together.
    pub pairs: RopePairs,
    /// What becomes of the frequencies.
    pub scaling: RopeScaling,
}

/// How a model was made to read longer texts than it was first trained on.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// Positions are divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Slow pairs turn slower by a factor, fast ones do not, those between in part (Llama 3.1).
    Llama3 {
        /// The factor.
        factor: f64,
        /// Pairs that turn fewer times than this in the first context are slow.
        low: f64,
        /// Pairs that turn more times than this are fast.
        high: f64,
        /// The first context.
        original_positions: usize,
    },
    /// Each pair has a factor of its own (Ding et al. 2024, "LongRoPE"). Of the two lists that published files carry,
    /// transformers turns Phi-3.5-MoE by the short one, and texts within the first context of any model.
    LongRope {
        /// `[dims / 2]`.
        short: Vec<f64>,
        /// `[dims / 2]`; kept for writing.
        long: Vec<f64>,
        /// What cosines and sines are multiplied with.
        magnitude: f64,
        /// The first context.
        original_positions: usize,
    },
    /// Slow pairs turn slower by a factor, fast ones do not, a ramp between (Peng et al. 2023, "YaRN").
    Yarn(Yarn),
}

/// YaRN's constants, as published files spell them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// How much longer texts are.
    pub factor: f64,
    /// The first context.
    pub original_positions: usize,
    /// Pairs that turn more often than this in the first context are fast.
    pub beta_fast: f64,
    /// Pairs that turn less often than this are slow.
    pub beta_slow: f64,
    /// Whether the ends of the ramp are whole pairs.
    pub truncate: bool,
    /// What cosines and sines are multiplied with, if it does not follow from the rest.
    pub attention_factor: Option<f64>,
    /// DeepSeek's weight of ln(factor) in that.
    pub mscale: Option<f64>,
    /// DeepSeek's weight of ln(factor) in the scale of the scores.
    pub mscale_all_dim: Option<f64>,
}

impl Yarn {
    /// `1 + 0.1 · weight · ln(factor)`.
    pub fn magnitude(&self, weight: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * weight * self.factor.ln() + 1.0 }
    }

    /// What cosines and sines are multiplied with.
    fn turn_magnitude(&self) -> f64 {
        let inferred = || match (self.mscale, self.mscale_all_dim) {
            (Some(scale), Some(all)) if scale != 0.0 && all != 0.0 => self.magnitude(scale) / self.magnitude(all),
            _ => self.magnitude(1.0),
        };
        self.attention_factor.unwrap_or_else(inferred)
    }

    /// What share of each pair's frequency is divided by the factor.
    fn ramp(&self, theta: f64, dims: usize) -> impl Fn(usize) -> f64 + use<> {
        let pair_of = |turns: f64| {
            let context = self.original_positions as f64;
            dims as f64 * (context / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
        };
        let (low, high) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        let (low, high) = if self.truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, mut high) = (low.max(0.0), high.min(dims as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        move |pair| ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0)
    }
}

impl Rope {
    /// The plain form: all features turn, halves apart.
    pub fn plain(theta: f64, dims: usize) -> Self {
        Self { theta, dims, pairs: RopePairs::Halves, scaling: RopeScaling::None }
    }

    /// What position 1 turns each pair by, `[dims / 2]`, and what cosines and sines are multiplied with. Rounded to f32
    /// as transformers does.
    pub fn frequencies(&self) -> (Vec<f32>, f32) {
        let plain = |pair: usize| 1.0 / self.theta.powf(2.0 * pair as f64 / self.dims as f64);
        let of_pairs = |f: &dyn Fn(usize) -> f64| (0..self.dims / 2).map(|pair| f(pair) as f32).collect();
        match &self.scaling {
            RopeScaling::None => (of_pairs(&plain), 1.0),
            RopeScaling::Linear { factor } => (of_pairs(&|pair| plain(pair) / factor), 1.0),
            &RopeScaling::Llama3 { factor, low, high, original_positions } => {
                let scaled = |pair| {
                    let turns = original_positions as f64 * plain(pair) / std::f64::consts::TAU;
                    let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    plain(pair) * (smooth + (1.0 - smooth) / factor)
                };
                (of_pairs(&scaled), 1.0)
            }
            RopeScaling::LongRope { short, magnitude, .. } => {
                (of_pairs(&|pair| plain(pair) / short[pair]), *magnitude as f32)
            }
            RopeScaling::Yarn(yarn) => {
                let slow = yarn.ramp(self.theta, self.dims);
                let scaled = |pair| plain(pair) * (1.0 - slow(pair) + slow(pair) / yarn.factor);
                (of_pairs(&scaled), yarn.turn_magnitude() as f32)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const YARN: Yarn = Yarn {
        factor: 4.0,
        original_positions: 64,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
    };

    fn scaled(scaling: RopeScaling) -> (Vec<f32>, f32) {
        Rope { scaling, ..Rope::plain(100.0, 8) }.frequencies()
    }

    #[test]
    fn frequencies_on_paper() {
        let close = |found: &[f32], wanted: [f64; 4]| {
            let near = found.iter().zip(wanted).all(|(f, w)| (f64::from(*f) / w - 1.0).abs() < 1e-6);
            assert!(near && found.len() == 4, "{found:?}, wanted {wanted:?}");
        };
        let root = 0.1f64.sqrt();
        close(&scaled(RopeScaling::None).0, [1.0, root, 0.1, 0.1 * root]);
        close(&scaled(RopeScaling::Linear { factor: 2.0 }).0, [0.5, root / 2.0, 0.05, 0.05 * root]);
        let short = vec![1.0, 2.0, 4.0, 5.0];
        let long = RopeScaling::LongRope { long: short.clone(), short, magnitude: 1.5, original_positions: 8 };
        let (found, magnitude) = scaled(long);
        close(&found, [1.0, root / 2.0, 0.025, 0.02 * root]);
        assert_eq!(magnitude, 1.5);
        // Turns in 64 positions: 10.2, 3.2, 1.02, 0.32. Above 4 fast, below 1 slow.
        let llama = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original_positions: 64 };
        let turns = 64.0 / std::f64::consts::TAU;
        let between = |turns: f64| (turns - 1.0) / 3.0 + (1.0 - (turns - 1.0) / 3.0) / 8.0;
        close(&scaled(llama).0, [1.0, root * between(turns * root), 0.1 * between(turns * 0.1), 0.1 * root / 8.0]);
    }

    #[test]
    fn yarn_on_paper() {
        // 32 turns lie before the first pair; one turn at pair 8 ln(10.19) / (2 ln 100) = 2.016, whole: 3.
        let (found, magnitude) = scaled(RopeScaling::Yarn(YARN));
        let plain = scaled(RopeScaling::None).0;
        for (pair, (found, plain)) in found.iter().zip(plain).enumerate() {
            let slow = pair as f32 / 3.0;
            let wanted = plain * (1.0 - slow + slow / 4.0);
            assert!((found / wanted - 1.0).abs() < 1e-6, "{pair}: {found} {wanted}");
        }
        assert!((f64::from(magnitude) - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-7);
        let given = Yarn { attention_factor: Some(1.0), ..YARN };
        assert_eq!(scaled(RopeScaling::Yarn(given)).1, 1.0);
        let alike = Yarn { mscale: Some(0.7), mscale_all_dim: Some(0.7), ..YARN };
        assert_eq!(scaled(RopeScaling::Yarn(alike)).1, 1.0);
        let fractional = Yarn { truncate: false, ..YARN };
        assert!(scaled(RopeScaling::Yarn(fractional)).0[2] < found[2], "the ramp ends at 2.016, not at 3");
    }
}
