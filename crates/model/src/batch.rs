//! [`Batch`]: tokens of several sequences, one below the other.

/// A ragged batch: only attention knows where sequences begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// `[tokens]`: ids.
    pub tokens: Vec<u32>,
    /// `[sequences + 1]`: the first row of each sequence, and the end.
    pub starts: Vec<usize>,
    /// `[tokens]`: each token's position in its sequence.
    pub positions: Vec<u32>,
}

impl Batch {
    /// Whole sequences, each from position 0.
    pub fn of_sequences<S: AsRef<[u32]>>(sequences: &[S]) -> Self {
        let mut batch = Self { tokens: Vec::new(), starts: vec![0], positions: Vec::new() };
        for sequence in sequences {
            batch.tokens.extend_from_slice(sequence.as_ref());
            batch.positions.extend(0..sequence.as_ref().len() as u32);
            batch.starts.push(batch.tokens.len());
        }
        batch
    }

    /// More tokens of one sequence of which `first_position` tokens were read before.
    pub fn continuing(tokens: &[u32], first_position: usize) -> Self {
        let first = first_position as u32;
        let positions = (first..first + tokens.len() as u32).collect();
        Self { tokens: tokens.to_vec(), starts: vec![0, tokens.len()], positions }
    }
}
