//! A model in the middle of one sequence: what it has read, and the logits that follow.

use moebius_kernels::gemm::Precision;
use moebius_model::{Batch, KvCache, Model, Observer};
use moebius_tensor::{Graph, Tensor, Var};

use crate::EngineError;

/// One sequence and its cache of keys and values.
pub struct Session<'m> {
    model: &'m Model,
    precision: Precision,
    cache: KvCache,
    /// What was read, one token a position.
    tokens: Vec<u32>,
}

impl<'m> Session<'m> {
    /// An empty sequence.
    pub fn new(model: &'m Model, precision: Precision) -> Self {
        Self { model, precision, cache: KvCache::new(&model.config), tokens: Vec::new() }
    }

    /// Tokens read so far.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens read so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Forgets all but the first `positions` tokens, so that another text may follow them.
    pub fn rewind(&mut self, positions: usize) {
        self.tokens.truncate(positions);
        self.cache.truncate(self.tokens.len());
    }

    /// Reads tokens after those read before, and gives the logits of what may follow the last one, `[vocab]`.
    /// However a sequence is cut into calls, the bits are the same.
    ///
    /// # Errors
    /// A token that the model lacks, a sequence longer than its context, and whatever the model reports.
    pub fn read(&mut self, tokens: &[u32], observer: &mut dyn Observer) -> Result<Vec<f32>, EngineError> {
        if tokens.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        let graph = Graph::inference(self.precision);
        let batch = Batch::continuing(tokens, self.position());
        let hidden = match self.model.forward(&graph, &batch, Some(&mut self.cache), observer) {
            Ok(hidden) => hidden,
            Err(error) => {
                // Lower layers may have cached what the failing one has not.
                self.cache.truncate(self.tokens.len());
                return Err(error.into());
            }
        };
        self.tokens.extend_from_slice(tokens);
        // The head runs on the one row that is wanted; it gives the same bits as among all rows.
        let [_, width] = hidden.dims::<2>()?;
        let data = hidden.data();
        let last = Tensor::new(&[1, width], data[data.len() - width..].to_vec());
        Ok(self.model.logits(&graph, &Var::constant(last)).data().to_vec())
    }
}
