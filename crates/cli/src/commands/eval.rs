//! `moebius eval`: loss, perplexity and bits a byte on a text, by a sliding window.

use std::ops::Range;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use moebius_kernels::gemm::Precision;
use moebius_kernels::loss::cross_entropy_rows;
use moebius_model::{Batch, Model, Silent};
use moebius_tensor::{Graph, Tensor, Var};
use serde_json::json;

use crate::arguments::EvalArguments;
use crate::models::Source;
use crate::output;

/// The default window is the model's context, but attention over more than this is rarely wanted.
const LONGEST_DEFAULT_WINDOW: usize = 4096;

/// Windows go through the model together up to this many tokens.
const TOKENS_AT_ONCE: usize = 4096;

/// Logits in memory at once.
const LOGITS_AT_ONCE: usize = 1 << 24;

/// Runs the command.
///
/// # Errors
/// A model or text that cannot be read, a text that is no UTF-8 or too short, a window that the model cannot take.
pub fn execute(arguments: &EvalArguments) -> anyhow::Result<ExitCode> {
    let name = arguments.text.display();
    let bytes = std::fs::read(&arguments.text).with_context(|| name.to_string())?;
    let text = output::utf8(bytes).with_context(|| name.to_string())?;
    let source = Source::new(arguments.model.as_deref());
    let (tokenizer, model) = source.tokenizer_and_model(arguments.weights, arguments.dtype.weights())?;
    let (tokens, ends) = tokenizer.encode_with_ends(&text)?;
    if tokens.len() < 2 {
        bail!("{name}: wanted a text of at least 2 tokens, found {}", tokens.len());
    }
    model.check_tokens(&tokens)?;

    let available = model.config.max_positions;
    let context = arguments.context.map_or(available.min(LONGEST_DEFAULT_WINDOW), usize::from);
    let stride = arguments.stride.map_or(context.div_ceil(2), usize::from);
    if context > available {
        bail!("--context {context}: the model has {available} positions");
    }
    if stride > context {
        bail!("--stride {stride}: wanted at most the window of {context} tokens, or some would never be scored");
    }
    let windows = windows(tokens.len(), context, stride);
    let started = Instant::now();
    let nats = score(&model, arguments.dtype.into(), &tokens, &windows)?;
    let result = Score {
        nats,
        tokens: tokens.len(),
        bytes: text.len() - ends[0],
        windows: windows.len(),
        context,
        stride,
        seconds: started.elapsed().as_secs_f64(),
    };
    output::print(&if arguments.json { result.json() } else { result.lines() })?;
    Ok(ExitCode::SUCCESS)
}

/// A stretch of the text that the model reads at once.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Window {
    /// The tokens read.
    input: Range<usize>,
    /// The tokens scored: each is predicted from those before it in the window.
    scored: Range<usize>,
}

/// Windows that score every token but the first once.
fn windows(tokens: usize, context: usize, stride: usize) -> Vec<Window> {
    let mut windows = Vec::new();
    let (mut start, mut unscored) = (0, 1);
    while unscored < tokens {
        // The last token of the text is only predicted, so nothing reads it.
        let end = (start + context).min(tokens - 1);
        windows.push(Window { input: start..end, scored: unscored..end + 1 });
        unscored = end + 1;
        start += stride;
    }
    windows
}

/// The sum of the losses of all scored tokens, in nats.
fn score(model: &Model, precision: Precision, tokens: &[u32], windows: &[Window]) -> anyhow::Result<f64> {
    let style =
        ProgressStyle::with_template("{bar:30} {percent:>3} %  {per_sec} windows  {eta} left").expect("a template");
    let progress = ProgressBar::new(windows.len() as u64).with_style(style);
    let mut nats = 0.0;
    let mut rest = windows;
    while !rest.is_empty() {
        let longest = rest[0].input.len();
        let (together, later) = rest.split_at((TOKENS_AT_ONCE / longest).clamp(1, rest.len()));
        nats += score_together(model, precision, tokens, together)?;
        progress.inc(together.len() as u64);
        rest = later;
    }
    progress.finish_and_clear();
    Ok(nats)
}

fn score_together(model: &Model, precision: Precision, tokens: &[u32], windows: &[Window]) -> anyhow::Result<f64> {
    let graph = Graph::inference(precision);
    let sequences: Vec<&[u32]> = windows.iter().map(|window| &tokens[window.input.clone()]).collect();
    let batch = Batch::of_sequences(&sequences);
    let hidden = model.forward(&graph, &batch, None, &mut Silent)?;
    let [_, width] = hidden.dims::<2>()?;
    let mut rows = Vec::new();
    let mut targets = Vec::new();
    for (window, first_row) in windows.iter().zip(&batch.starts) {
        // The row that read token t - 1 predicts token t.
        for target in window.scored.clone() {
            let row = first_row + (target - 1 - window.input.start);
            rows.extend_from_slice(&hidden.data()[row * width..(row + 1) * width]);
            targets.push(tokens[target]);
        }
    }
    let rows_at_once = (LOGITS_AT_ONCE / model.config.vocab_size).max(1);
    let mut nats = 0.0;
    for (rows, targets) in rows.chunks(rows_at_once * width).zip(targets.chunks(rows_at_once)) {
        let rows = Var::constant(Tensor::new(&[targets.len(), width], rows.to_vec()));
        let logits = model.logits(&graph, &rows);
        let mut losses = vec![0.0; targets.len()];
        cross_entropy_rows(logits.data(), targets, &mut losses);
        nats += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
    }
    Ok(nats)
}

/// What the text cost.
struct Score {
    nats: f64,
    tokens: usize,
    bytes: usize,
    windows: usize,
    context: usize,
    stride: usize,
    seconds: f64,
}

impl Score {
    fn loss(&self) -> f64 {
        self.nats / (self.tokens - 1) as f64
    }

    fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes as f64
    }

    fn lines(&self) -> String {
        format!(
            "loss         {:.4} nats a token\n\
             perplexity   {:.3}\n\
             bits a byte  {:.4}\n\
             scored       {} of {} tokens (all but the first), {} bytes\n\
             windows      {} of {} tokens, one every {}\n\
             time         {:.1} s, {:.0} tokens/s\n",
            self.loss(),
            self.loss().exp(),
            self.bits_per_byte(),
            self.tokens - 1,
            self.tokens,
            self.bytes,
            self.windows,
            self.context,
            self.stride,
            self.seconds,
            self.tokens as f64 / self.seconds,
        )
    }

    fn json(&self) -> String {
        let object = json!({
            "loss": self.loss(),
            "perplexity": self.loss().exp(),
            "bits_per_byte": self.bits_per_byte(),
            "tokens": self.tokens,
            "scored_tokens": self.tokens - 1,
            "scored_bytes": self.bytes,
            "windows": self.windows,
            "context": self.context,
            "stride": self.stride,
            "seconds": self.seconds,
        });
        format!("{object}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_is_scored_once_with_context_before_it() {
        for tokens in 2..40 {
            for context in 1..12 {
                for stride in 1..=context {
                    let windows = windows(tokens, context, stride);
                    let scored: Vec<usize> = windows.iter().flat_map(|window| window.scored.clone()).collect();
                    assert_eq!(scored, (1..tokens).collect::<Vec<_>>(), "{tokens} {context} {stride}");
                    for window in &windows {
                        assert!(window.input.len() <= context && !window.scored.is_empty());
                        let before = window.scored.start - window.input.start;
                        let wanted = (context - stride + 1).min(window.scored.start);
                        assert!(before >= wanted, "{tokens} {context} {stride}: {window:?}");
                    }
                }
            }
        }
    }
}
