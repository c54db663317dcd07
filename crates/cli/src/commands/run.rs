//! `moebius run`: text that streams, or the experts token by token.

use std::io::{IsTerminal, Read};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use moebius_engine::{Event, GenerationOptions, Generator, SamplingOptions, Summary, TokenExperts, Tokenizer};
use moebius_model::{EncoderDecoder, Model};
use moebius_tensor::Graph;

use crate::arguments::RunArguments;
use crate::models::Source;
use crate::output;

/// Runs the command.
///
/// # Errors
/// A model that cannot be read, a prompt that is empty, too long or no UTF-8, an output that cannot be written.
pub fn execute(arguments: &RunArguments) -> anyhow::Result<ExitCode> {
    let source = Source::new(arguments.model.as_deref());
    let prompt = prompt(arguments.prompt.as_deref())?;
    let options = GenerationOptions {
        max_tokens: arguments.max_tokens,
        trace_experts: arguments.show_experts,
        ..arguments.sampling.options(&source.generation_defaults()?)
    };
    options.sampling.validate()?;
    if let Some(folder) = arguments.model.as_deref().filter(|folder| EncoderDecoder::is_in(folder)) {
        return write_answer(folder, &source, &prompt, &options, arguments);
    }
    let precision = &arguments.precision;
    let (tokenizer, model) = source.tokenizer_and_model(precision.weights, precision.dtype.weights())?;
    let colours = output::colours();

    let mut printer = if arguments.show_experts {
        Printer::Experts(ExpertTable::new(&tokenizer, colours))
    } else {
        if std::io::stdout().is_terminal() {
            output::print(&if colours { format!("\x1b[2m{prompt}\x1b[0m") } else { prompt.clone() })?;
        }
        Printer::Text
    };
    let mut failure = None;
    let generator = Generator::new(&model, &tokenizer, arguments.precision.numerics());
    let summary = generator.generate(&prompt, &options, &mut |event| match printer.print(&event) {
        Ok(()) => ControlFlow::Continue(()),
        Err(error) => {
            failure = Some(error);
            ControlFlow::Break(())
        }
    })?;
    if let Some(error) = failure {
        return Err(error);
    }
    if !arguments.show_experts {
        output::print("\n")?;
    }
    output::note(&figures(&summary, &model));
    Ok(ExitCode::SUCCESS)
}

/// What an encoder-decoder writes when its encoder reads the prompt: the likeliest token each time.
fn write_answer(
    folder: &Path,
    source: &Source,
    prompt: &str,
    options: &GenerationOptions,
    arguments: &RunArguments,
) -> anyhow::Result<ExitCode> {
    if options.sampling != SamplingOptions::greedy() || arguments.show_experts || arguments.precision.weights.is_some()
    {
        bail!(
            "{}: an encoder-decoder writes the likeliest tokens, from weights as they are stored: run it without sampling \
             options, --show-experts and --weights",
            folder.display()
        );
    }
    let (tokenizer, model) = (source.tokenizer()?, EncoderDecoder::load(folder)?);
    tokenizer.check_fits(model.config.vocab_size)?;
    let graph = Graph::inference(arguments.precision.dtype.into());
    let tokens = model.generate(&graph, &tokenizer.encode(prompt)?, options.max_tokens)?;
    let text: Vec<u32> = tokens.into_iter().filter(|token| !model.config.eos_tokens.contains(token)).collect();
    output::print(&format!("{}\n", tokenizer.decode(&text)?))?;
    Ok(ExitCode::SUCCESS)
}

/// The prompt from the command line or from standard input.
fn prompt(argument: Option<&str>) -> anyhow::Result<String> {
    let prompt = match argument {
        Some(text) if text != "-" => text.to_string(),
        _ => read_standard_input()?,
    };
    if prompt.is_empty() {
        bail!("the prompt is empty: give at least one character");
    }
    Ok(prompt)
}

