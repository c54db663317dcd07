//! `metrics.jsonl`: one JSON object a line, appended as the run goes, cut back to the checkpoint when it resumes.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use moebius_moe::LoadStatistics;
use serde::{Deserialize, Serialize};

use crate::{Result, TrainError, files};

/// How one layer's experts were loaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerLoad {
    /// Tokens that each expert got, once for each choice.
    pub counts: Vec<u64>,
    /// The largest load over the mean, less one: 0 is even (MaxVio, Wang et al. 2024).
    pub max_violation: f64,
    /// Entropy of the shares over its largest value: 1 is even.
    pub entropy: f64,
    /// Experts that got nothing.
    pub dead_experts: usize,
}

impl From<&LoadStatistics> for LayerLoad {
    fn from(statistics: &LoadStatistics) -> Self {
        Self {
            counts: statistics.counts.clone(),
            max_violation: statistics.max_violation(),
            entropy: statistics.entropy(),
            dead_experts: statistics.dead_experts(),
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
    /// The learning rate of this step.
    pub learning_rate: f64,
    /// The gradient's global norm before clipping.
    pub gradient_norm: f64,
    /// Tokens seen since the run began.
    pub tokens: u64,
    /// Seconds that this step took.
    pub seconds: f64,
    /// Load of the experts, layer by layer; empty in a dense model.
    pub load: Vec<LayerLoad>,
}

/// What a validation gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidationRecord {
    /// The step after which it was made.
    pub step: u64,
    /// Mean cross-entropy of the next token, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Cross-entropy in bits divided by the bytes of text that the targets stand for: comparable across tokenizers.
    pub bits_per_byte: f64,
    /// Tokens looked at.
    pub tokens: u64,
    /// Load of the experts, layer by layer; empty in a dense model.
    pub load: Vec<LayerLoad>,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// After each step.
    Step(StepRecord),
    /// After each validation.
    Validation(ValidationRecord),
}

impl Record {
    /// The step that the record belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(record) => record.step,
            Self::Validation(record) => record.step,
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
    /// Opens the log and drops every record after `step`, so that a resumed run says nothing twice.
    ///
    /// # Errors
    /// The system's, or a log with a line that is not one of ours.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        if path.exists() {
            let kept = Self::read(path)?.into_iter().filter(|record| record.step() <= step);
            let lines = kept.map(|record| line_of(&record)).collect::<String>();
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
            learning_rate: 1e-3,
            gradient_norm: 0.5,
            tokens: step * 10,
            seconds: 0.25,
            load,
        })
    }

    pub(crate) fn validation(step: u64, loss: f64) -> Record {
        let (perplexity, bits_per_byte) = (loss.exp(), loss / 3.0);
        Record::Validation(ValidationRecord { step, loss, perplexity, bits_per_byte, tokens: 100, load: Vec::new() })
    }

    #[test]
    fn resuming_cuts_back_and_drops_the_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        let records = [step(1, 4.0), step(2, 3.5), validation(2, 3.6), step(3, 3.25)];
        records.iter().for_each(|record| log.append(record).unwrap());
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"kind\":\"st").unwrap();

        let mut log = MetricsLog::open(&path, 2).unwrap();
        assert_eq!(MetricsLog::read(&path).unwrap(), records[..3]);
        log.append(&records[3]).unwrap();
        assert_eq!(MetricsLog::read(&path).unwrap(), records);
    }

    #[test]
    fn a_foreign_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"kind\":\"song\"}\n").unwrap();
        let error = MetricsLog::open(&path, 9).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl:1: wanted a record of a run, found unknown variant `song`"), "{error}");
    }
}
