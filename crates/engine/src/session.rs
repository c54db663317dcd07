//! A model in the middle of one sequence: what it has read, and the logits that follow.

use std::ops::Range;

use moebius_kernels::attention::LayerCache;
use moebius_kernels::gemm::Precision;
use moebius_kernels::parallel::with_team;
use moebius_model::{Batch, KvCache, Model, Numerics, Observer, Silent};
use moebius_tensor::{Graph, Tensor, Var};

use crate::EngineError;

/// One sequence and its cache of keys and values. A clone shares what the cache holds and goes its own way from there.
#[derive(Clone)]
pub struct Session<'m> {
    model: &'m Model,
    numerics: Numerics,
    cache: KvCache,
    /// What was read, one token a position.
    tokens: Vec<u32>,
}

/// What a pass gives of the tokens that it read of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing: more tokens follow.
    Nothing,
    /// The logits behind the last one, `[vocab]`.
    LastLogits,
    /// The logits behind each, `[tokens, vocab]`.
    AllLogits,
    /// The hidden states after the final norm, `[tokens, hidden]`.
    Hidden,
}

/// Tokens that a sequence reads in a pass.
pub struct Reading<'r, 'm> {
    /// The sequence.
    pub session: &'r mut Session<'m>,
    /// What it reads; at least one token.
    pub tokens: &'r [u32],
    /// What is asked for.
    pub wanted: Wanted,
}

/// What a pass gave of each sequence that read in it.
pub struct Given {
    /// `[tokens, hidden]`
    hidden: Var,
    /// The rows that were wanted, `[rows, vocab]`; none if no row was.
    logits: Option<Var>,
    /// Where the part of each sequence lies: in the logits, or in the hidden states.
    parts: Vec<Part>,
}

enum Part {
    Logits(Range<usize>),
    Hidden(Range<usize>),
}

impl Given {
    /// What was wanted of the sequence of a place, its rows one after the other; empty where nothing was.
    pub fn of(&self, place: usize) -> &[f32] {
        match (&self.parts[place], &self.logits) {
            (Part::Hidden(part), _) => &self.hidden.data()[part.clone()],
            (Part::Logits(part), Some(logits)) => &logits.data()[part.clone()],
            (Part::Logits(_), None) => &[],
        }
    }
}

impl<'m> Session<'m> {
    /// Positions that clones share or do not share as a whole.
    pub const BLOCK: usize = LayerCache::BLOCK;

    /// An empty sequence; a precision alone says how keys and values are held too.
    pub fn new(model: &'m Model, numerics: impl Into<Numerics>) -> Self {
        let numerics = numerics.into();
        Self { model, numerics, cache: KvCache::new(&model.config, numerics.cache), tokens: Vec::new() }
    }

    /// Tokens read so far.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens read so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The fewest positions that [`Session::rewind`] can go back to.
    pub fn earliest(&self) -> usize {
        self.cache.earliest()
    }

    /// Forgets all but the first `positions` tokens, so that another text may follow them; gives how many are left. A model
    /// whose state stands only for all that it has read forgets everything, unless nothing need be forgotten.
    pub fn rewind(&mut self, positions: usize) -> usize {
        let positions = positions.min(self.tokens.len());
        if positions < self.cache.earliest() {
            self.tokens.clear();
            self.cache = KvCache::new(&self.model.config, self.numerics.cache);
        } else {
            self.tokens.truncate(positions);
            self.cache.truncate(positions);
        }
        self.tokens.len()
    }

