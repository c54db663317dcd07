//! TensorBoard's event files: what `metrics.jsonl` says, for who would rather look at it there.
//!
//! A file is a row of TFRecords, each a length, the masked CRC-32C of the length, an `Event` message and the masked
//! CRC-32C of that. Fields of the messages by number: `Event` wall_time 1, step 2, file_version 3, summary 5; `Summary`
//! value 1; `Value` tag 1, simple_value 2, tensor 8, metadata 9 (tensorflow/core/util/event.proto and
//! framework/summary.proto).
//!
//! The file is made anew from the log whenever a run starts, so that a resumed run has one file without gaps.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::metrics::{Record, Score, StepRecord, ValidationRecord};
use crate::{Result, TrainError, files};

/// The open event file of a run.
pub struct EventFile {
    path: PathBuf,
    file: File,
    tokens_per_step: usize,
}

impl EventFile {
    /// Writes the file of a run with the records so far.
    ///
    /// # Errors
    /// The system's.
    pub fn create(folder: &Path, records: &[Record], tokens_per_step: usize) -> Result<Self> {
        files::create_folder(folder)?;
        for old in files::entries(folder)? {
            if old.file_name().is_some_and(|name| name.to_string_lossy().starts_with("events.out.tfevents.")) {
                std::fs::remove_file(&old).map_err(TrainError::io("delete", &old))?;
            }
        }
        let now = now();
        // Records do not say when they were made, but how long steps took.
        let seconds = |record: &Record| if let Record::Step(step) = record { step.seconds } else { 0.0 };
        let mut time = now - records.iter().map(seconds).sum::<f64>();
        let mut bytes = framed(&version_event(time));
        for record in records {
            time += seconds(record);
            bytes.extend(framed_record(record, time, tokens_per_step));
        }
        let path = folder.join(format!("events.out.tfevents.{}.moebius", now as u64));
        files::write_whole(&path, &bytes)?;
        let file = OpenOptions::new().append(true).open(&path).map_err(TrainError::io("open", &path))?;
        Ok(Self { path, file, tokens_per_step })
    }

