//! The view of a training run: a live display on a terminal, plain lines elsewhere.

mod blocks;

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use moebius_train::collapse::CollapseRecord;
use moebius_train::metrics::{LayerLoad, StepRecord, ValidationRecord};
use moebius_train::progress::{DataFacts, RunFacts};
use moebius_train::spikes::SpikeRecord;
use moebius_train::{Event, Progress};

use crate::output::{self, count};

/// Speed and time left come from this many recent steps.
const RECENT_STEPS: usize = 50;

/// Lines of the loss curve.
const CURVE_ROWS: usize = 5;

/// Plain lines about steps come at most this often.
const BETWEEN_LINES: Duration = Duration::from_secs(5);

/// The live part of the display, if there is one: a spinner, then the bar of steps. Static, because ctrl-C has
/// something to say too.
static LIVE: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Writes a line that stays, above the live part.
pub fn line(text: &str) {
    match live_part() {
        Some(bar) => bar.println(text),
        None => output::note(text),
    }
}

/// A handle to the live part; a clone shares what it shows.
fn live_part() -> Option<ProgressBar> {
    LIVE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
}

fn set_live_part(bar: Option<ProgressBar>) {
    *LIVE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = bar;
}

/// Draws the events of a run on standard error.
pub struct Display {
    /// Whether there is a terminal to draw on.
    live: bool,
    facts: Option<RunFacts>,
    validation_loss: Option<f64>,
    recent_seconds: VecDeque<f64>,
    /// All losses of this process's steps, for the curve.
    losses: Vec<f64>,
    last_line: Option<Instant>,
}

impl Display {
    /// A display that suits standard error.
    pub fn new() -> Self {
        Self {
            live: std::io::stderr().is_terminal(),
            facts: None,
            validation_loss: None,
            recent_seconds: VecDeque::new(),
            losses: Vec::new(),
            last_line: None,
        }
    }

    /// Takes the live part away; lines stay.
    pub fn close(&mut self) {
        if let Some(bar) = live_part() {
            bar.finish_and_clear();
        }
        set_live_part(None);
    }

    /// What is being prepared is shown while it lasts; in a log the facts that come of it suffice.
    fn preparing(&mut self, part: &str) {
        if self.live {
            let spinner = live_part().unwrap_or_else(ProgressBar::new_spinner);
            spinner.enable_steady_tick(Duration::from_millis(100));
            spinner.set_message(part.to_string());
            set_live_part(Some(spinner));
        }
    }

    fn started(&mut self, facts: &RunFacts) {
        self.close();
        let from = if facts.step > 0 { format!(", resumed after step {}", facts.step) } else { String::new() };
        line(&format!(
            "model: {} parameters, {} active a token; {} steps of {} tokens{from}",
            count(facts.total_parameters),
            count(facts.active_parameters),
            facts.steps,
            facts.tokens_per_step,
        ));
        self.facts = Some(*facts);
        if self.live {
            let style = ProgressStyle::with_template("{bar:40} step {pos}/{len}\n{msg}").expect("a template");
            set_live_part(Some(ProgressBar::new(facts.steps).with_style(style).with_position(facts.step)));
        }
    }

    fn step(&mut self, record: &StepRecord) {
        self.recent_seconds.push_back(record.seconds);
        if self.recent_seconds.len() > RECENT_STEPS {
            self.recent_seconds.pop_front();
        }
        self.losses.push(record.loss);
        let Some(facts) = self.facts else { return };
        let state = self.state(record, &facts);
        if let Some(bar) = live_part() {
            bar.set_position(record.step);
            bar.set_message(self.picture(record, &state));
        } else if record.step == facts.steps || self.last_line.is_none_or(|last| last.elapsed() >= BETWEEN_LINES) {
            self.last_line = Some(Instant::now());
            let load = load(&record.load).map_or_else(String::new, |load| format!("  {load}"));
            output::note(&format!("step {}/{}  {state}{load}", record.step, facts.steps));
        }
    }

    /// The live part below the bar: figures, the curve of the loss, each layer's load. As much of it as the terminal has
    /// room for.
    fn picture(&self, record: &StepRecord, state: &str) -> String {
        let (height, width) = console_size();
        let mut lines = vec![state.to_owned()];
        lines.extend(blocks::curve(&self.losses, width.saturating_sub(12).min(100), CURVE_ROWS));
        lines.extend(blocks::loads(&record.load));
        lines.truncate(height.saturating_sub(3).max(1));
        let cut = |line: String| line.chars().take(width.saturating_sub(1)).collect::<String>();
        lines.into_iter().map(cut).collect::<Vec<_>>().join("\n")
    }

