//! A model in the middle of one sequence: what it has read, and the logits that follow.

use std::ops::Range;

use moebius_kernels::attention::LayerCache;
use moebius_kernels::gemm::Precision;
use moebius_kernels::parallel::with_team;
use moebius_model::{Batch, KvCache, Model, Observer};
use moebius_tensor::{Graph, Tensor, Var};

use crate::EngineError;

/// One sequence and its cache of keys and values. A clone shares what the cache holds and goes its own way from there.
#[derive(Clone)]
pub struct Session<'m> {
    model: &'m Model,
    precision: Precision,
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

    /// The fewest positions that [`Session::rewind`] can go back to.
    pub fn earliest(&self) -> usize {
        self.cache.earliest()
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
    /// When the sequences have different models or precisions.
    pub fn read_step(
        readings: &mut [Reading<'_, 'm>],
        observer: &mut dyn Observer,
    ) -> Result<Option<Given>, EngineError> {
        let Some(first) = readings.first() else { return Ok(None) };
        let (model, precision) = (first.session.model, first.session.precision);
        let same =
            |reading: &Reading| std::ptr::eq(reading.session.model, model) && reading.session.precision == precision;
        assert!(readings.iter().all(same), "sequences of one model");
        if readings.iter().any(|reading| reading.tokens.is_empty()) {
            return Err(EngineError::EmptyPrompt);
        }
        with_team(|| read_awake(model, precision, readings, observer)).map(Some)
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
            // Lower layers may have cached what the failing one has not.
            for Reading { session, .. } in readings {
                session.cache.truncate(session.tokens.len());
            }
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
