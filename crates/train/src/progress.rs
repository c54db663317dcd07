//! What a run tells whoever watches it: the command line draws it, tests ignore it.

use std::path::Path;

use crate::collapse::CollapseRecord;
use crate::metrics::{SampleRecord, StepRecord, ValidationRecord};
use crate::spikes::SpikeRecord;

/// Something that happened.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A part of the preparation begins, in words: `training the tokenizer`.
    Preparing(&'a str),
    /// Texts are being tokenised: bytes done and bytes in all.
    Tokenising {
        /// So far.
        done: u64,
        /// When all is done.
        total: u64,
    },
    /// The tokens are ready.
    Data(&'a DataFacts),
    /// The steps begin.
    Started(&'a RunFacts),
    /// A step is done.
    Step(&'a StepRecord),
    /// A validation is done; `best`: none was better before.
    Validation {
        /// What it gave.
        record: &'a ValidationRecord,
        /// Whether this is the lowest loss so far.
        best: bool,
    },
    /// A step's loss was a spike.
    Spike(&'a SpikeRecord),
    /// A layer's experts have collapsed.
    Collapse(&'a CollapseRecord),
    /// The model wrote a text.
    Sample(&'a SampleRecord),
    /// Validation has not improved for `train.patience` times: the run ends.
    EarlyStop {
        /// After this step.
        step: u64,
    },
    /// A checkpoint is on the disk.
    Saved {
        /// After this step.
        step: u64,
        /// The checkpoint's folder.
        path: &'a Path,
    },
    /// The final model is on the disk.
    Exported {
        /// With the weights after this step.
        step: u64,
        /// The model's folder.
        path: &'a Path,
        /// Why it is in our own layout, if no published family can express it.
        own_layout: Option<&'a str>,
    },
}

/// What the data amount to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DataFacts {
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Tokens to learn from, a separator after each document.
    pub train_tokens: usize,
    /// Tokens held back.
    pub valid_tokens: usize,
    /// Bytes of training text.
    pub train_bytes: usize,
    /// Streams that are mixed by weight; 1 if there are no weights.
    pub streams: usize,
    /// Whether the shards of an earlier start were used again.
    pub cached: bool,
}

/// What the run amounts to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunFacts {
    /// All parameters.
    pub total_parameters: usize,
    /// Parameters that one token uses.
    pub active_parameters: usize,
    /// Steps done already: 0, or the checkpoint's.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Tokens that one step sees.
    pub tokens_per_step: usize,
    /// Experts a token and experts a layer, if there are some.
    pub experts: Option<(usize, usize)>,
}

/// Receives the events of a run.
pub trait Progress {
    /// Called in the order of the events, between steps, never from another thread.
    fn event(&mut self, event: &Event<'_>);
}

/// Hears nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&mut self, _: &Event<'_>) {}
}

impl<F: FnMut(&Event<'_>)> Progress for F {
    fn event(&mut self, event: &Event<'_>) {
        self(event);
    }
}