    /// Loss, validation loss, speed, time left.
    fn state(&self, record: &StepRecord, facts: &RunFacts) -> String {
        let per_step = self.recent_seconds.iter().sum::<f64>() / self.recent_seconds.len() as f64;
        let left = per_step * facts.steps.saturating_sub(record.step) as f64;
        let mut parts = vec![format!("loss {:.4}", record.loss)];
        if let Some(loss) = self.validation_loss {
            parts.push(format!("validation {loss:.4}"));
        }
        parts.push(format!("{} tokens/s", count((facts.tokens_per_step as f64 / per_step) as usize)));
        parts.push(format!("{} left", duration(left)));
        parts.join("  ")
    }
}

impl Progress for Display {
    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Preparing(part) => self.preparing(part),
            Event::Tokenising { done, total } => {
                let part = 100.0 * *done as f64 / (*total).max(1) as f64;
                self.preparing(&format!("tokenising the texts: {part:.0} %, {} bytes", count(*done as usize)));
            }
            Event::Data(facts) => line(&data(facts)),
            Event::Started(facts) => self.started(facts),
            Event::Step(record) => self.step(record),
            Event::Validation { record, best } => {
                self.validation_loss = Some(record.score.loss);
                line(&validation(record, *best));
            }
            Event::Spike(spike) => line(&spike_line(spike)),
            Event::Collapse(collapse) => line(&collapse_line(collapse)),
            Event::Sample(sample) => {
                let text = format!("{:?}", format!("{}{}", sample.prompt, sample.text));
                line(&format!("step {}: writes {text}", sample.step));
            }
            Event::EarlyStop { step } => line(&format!("step {step}: validation no longer improves: the run ends")),
            Event::Saved { step, path } => line(&format!("step {step}: saved {}", path.display())),
            Event::Exported { step, path, own_layout } => {
                line(&format!("the weights of step {step} are the model in {}", path.display()));
                if let Some(reason) = own_layout {
                    line(&format!("it is in our own layout, model_type moebius: {reason}"));
                }
            }
            _ => {}
        }
    }
}

fn data(facts: &DataFacts) -> String {
    format!(
        "data: {} tokens to learn from ({} bytes{}), {} held back, vocabulary {}{}",
        count(facts.train_tokens),
        count(facts.train_bytes),
        if facts.streams > 1 { format!(", {} sources mixed by weight", facts.streams) } else { String::new() },
        count(facts.valid_tokens),
        facts.vocab_size,
        if facts.cached { ", as prepared before" } else { "" },
    )
}

/// Lines and columns of the terminal.
fn console_size() -> (usize, usize) {
    let (height, width) = console::Term::stderr().size();
    (usize::from(height), usize::from(width))
}

fn validation(record: &ValidationRecord, best: bool) -> String {
    let score = &record.score;
    let mut text =
        format!("step {}: validation loss {:.4}, {:.4} bits a byte", record.step, score.loss, score.bits_per_byte);
    if let Some(average) = &record.average {
        text.push_str(&format!(", with averaged weights {:.4}", average.loss));
    }
    for (name, score) in &record.sets {
        text.push_str(&format!(", {name} {:.4}", score.loss));
    }
    if best {
        text.push_str(", the best so far");
    }
    text
}

fn spike_line(spike: &SpikeRecord) -> String {
    let what = match (spike.loss, spike.deviations) {
        (Some(loss), Some(deviations)) => {
            format!("loss spike {loss:.4}, usual are {:.4}, {deviations:.0} deviations below", spike.usual)
        }
        _ => "loss or gradient is no number".to_owned(),
    };
    let then = match spike.back_to {
        Some(step) => format!("; back to the checkpoint of step {step}, the data up to here are skipped"),
        None => String::new(),
    };
    format!("step {}: {what}{then}", spike.step)
}

fn collapse_line(collapse: &CollapseRecord) -> String {
    let dead = match collapse.dead.len() {
        0 => String::new(),
        dead => format!(", {dead} of them dead"),
    };
    format!(
        "step {}: layer {} has collapsed: {:.1} experts in effect of {}{dead}, half of all goes to {:?}; {}",
        collapse.step, collapse.layer, collapse.effective_experts, collapse.experts, collapse.busiest, collapse.advice
    )
}

/// The load of the least even layer.
fn load(layers: &[LayerLoad]) -> Option<String> {
    let worst = layers.iter().enumerate().max_by(|a, b| a.1.max_violation.total_cmp(&b.1.max_violation));
    let (layer, worst) = worst?;
    Some(format!("load {} {} (layer {layer})", blocks::bars(&worst.counts), blocks::figures(worst)))
}

/// `45s`, `3m20s`, `2h05m`.
pub fn duration(seconds: f64) -> String {
    match seconds.round() as u64 {
        s if s < 60 => format!("{s}s"),
        s if s < 3600 => format!("{}m{:02}s", s / 60, s % 60),
        s => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        let shown: Vec<String> = [0.2, 59.4, 200.0, 7500.0].into_iter().map(duration).collect();
        assert_eq!(shown, ["0s", "59s", "3m20s", "2h05m"]);
    }
}
