//! The view of a training run: a live display on a terminal, plain lines elsewhere.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use moebius_train::metrics::{LayerLoad, StepRecord};
use moebius_train::progress::{DataFacts, RunFacts};
use moebius_train::{Event, Progress};

use crate::output::{self, count};

/// Speed and time left come from this many recent steps.
const RECENT_STEPS: usize = 50;

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
        let Some(facts) = self.facts else { return };
        let state = self.state(record, &facts);
        if let Some(bar) = live_part() {
            bar.set_position(record.step);
            bar.set_message(state);
        } else if record.step == facts.steps || self.last_line.is_none_or(|last| last.elapsed() >= BETWEEN_LINES) {
            self.last_line = Some(Instant::now());
            output::note(&format!("step {}/{}  {state}", record.step, facts.steps));
        }
    }

    /// Loss, validation loss, speed, time left, load of the experts.
    fn state(&self, record: &StepRecord, facts: &RunFacts) -> String {
        let per_step = self.recent_seconds.iter().sum::<f64>() / self.recent_seconds.len() as f64;
        let left = per_step * facts.steps.saturating_sub(record.step) as f64;
        let mut parts = vec![format!("loss {:.4}", record.loss)];
        if let Some(loss) = self.validation_loss {
            parts.push(format!("validation {loss:.4}"));
        }
        parts.push(format!("{} tokens/s", count((facts.tokens_per_step as f64 / per_step) as usize)));
        parts.push(format!("{} left", duration(left)));
        parts.extend(load(&record.load));
        parts.join("  ")
    }
}

impl Progress for Display {
    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Preparing(part) => self.preparing(part),
            Event::Data(facts) => line(&data(facts)),
            Event::Started(facts) => self.started(facts),
            Event::Step(record) => self.step(record),
            Event::Validation { record, best } => {
                self.validation_loss = Some(record.loss);
                let mark = if *best { ", the best so far" } else { "" };
                line(&format!(
                    "step {}: validation loss {:.4}, {:.4} bits a byte{mark}",
                    record.step, record.loss, record.bits_per_byte
                ));
            }
            Event::Saved { step, path } => line(&format!("step {step}: saved {}", path.display())),
            Event::Exported { step, path } => {
                line(&format!("the weights of step {step} are the model in {}", path.display()));
            }
            _ => {}
        }
    }
}

fn data(facts: &DataFacts) -> String {
    format!(
        "data: {} tokens to learn from ({} bytes), {} held back, vocabulary {}{}",
        count(facts.train_tokens),
        count(facts.train_bytes),
        count(facts.valid_tokens),
        facts.vocab_size,
        if facts.cached { ", as prepared before" } else { "" },
    )
}

/// How evenly the experts of the least even layer are loaded: a bar for each expert, full height for the busiest.
fn load(layers: &[LayerLoad]) -> Option<String> {
    const HEIGHTS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    const MOST_BARS: usize = 16;
    let worst = layers.iter().enumerate().max_by(|a, b| a.1.max_violation.total_cmp(&b.1.max_violation));
    let (layer, worst) = worst?;
    let busiest = worst.counts.iter().copied().max().filter(|&busiest| busiest > 0)?;
    let height = |&load: &u64| HEIGHTS[(load * 7).div_ceil(busiest) as usize];
    let bars: String = if worst.counts.len() <= MOST_BARS {
        worst.counts.iter().map(height).collect::<String>() + " "
    } else {
        String::new()
    };
    let idle = worst.dead_experts;
    let idle = if idle > 0 { format!(", {idle} idle") } else { String::new() };
    Some(format!("load {bars}busiest {:.2}x the mean (layer {layer}{idle})", 1.0 + worst.max_violation))
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
