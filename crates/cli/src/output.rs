//! What reaches the user: standard output, colours, numbers, the one line of an error.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Context;
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

/// A bar on standard error while a model's weights are packed, if that takes longer than a moment.
pub struct LoadBar {
    bar: Option<indicatif::ProgressBar>,
    started: Instant,
}

impl LoadBar {
    /// Nothing is shown yet.
    pub fn new() -> Self {
        Self { bar: None, started: Instant::now() }
    }

    /// Shows how far the loading is.
    pub fn show(&mut self, progress: LoadProgress) {
        const MOMENT: Duration = Duration::from_millis(800);
        if self.bar.is_none() && self.started.elapsed() > MOMENT {
            let style = indicatif::ProgressStyle::with_template("packing weights {wide_bar} {percent} %, {eta} left");
            let bar = indicatif::ProgressBar::new(progress.total as u64);
            self.bar = Some(bar.with_style(style.expect("a template that is always the same")));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(progress.done as u64);
        }
    }
}

impl Drop for LoadBar {
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
