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
        Self::continuing_together(&sequences.iter().map(|sequence| (sequence, 0)).collect::<Vec<_>>())
    }

    /// More tokens of one sequence of which `first_position` tokens were read before.
    pub fn continuing(tokens: &[u32], first_position: usize) -> Self {
        Self::continuing_together(&[(tokens, first_position)])
    }

    /// More tokens of several sequences, each with the number of its tokens that were read before.
    pub fn continuing_together<S: AsRef<[u32]>>(sequences: &[(S, usize)]) -> Self {
        let mut batch = Self { tokens: Vec::new(), starts: vec![0], positions: Vec::new() };
        for (tokens, first_position) in sequences {
            let (tokens, first) = (tokens.as_ref(), *first_position as u32);
            batch.tokens.extend_from_slice(tokens);
            batch.positions.extend(first..first + tokens.len() as u32);
            batch.starts.push(batch.tokens.len());
        }
        batch
    }

    /// Some of its tokens, rising, in the same sequences and at their own positions.
    pub(crate) fn select(&self, tokens: &[usize]) -> Self {
        let before = |row: usize| tokens.partition_point(|&token| token < row);
        Self {
            tokens: tokens.iter().map(|&token| self.tokens[token]).collect(),
            starts: self.starts.iter().map(|&start| before(start)).collect(),
            positions: tokens.iter().map(|&token| self.positions[token]).collect(),
        }
    }

    /// One more than the last position of any token.
    pub(crate) fn end_position(&self) -> usize {
        self.positions.iter().max().map_or(0, |&last| last as usize + 1)
    }
}