fn read_standard_input() -> anyhow::Result<String> {
    let mut input = std::io::stdin().lock();
    if input.is_terminal() {
        output::note("Type the beginning of the text, then ctrl-D on a line of its own.");
    }
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes).context("standard input")?;
    let mut text = output::utf8(bytes).context("standard input")?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// The last line: speeds and sizes.
fn figures(summary: &Summary, model: &Model) -> String {
    let generated = match summary.generation_rate() {
        Some(rate) => format!("{} generated, {rate:.1} tokens/s", summary.tokens.len()),
        None => format!("{} generated", summary.tokens.len()),
    };
    let parameters = model.count_params();
    format!(
        "prompt: {} tokens, {:.1} tokens/s; text: {generated}; parameters: {} in all, {} active a token",
        summary.prompt_tokens,
        summary.prompt_rate(),
        output::count(parameters.total),
        output::count(parameters.active),
    )
}

/// What the events look like.
enum Printer<'t> {
    Text,
    Experts(ExpertTable<'t>),
}

impl Printer<'_> {
    fn print(&mut self, event: &Event) -> anyhow::Result<()> {
        match (self, event) {
            (Self::Text, Event::Text(text)) => output::print(text),
            (Self::Experts(table), Event::Experts(experts)) => table.print(experts),
            _ => Ok(()),
        }
    }
}

/// Columns taken by a token's text.
const TOKEN_WIDTH: usize = 16;

/// A line for each token, a column for each layer.
struct ExpertTable<'t> {
    tokenizer: &'t Tokenizer,
    colours: bool,
    headed: bool,
}

impl<'t> ExpertTable<'t> {
    fn new(tokenizer: &'t Tokenizer, colours: bool) -> Self {
        Self { tokenizer, colours, headed: false }
    }

    fn print(&mut self, token: &TokenExperts) -> anyhow::Result<()> {
        let mut lines = String::new();
        if !self.headed {
            self.headed = true;
            lines.push_str(&self.heading(token));
        }
        let mark = if token.in_prompt { "> " } else { "  " };
        let text = format!("{:?}", self.tokenizer.show(token.token));
        let padding = " ".repeat(TOKEN_WIDTH.saturating_sub(text.chars().count()));
        // The prompt is dim, so that the eye finds where the model begins to write.
        lines.push_str(&match self.colours {
            true => format!("{mark}\x1b[{}m{text}\x1b[0m{padding}", if token.in_prompt { 2 } else { 1 }),
            false => format!("{mark}{text}{padding}"),
        });
        for layer in &token.layers {
            lines.push_str("  ");
            lines.push_str(&self.cell(&layer.experts));
        }
        lines.push('\n');
        output::print(&lines)
    }

    /// `token`, then the layers' numbers over their columns.
    fn heading(&self, token: &TokenExperts) -> String {
        let mut line = format!("  {:<TOKEN_WIDTH$}", "token");
        for layer in &token.layers {
            let width = Self::cell_width(layer.experts.len());
            line.push_str(&format!("  {:>width$}", format!("L{}", layer.layer)));
        }
        format!("{}\n", line.trim_end())
    }

    /// Three columns an expert, so that ids to 999 stand in line.
    fn cell_width(experts: usize) -> usize {
        4 * experts - 1
    }

    fn cell(&self, experts: &[u32]) -> String {
        let paint = |expert: &u32| match self.colours {
            true => format!("\x1b[38;5;{}m{expert:>3}\x1b[0m", colour(*expert)),
            false => format!("{expert:>3}"),
        };
        experts.iter().map(paint).collect::<Vec<_>>().join(" ")
    }
}

/// A colour of the 256-colour palette for an expert: neighbours differ in hue, dark ones are left out.
fn colour(expert: u32) -> u32 {
    const HUES: [u32; 16] = [203, 39, 118, 214, 141, 51, 226, 205, 35, 209, 75, 190, 177, 44, 220, 211];
    HUES[expert as usize % HUES.len()]
}
