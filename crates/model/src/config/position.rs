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
}

impl Rope {
    /// The plain form: all features turn, halves apart.
    pub fn plain(theta: f64, dims: usize) -> Self {
        Self { theta, dims, pairs: RopePairs::Halves, scaling: RopeScaling::None }
    }

    /// What position 1 turns each pair by, `[dims / 2]`, and what cosines and sines are multiplied with. Rounded to f32
    /// as transformers does.
    pub fn frequencies(&self) -> (Vec<f32>, f32) {
        let plain = |i: usize| 1.0 / self.theta.powf(2.0 * i as f64 / self.dims as f64);
        match self.scaling {
            RopeScaling::None => ((0..self.dims / 2).map(|i| plain(i) as f32).collect(), 1.0),
        }
    }
}
