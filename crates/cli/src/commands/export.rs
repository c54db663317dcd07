//! `moebius export`: a model as one file that llama.cpp runs.

use std::process::ExitCode;

use anyhow::Context;
use moebius_kernels::formats::Format;
use moebius_model::gguf::{ExportSettings, write_model};

use crate::arguments::ExportArguments;
use crate::models::Source;

/// Runs the command.
///
/// # Errors
/// A model that cannot be read or that GGUF has no words for, an output that cannot be written; it is whole or not
/// there.
pub fn execute(arguments: &ExportArguments) -> anyhow::Result<ExitCode> {
    let source = Source::new(arguments.model.as_deref());
    let model = source.model()?;
    let (tokenizer, template) = (source.tokenizer()?.to_json()?, source.chat_template()?);
    let name = arguments.model.as_deref().and_then(|folder| Some(folder.file_name()?.to_string_lossy().into_owned()));
    let settings = ExportSettings {
        format: arguments.format,
        name: name.as_deref(),
        tokenizer: Some(tokenizer.as_bytes()),
        chat_template: template.as_ref().map(|template| template.source()),
    };
    write_model(&arguments.gguf, &model, &settings)?;
    let bytes = std::fs::metadata(&arguments.gguf).with_context(|| arguments.gguf.display().to_string())?.len();
    let weights = model.count_params().total;
    let bits = 8.0 * bytes as f64 / weights as f64;
    println!("{}: {weights} weights, {bytes} bytes, {bits:.2} bits a weight", arguments.gguf.display());
    Ok(ExitCode::SUCCESS)
}

/// A format by its name, for the command line.
///
/// # Errors
/// The names that there are.
pub fn parse_format(name: &str) -> Result<Format, String> {
    Format::from_name(name).ok_or_else(|| {
        let known: Vec<&str> = Format::all().iter().map(|format| format.name()).collect();
        format!("known are {}", known.join(", "))
    })
}
