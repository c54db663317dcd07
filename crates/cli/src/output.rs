//! What reaches the user: standard output, colours, numbers, the one line of an error.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use moebius_model::LoadProgress;

/// Writes to standard output at once, so that text streams.
///
/// # Errors
/// The reason, under the name "standard output".
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("standard output")
}

/// Writes a line to standard error; nobody is left to hear of it if that fails.
pub fn note(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// How far something with a model's weights is, on standard error, if it takes longer than a moment: a bar on a terminal,
/// now and then a line elsewhere.
pub struct WeightsBar {
    what: &'static str,
    bar: Option<ProgressBar>,
    live: bool,
    started: Instant,
    last_line: Instant,
}

impl WeightsBar {
    /// Nothing is shown yet; `what` is done to the weights.
    pub fn new(what: &'static str) -> Self {
        let started = Instant::now();
        Self { what, bar: None, live: std::io::stderr().is_terminal(), started, last_line: started }
    }

    /// Shows how far it is.
    pub fn show(&mut self, progress: LoadProgress) {
        const MOMENT: Duration = Duration::from_millis(800);
        const BETWEEN_LINES: Duration = Duration::from_secs(10);
        let LoadProgress { done, total } = progress;
        if !self.live {
            if self.last_line.elapsed() >= BETWEEN_LINES {
                self.last_line = Instant::now();
                note(&self.line(progress));
            }
            return;
        }
        if self.bar.is_none() && self.started.elapsed() > MOMENT {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {percent} %, {eta} left");
            let style = style.expect("a template that is always the same");
            self.bar = Some(ProgressBar::new(total as u64).with_style(style).with_message(self.what));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
        }
    }

    fn line(&self, LoadProgress { done, total }: LoadProgress) -> String {
        format!("{}: {:.0} %", self.what, 100.0 * done as f64 / total.max(1) as f64)
    }
}

impl Drop for WeightsBar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The one line of a failure.
pub fn complain(error: &anyhow::Error) {
    note(&format!("error: {}", one_line(&causes(error))));
}

/// An error and its causes, each once: many errors repeat their cause in their own text.
fn causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            text = if text.is_empty() { cause } else { format!("{text}: {cause}") };
        }
    }
    text
}

/// Messages of libraries may have several lines.
fn one_line(message: &str) -> String {
    message.split(['\n', '\r']).map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Whether standard output is a terminal that wants colours (<https://no-color.org>).
pub fn colours() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
    std::io::stdout().is_terminal() && !unwanted && !dumb
}

/// A count as people read it: 812, 5.3 k, 1.24 M, 7.0 B, 2.8 T.
pub fn count(number: usize) -> String {
    let number = number as f64;
    let (scaled, unit) = match number {
        n if n >= 1e12 => (n / 1e12, " T"),
        n if n >= 1e9 => (n / 1e9, " B"),
        n if n >= 1e6 => (n / 1e6, " M"),
        n if n >= 1e4 => (n / 1e3, " k"),
        n => return format!("{n}"),
    };
    let decimals = if scaled >= 100.0 {
        0
    } else if scaled >= 10.0 {
        1
    } else {
        2
    };
    format!("{scaled:.decimals$}{unit}")
}

/// Bytes as text.
///
/// # Errors
/// The first byte that is no UTF-8, and where it stands.
pub fn utf8(bytes: Vec<u8>) -> anyhow::Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!("wanted text in UTF-8, found byte 0x{:02x} at offset {at}", error.as_bytes()[at])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_short() {
        let shown: Vec<String> =
            [0, 812, 9999, 12_345, 1_236_000, 46_700_000_000, 1_026_400_000_000].into_iter().map(count).collect();
        assert_eq!(shown, ["0", "812", "9999", "12.3 k", "1.24 M", "46.7 B", "1.03 T"]);
    }

    #[test]
    fn progress_has_a_line() {
        let bar = WeightsBar::new("writing weights");
        let lines = [(0, 0), (1, 3), (9, 9)].map(|(done, total)| bar.line(LoadProgress { done, total }));
        assert_eq!(lines, ["writing weights: 0 %", "writing weights: 33 %", "writing weights: 100 %"]);
    }

    #[test]
    fn what_is_no_text_is_placed() {
        let message = utf8(b"abc\xff\xfe".to_vec()).unwrap_err().to_string();
        assert_eq!(message, "wanted text in UTF-8, found byte 0xff at offset 3");
    }

    #[test]
    fn an_error_has_one_line() {
        assert_eq!(one_line("a: b\n  | here\r\n\n c"), "a: b | here c");
        let error = anyhow::anyhow!("disk full").context("file: disk full").context("saving");
        assert_eq!(causes(&error), "saving: file: disk full");
    }
}