    /// Makes the cache hold the tokens read and no others, after a pass that failed: lower layers may have taken what the
    /// failing one has not. A state that cannot go back reads them again.
    fn restore(&mut self) {
        let tokens = self.tokens.clone();
        if self.rewind(tokens.len()) < tokens.len() {
            let (graph, batch) = (Graph::inference(self.numerics.precision), Batch::continuing(&tokens, 0));
            // What was read once can be read again.
            if self.model.forward(&graph, &batch, Some(&mut [&mut self.cache]), &mut Silent).is_ok() {
                self.tokens = tokens;
            }
        }
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
    /// When the sequences have different models or numerics, or there is not one row of tokens for each.
    pub fn read_together(
        sessions: &mut [&mut Session<'m>],
        tokens: &[&[u32]],
        observer: &mut dyn Observer,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        assert_eq!(sessions.len(), tokens.len(), "tokens for each sequence");
        let mut readings: Vec<Reading> = (sessions.iter_mut().zip(tokens))
            .map(|(session, tokens)| Reading { session, tokens, wanted: Wanted::LastLogits })
            .collect();
        let Some(given) = Self::read_step(&mut readings, observer)? else { return Ok(Vec::new()) };
        Ok((0..tokens.len()).map(|place| given.of(place).to_vec()).collect())
    }

    /// As [`Session::read_together`], and for each sequence gives what is wanted of it; `None` if there is no sequence.
    ///
    /// # Errors
    /// As [`Session::read`]; then no sequence has moved on.
    ///
    /// # Panics
    /// When the sequences have different models or numerics.
    pub fn read_step(
        readings: &mut [Reading<'_, 'm>],
        observer: &mut dyn Observer,
    ) -> Result<Option<Given>, EngineError> {
        let Some(first) = readings.first() else { return Ok(None) };
        let (model, numerics) = (first.session.model, first.session.numerics);
        let same =
            |reading: &Reading| std::ptr::eq(reading.session.model, model) && reading.session.numerics == numerics;
        assert!(readings.iter().all(same), "sequences of one model");
        if readings.iter().any(|reading| reading.tokens.is_empty()) {
            return Err(EngineError::EmptyPrompt);
        }
        with_team(|| read_awake(model, numerics.precision, readings, observer)).map(Some)
    }
}

/// [`Session::read_step`] with checked arguments and the pool's threads awake.
fn read_awake(
    model: &Model,
    precision: Precision,
    readings: &mut [Reading],
    observer: &mut dyn Observer,
) -> Result<Given, EngineError> {
    let parts: Vec<(&[u32], usize)> =
        readings.iter().map(|reading| (reading.tokens, reading.session.position())).collect();
    let batch = Batch::continuing_together(&parts);
    let graph = Graph::inference(precision);
    let mut caches: Vec<&mut KvCache> = readings.iter_mut().map(|reading| &mut reading.session.cache).collect();
    let hidden = match model.forward(&graph, &batch, Some(&mut caches), observer) {
        Ok(hidden) => hidden,
        Err(error) => {
            readings.iter_mut().for_each(|reading| reading.session.restore());
            return Err(error.into());
        }
    };
    for reading in readings.iter_mut() {
        reading.session.tokens.extend_from_slice(reading.tokens);
    }
    let [_, width] = hidden.dims::<2>()?;
    // The head runs on the rows that are wanted; they get the same bits as among all rows.
    let (mut rows, mut parts) = (Vec::new(), Vec::new());
    let vocabulary = model.config.vocab_size;
    for (reading, bounds) in readings.iter().zip(batch.starts.windows(2)) {
        let first = match reading.wanted {
            Wanted::Hidden => {
                parts.push(Part::Hidden(bounds[0] * width..bounds[1] * width));
                continue;
            }
            Wanted::Nothing => bounds[1],
            Wanted::LastLogits => bounds[1] - 1,
            Wanted::AllLogits => bounds[0],
        };
        let before = rows.len() / width * vocabulary;
        rows.extend_from_slice(&hidden.data()[first * width..bounds[1] * width]);
        parts.push(Part::Logits(before..rows.len() / width * vocabulary));
    }
    let count = rows.len() / width;
    let logits = (count > 0).then(|| model.logits(&graph, &Var::constant(Tensor::new(&[count, width], rows))));
    Ok(Given { hidden, logits, parts })
}

#[cfg(test)]
mod tests {
    use super::*;
    use moebius_model::config::{LayerConfig, Mamba, Mixer};
    use moebius_model::{ModelConfig, UniformDecoder};

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
    fn a_spoilt_state_is_made_again() {
        let model = model();
        let mut session = Session::new(&model, Precision::F32);
        session.read(&[1, 2], &mut Silent).unwrap();
        // As if a pass had failed half-way.
        let batch = Batch::continuing(&[7], 2);
        model.forward(&Graph::inference(Precision::F32), &batch, Some(&mut [&mut session.cache]), &mut Silent).unwrap();
        session.restore();
        assert_eq!((session.tokens(), session.cache.len()), (&[1, 2][..], 2));
        let wanted = Session::new(&model, Precision::F32).read(&[1, 2, 3], &mut Silent).unwrap();
        assert_eq!(session.read(&[3], &mut Silent).unwrap(), wanted);
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