    /// Appends a record.
    ///
    /// # Errors
    /// The system's.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let bytes = framed_record(record, now(), self.tokens_per_step);
        self.file.write_all(&bytes).map_err(TrainError::io("write", &self.path))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// The TFRecord of a record; empty for one that TensorBoard has no place for.
fn framed_record(record: &Record, time: f64, tokens_per_step: usize) -> Vec<u8> {
    let values = match record {
        Record::Step(step) => step_values(step, tokens_per_step),
        Record::Validation(validation) => validation_values(validation),
        Record::Sample(sample) => vec![text_value("samples", &format!("**{}**{}", sample.prompt, sample.text))],
        Record::Spike(spike) => vec![scalar("events/spike", spike.loss.unwrap_or(f64::NAN))],
        Record::Collapse(collapse) => {
            vec![scalar(&format!("experts/layer_{}/effective", collapse.layer), collapse.effective_experts)]
        }
    };
    framed(&event(time, record.step(), &values))
}

fn step_values(step: &StepRecord, tokens_per_step: usize) -> Vec<Vec<u8>> {
    let mut values = vec![
        scalar("loss/train", step.loss),
        scalar("optimizer/learning_rate", step.learning_rate),
        scalar("optimizer/gradient_norm", step.gradient_norm),
        scalar("speed/tokens_per_second", tokens_per_step as f64 / step.seconds.max(1e-9)),
    ];
    if !step.load.is_empty() {
        values.push(scalar("loss/balance", step.balance_loss));
        values.push(scalar("loss/z", step.z_loss));
    }
    for (layer, load) in step.load.iter().enumerate() {
        let tag = |what: &str| format!("experts/layer_{layer}/{what}");
        values.push(scalar(&tag("max_violation"), load.max_violation));
        values.push(scalar(&tag("dead"), load.dead_experts as f64));
        values.push(scalar(&tag("load_entropy"), load.entropy));
        values.push(scalar(&tag("router_entropy"), load.router_entropy));
    }
    values
}

fn validation_values(validation: &ValidationRecord) -> Vec<Vec<u8>> {
    let both = |name: &str, score: &Score| {
        [scalar(&format!("loss/{name}"), score.loss), scalar(&format!("bits_per_byte/{name}"), score.bits_per_byte)]
    };
    let mut values = both("validation", &validation.score).to_vec();
    values.extend(validation.average.iter().flat_map(|score| both("validation_average", score)));
    for (name, score) in &validation.sets {
        values.extend(both(&format!("eval_{name}"), score));
    }
    values
}

/// A protocol buffer's variable-length number.
fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// A field of bytes: a text or a message.
fn field(number: u64, bytes: &[u8], out: &mut Vec<u8>) {
    varint(number << 3 | 2, out);
    varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

fn event_head(time: f64) -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend_from_slice(&time.to_le_bytes());
    event
}

/// The event that opens every file.
fn version_event(time: f64) -> Vec<u8> {
    let mut event = event_head(time);
    field(3, b"brain.Event:2", &mut event);
    event
}

fn event(time: f64, step: u64, values: &[Vec<u8>]) -> Vec<u8> {
    let mut summary = Vec::new();
    values.iter().for_each(|value| field(1, value, &mut summary));
    let mut event = event_head(time);
    varint(2 << 3, &mut event);
    varint(step, &mut event);
    field(5, &summary, &mut event);
    event
}

fn scalar(tag: &str, value: f64) -> Vec<u8> {
    let mut message = Vec::new();
    field(1, tag.as_bytes(), &mut message);
    message.push(2 << 3 | 5);
    message.extend_from_slice(&(value as f32).to_le_bytes());
    message
}

/// A text, as the text plugin wants it: a tensor of one string, and the plugin's name.
fn text_value(tag: &str, text: &str) -> Vec<u8> {
    const STRING: u8 = 7;
    let (mut dim, mut shape, mut tensor) = (vec![1 << 3, 1], Vec::new(), vec![1 << 3, STRING]);
    field(2, &std::mem::take(&mut dim), &mut shape);
    field(2, &shape, &mut tensor);
    field(8, text.as_bytes(), &mut tensor);
    let (mut plugin, mut metadata) = (Vec::new(), Vec::new());
    field(1, b"text", &mut plugin);
    field(1, &plugin, &mut metadata);
    let mut message = Vec::new();
    field(1, tag.as_bytes(), &mut message);
    field(8, &tensor, &mut message);
    field(9, &metadata, &mut message);
    message
}

/// A TFRecord around an event.
fn framed(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend_from_slice(&masked(crc32c(&length)).to_le_bytes());
    record.extend_from_slice(event);
    record.extend_from_slice(&masked(crc32c(event)).to_le_bytes());
    record
}

/// A checksum of data that hold checksums is weak; so they are turned and shifted (TFRecord's rule).
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit over a table of bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut crc = byte as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[byte] = crc;
            byte += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc: u32, &byte| crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::{step, validation};

    /// The check value of CRC-32C, and a vector of RFC 3720.
    #[test]
    fn checksums_are_the_published_ones() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    /// The first record that TensorFlow itself writes, up to its time.
    #[test]
    fn the_version_event_is_tensorflows() {
        let event = version_event(0.0);
        assert_eq!(event, b"\x09\0\0\0\0\0\0\0\0\x1a\x0dbrain.Event:2");
        assert_eq!(framed(&event).len(), 8 + 4 + 24 + 4);
    }

    #[test]
    fn a_restarted_run_has_one_file_with_everything() {
        let folder = tempfile::tempdir().unwrap();
        let records = [step(1, 4.0), step(2, 3.5), validation(2, 3.6)];
        let size = |path: &Path| std::fs::metadata(path).unwrap().len();
        let mut events = EventFile::create(folder.path(), &records[..1], 10).unwrap();
        records[1..].iter().for_each(|record| events.append(record).unwrap());
        let appended = size(&events.path);
        let again = EventFile::create(folder.path(), &records, 10).unwrap();
        assert_eq!(size(&again.path), appended);
        assert_eq!(files::entries(folder.path()).unwrap(), [again.path]);
    }
}
