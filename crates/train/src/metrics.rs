//! `metrics.jsonl`: one JSON object a line, appended as the run goes, cut back to the checkpoint when it resumes.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use moebius_moe::LoadStatistics;
use serde::{Deserialize, Serialize};

use crate::collapse::CollapseRecord;
use crate::spikes::SpikeRecord;
use crate::{Result, TrainError, files};

/// How one layer's experts were loaded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerLoad {
    /// Tokens that each expert got, once for each choice.
    pub counts: Vec<u64>,
    /// The largest load over the mean, less one: 0 is even (MaxVio, Wang et al. 2024).
    pub max_violation: f64,
    /// Entropy of the shares over its largest value: 1 is even.
    pub entropy: f64,
    /// Experts that got nothing.
    pub dead_experts: usize,
    /// Mean entropy of the router's probabilities for a token over its largest value: 0 is sure, 1 does not care which.
    #[serde(default)]
    pub router_entropy: f64,
}

impl LayerLoad {
    /// From the counts of some batches and their routers' mean entropy.
    pub fn new(statistics: &LoadStatistics, router_entropy: f64) -> Self {
        Self {
            counts: statistics.counts.clone(),
            max_violation: statistics.max_violation(),
            entropy: statistics.entropy(),
            dead_experts: statistics.dead_experts(),
            router_entropy,
        }
    }
}

/// What one optimiser step gave. Losses are means over the step's tokens, in nats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The step, from 1.
    pub step: u64,
    /// Cross-entropy of the next token.
    pub loss: f64,
    /// The load-balancing loss times its coefficient; 0 in a dense model.
    pub balance_loss: f64,
    /// The router's z-loss times its coefficient; 0 in a dense model.
    pub z_loss: f64,
    /// The routing method's own losses, each times its coefficient, mean over layers; 0 without a method.
    #[serde(default)]
    pub method_loss: f64,
    /// Choices that found their expert full, all layers together.
    #[serde(default)]
    pub dropped: u64,
    /// The learning rate of this step.
    pub learning_rate: f64,
    /// The gradient's global norm before clipping.
    pub gradient_norm: f64,
    /// Tokens seen since the run began.
    pub tokens: u64,
    /// Seconds that this step took.
    pub seconds: f64,
    /// Seconds of these that the optimiser took.
    #[serde(default)]
    pub optimizer_seconds: f64,
    /// Load of the experts, layer by layer; empty in a dense model.
    pub load: Vec<LayerLoad>,
}

/// How well a text is foretold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Mean cross-entropy of the next token, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Cross-entropy in bits divided by the bytes of text that the targets stand for: comparable across tokenizers.
    pub bits_per_byte: f64,
    /// Tokens looked at.
    pub tokens: u64,
}

/// What a validation gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidationRecord {
    /// The step after which it was made.
    pub step: u64,
    /// On `data.valid`.
    #[serde(flatten)]
    pub score: Score,
    /// The same with the average of the weights, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average: Option<Score>,
    /// On the texts of `data.eval`, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sets: BTreeMap<String, Score>,
    /// Load of the experts, layer by layer; empty in a dense model.
    pub load: Vec<LayerLoad>,
}

impl ValidationRecord {
    /// The lower of the two losses, and whether it is the average's.
    pub fn lowest(&self) -> (f64, bool) {
        match &self.average {
            Some(average) if average.loss < self.score.loss => (average.loss, true),
            _ => (self.score.loss, false),
        }
    }
}

/// A text that the model wrote on the way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleRecord {
    /// With the weights after this step.
    pub step: u64,
    /// What it wrote on from.
    pub prompt: String,
    /// What it wrote.
    pub text: String,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// After each step.
    Step(StepRecord),
    /// After each validation.
    Validation(ValidationRecord),
    /// A loss spike.
    Spike(SpikeRecord),
    /// A layer whose experts have collapsed.
    Collapse(CollapseRecord),
    /// A text written on the way.
    Sample(SampleRecord),
}

