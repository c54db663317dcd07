//! [`DecodingState`]: what a decoder carries of one sequence.

/// Keys and values of what a sequence has read, those made of the encoder's answer, and how many tokens each expert took.
#[derive(Clone, Debug)]
pub struct DecodingState {
    pub(super) positions: usize,
    pub(super) layers: Vec<LayerMemory>,
}

/// One layer's.
#[derive(Clone, Debug)]
pub(super) struct LayerMemory {
    /// `[positions, heads * head_dim]`
    pub(super) keys: Vec<f32>,
    /// As the keys.
    pub(super) values: Vec<f32>,
    /// Keys and values of the encoder's answer.
    pub(super) cross: [Vec<f32>; 2],
    /// `[experts]`; a sequence's experts take so many tokens and no more, however it is cut into calls.
    pub(super) counts: Vec<u32>,
}

impl DecodingState {
    /// Positions read.
    pub fn len(&self) -> usize {
        self.positions
    }

    /// Whether nothing was read yet.
    pub fn is_empty(&self) -> bool {
        self.positions == 0
    }
}
