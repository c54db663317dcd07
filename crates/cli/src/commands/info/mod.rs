//! `moebius info`: what a model is made of and what it costs, from its configuration and the headers of its files.

mod encoder_decoder;
mod layers;
mod report;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use moebius_model::Survey;
use serde_json::Value;

use crate::models::Source;
use crate::output;
use encoder_decoder::{EncoderDecoderReport, TRAINED_ON};
use report::Report;

const EXAMPLES: &str = "\
Examples:
  moebius info DIR
  moebius info model.gguf --context 32768
  moebius info config.json --json

Of the weights only headers are read, so that the largest checkpoint takes a moment. A configuration alone says \
neither what the weights are stored in nor how many bytes they take.

Active parameters take part in one token. FLOPs are multiplications and additions of one token's forward pass; norms, \
softmax and activations, which are few, are left out. Of an encoder-decoder a token that is read passes the encoder, one \
that is written the decoder; active are both's.";

/// `moebius info`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InfoArguments {
    /// A folder in Hugging Face's layout, a GGUF file, a packed model or a config.json [default: the model inside this binary]
    #[arg(value_name = "MODEL")]
    pub model: Option<PathBuf>,

    /// Count the FLOPs of a token with so many before it, itself among them [default: the model's context; 512 of an encoder-decoder, of input and answer each]
    #[arg(long, value_name = "N")]
    pub context: Option<NonZeroUsize>,

    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// A model whose configuration or headers cannot be read.
pub fn execute(arguments: &InfoArguments) -> anyhow::Result<ExitCode> {
    let encoder_decoder = arguments.model.as_deref().map(Survey::open_encoder_decoder).transpose()?.flatten();
    if let Some(survey) = encoder_decoder {
        let report = EncoderDecoderReport::new(&survey, arguments.context.map_or(TRAINED_ON, usize::from))?;
        return print(arguments, || report.json(), || report.text());
    }
    let survey = Source::new(arguments.model.as_deref()).survey()?;
    let context = arguments.context.map_or(survey.config.max_positions, usize::from);
    let report = Report::new(&survey, context)?;
    print(arguments, || report.json(), || report.text())
}

fn print(
    arguments: &InfoArguments,
    json: impl FnOnce() -> Value,
    text: impl FnOnce() -> String,
) -> anyhow::Result<ExitCode> {
    output::print(&if arguments.json { format!("{}\n", json()) } else { text() })?;
    Ok(ExitCode::SUCCESS)
}