impl Record {
    /// The step that the record belongs to: of a spike that was undone, the step that the run went back to.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(record) => record.step,
            Self::Validation(record) => record.step,
            Self::Spike(record) => record.back_to.unwrap_or(record.step),
            Self::Collapse(record) => record.step,
            Self::Sample(record) => record.step,
        }
    }
}

/// The open log of a run.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens the log and drops every record after `step` and every rollback but the first `rollbacks`, so that a resumed
    /// run says nothing twice.
    ///
    /// # Errors
    /// The system's, or a log with a line that is not one of ours.
    pub fn open(path: &Path, step: u64, rollbacks: u64) -> Result<Self> {
        if path.exists() {
            let mut undone = 0;
            let is_known = |record: &Record| match record {
                Record::Spike(SpikeRecord { back_to: Some(_), .. }) => {
                    undone += 1;
                    undone <= rollbacks
                }
                record => record.step() <= step,
            };
            let lines =
                Self::read(path)?.into_iter().filter(is_known).map(|record| line_of(&record)).collect::<String>();
            files::write_whole(path, lines.as_bytes())?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(TrainError::io("open", path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Appends one line in one write, so that a killed process leaves at most one torn line, the last.
    ///
    /// # Errors
    /// The system's: a full disk, say.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        self.file.write_all(line_of(record).as_bytes()).map_err(TrainError::io("write", &self.path))
    }

    /// Waits until all lines are on the disk.
    ///
    /// # Errors
    /// The system's.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(TrainError::io("sync", &self.path))
    }

    /// All records of a log; a torn last line is left out.
    ///
    /// # Errors
    /// The system's, or a line that is not one of ours.
    pub fn read(path: &Path) -> Result<Vec<Record>> {
        let bytes = std::fs::read(path).map_err(TrainError::io("read", path))?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let lines = bytes[..whole].split_inclusive(|&byte| byte == b'\n').enumerate();
        lines
            .map(|(number, line)| {
                serde_json::from_slice(line).map_err(|error| TrainError::Data {
                    what: format!("{}:{}", path.display(), number + 1),
                    message: format!("wanted a record of a run, found {error}"),
                })
            })
            .collect()
    }
}

fn line_of(record: &Record) -> String {
    let mut line = serde_json::to_string(record).expect("records are plain data");
    line.push('\n');
    line
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn step(step: u64, loss: f64) -> Record {
        let load = Vec::new();
        Record::Step(StepRecord {
            step,
            loss,
            balance_loss: 0.02,
            z_loss: 0.0,
            method_loss: 0.0,
            dropped: 0,
            learning_rate: 1e-3,
            gradient_norm: 0.5,
            tokens: step * 10,
            seconds: 0.25,
            optimizer_seconds: 0.0,
            load,
        })
    }

    pub(crate) fn validation(step: u64, loss: f64) -> Record {
        let score = Score { loss, perplexity: loss.exp(), bits_per_byte: loss / 3.0, tokens: 100 };
        let (sets, load) = (BTreeMap::new(), Vec::new());
        Record::Validation(ValidationRecord { step, score, average: None, sets, load })
    }

    #[test]
    fn resuming_cuts_back_and_drops_the_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, 0, 0).unwrap();
        let records = [step(1, 4.0), step(2, 3.5), validation(2, 3.6), step(3, 3.25)];
        records.iter().for_each(|record| log.append(record).unwrap());
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"kind\":\"st").unwrap();

        let mut log = MetricsLog::open(&path, 2, 0).unwrap();
        assert_eq!(MetricsLog::read(&path).unwrap(), records[..3]);
        log.append(&records[3]).unwrap();
        assert_eq!(MetricsLog::read(&path).unwrap(), records);
    }

    #[test]
    fn a_foreign_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"kind\":\"song\"}\n").unwrap();
        let error = MetricsLog::open(&path, 9, 0).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl:1: wanted a record of a run, found unknown variant `song`"), "{error}");
    }
}
