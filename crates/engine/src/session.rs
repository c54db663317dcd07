//! A model in the middle of one sequence: what it has read, and the logits that follow.

use moebius_kernels::gemm::Precision;
use moebius_kernels::parallel::with_team;
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
        Self {
            model,
            precision,
            cache: KvCache::new(&model.config, KvCache::format_for(precision)),
            tokens: Vec::new(),
        }
    }

    /// Tokens read so far.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens read so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Forgets all but the first `positions` tokens, so that another text may follow them; gives how many are left. A model
    /// whose state stands only for all that it has read forgets everything, unless nothing need be forgotten.
    pub fn rewind(&mut self, positions: usize) -> usize {
        let positions = positions.min(self.tokens.len());
        self.tokens.truncate(if positions < self.cache.earliest() { 0 } else { positions });
        self.go_back();
        self.tokens.len()
    }

    /// Makes the cache hold tokens read and no others: those before it, or none where it cannot go back.
    fn go_back(&mut self) {
        let positions = self.tokens.len().min(self.cache.len());
        if positions < self.cache.earliest() {
            self.cache = KvCache::new(&self.model.config, KvCache::format_for(self.precision));
        } else {
            self.cache.truncate(positions);
        }
    }

    /// Tokens read that the cache does not hold, because a failed pass has spoilt it: the next pass reads them again.
    fn pending(&self) -> &[u32] {
        &self.tokens[self.cache.len()..]
    }

    /// Reads tokens after those read before, and gives the logits of what may follow the last one, `[vocab]`.
    /// However a sequence is cut into calls, the bits are the same.
    ///
    /// # Errors
    /// A token that the model lacks, a sequence longer than its context, and whatever the model reports.
    pub fn read(&mut self, tokens: &[u32], observer: &mut dyn Observer) -> Result<Vec<f32>, EngineError> {
        let mut logits = Self::read_together(&mut [self], &[tokens], observer)?;
        Ok(logits.pop().expect("one sequence in, one out"))
    }

    /// Reads tokens of several sequences in one pass over the weights; gives the logits of what may follow each one's
    /// last token, `[sequences][vocab]`. Each sequence gets the bits that it would get alone.
    ///
    /// # Errors
    /// As [`Session::read`]; then no sequence has moved on.
    ///
    /// # Panics
    /// When the sequences have different models or precisions, or there is not one row of tokens for each.
    pub fn read_together(
        sessions: &mut [&mut Session<'m>],
        tokens: &[&[u32]],
        observer: &mut dyn Observer,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        assert_eq!(sessions.len(), tokens.len(), "tokens for each sequence");
        let Some(first) = sessions.first() else { return Ok(Vec::new()) };
        let (model, precision) = (first.model, first.precision);
        assert!(sessions.iter().all(|session| std::ptr::eq(session.model, model) && session.precision == precision));
        if tokens.iter().any(|tokens| tokens.is_empty()) {
            return Err(EngineError::EmptyPrompt);
        }
        with_team(|| Self::read_awake(model, precision, sessions, tokens, observer))
    }

    /// [`Session::read_together`] with checked arguments and the pool's threads awake.
    fn read_awake(
        model: &'m Model,
        precision: Precision,
        sessions: &mut [&mut Session<'m>],
        tokens: &[&[u32]],
        observer: &mut dyn Observer,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let parts: Vec<(Vec<u32>, usize)> = (tokens.iter().zip(sessions.iter()))
            .map(|(&tokens, session)| ([session.pending(), tokens].concat(), session.cache.len()))
            .collect();
        let batch = Batch::continuing_together(&parts);
        let graph = Graph::inference(precision);
        let mut caches: Vec<&mut KvCache> = sessions.iter_mut().map(|session| &mut session.cache).collect();
        let hidden = match model.forward(&graph, &batch, Some(&mut caches), observer) {
            Ok(hidden) => hidden,
            Err(error) => {
                // Lower layers may have cached what the failing one has not.
                sessions.iter_mut().for_each(|session| session.go_back());
                return Err(error.into());
            }
        };
        for (session, tokens) in sessions.iter_mut().zip(tokens) {
            session.tokens.extend_from_slice(tokens);
        }
        // The head runs on the rows that are wanted; they get the same bits as among all rows.
        let [_, width] = hidden.dims::<2>()?;
        let last: Vec<f32> =
            batch.starts[1..].iter().flat_map(|end| &hidden.data()[(end - 1) * width..end * width]).copied().collect();
        let last = Tensor::new(&[sessions.len(), width], last);
        let logits = model.logits(&graph, &Var::constant(last));
        Ok(logits.data().chunks_exact(model.config.vocab_size).map(<[f32]>::to_vec).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moebius_model::config::{LayerConfig, Mamba, Mixer};
    use moebius_model::{ModelConfig, Silent, UniformDecoder};

    /// A layer of attention, then one with a state.
    fn model() -> Model {
        let uniform = UniformDecoder { vocab_size: 32, hidden: 32, head_dim: 8, ..UniformDecoder::default() }.config();
        let mamba = Mamba { width: 64, states: 4, taps: 3, rank: 2, convolution_bias: true, projection_bias: false };
        let state = LayerConfig { mixer: Mixer::Mamba(mamba), ffn: uniform.layers[0].ffn };
        let config = ModelConfig { layers: vec![uniform.layers[0].clone(), state], ..uniform };
        Model::new(&config, 7).unwrap()
    }

    #[test]
    fn a_state_cannot_go_back_and_what_follows_is_the_same() {
        let model = model();
        let fresh = |tokens: &[u32]| Session::new(&model, Precision::F32).read(tokens, &mut Silent).unwrap();
        let mut session = Session::new(&model, Precision::F32);
        assert_eq!(session.read(&[1, 2, 3, 4], &mut Silent).unwrap(), fresh(&[1, 2, 3, 4]));
        // Nothing to forget: everything stays.
        assert_eq!(session.rewind(4), 4);
        assert_eq!(session.read(&[5], &mut Silent).unwrap(), fresh(&[1, 2, 3, 4, 5]));
        // Anything to forget: all goes, and is read again by whoever wants it.
        assert_eq!(session.rewind(2), 0);
        assert_eq!(session.read(&[1, 2, 9], &mut Silent).unwrap(), fresh(&[1, 2, 9]));
    }

    #[test]
    fn a_refused_pass_leaves_the_sequence_where_it_was() {
        let model = model();
        let mut session = Session::new(&model, Precision::F32);
        session.read(&[1, 2], &mut Silent).unwrap();
        assert!(session.read(&[3, 99], &mut Silent).is_err());
        assert_eq!(session.tokens(), [1, 2]);
        let wanted = Session::new(&model, Precision::F32).read(&[1, 2, 3], &mut Silent).unwrap();
        assert_eq!(session.read(&[3], &mut Silent).unwrap(), wanted);
    }
}
