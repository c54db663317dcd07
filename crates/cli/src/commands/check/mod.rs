//! `moebius check`: a model against what it must give.
//!
//! A golden folder holds a model, `expected.safetensors` and, where they exist, `grads.safetensors` and `aux.json`. Each
//! case of `expected.safetensors` (`a`, `b`) has `X.input_ids [batch, sequence]` and what a reference computed from them.
//! Everything is computed in f32; the order of experts inside a row means nothing.

mod backward;
mod encoder_decoder;
mod forward;
mod golden;
mod report;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use moebius_model::families::read_config;
use moebius_model::{EncoderDecoder, Model};

use crate::arguments::CheckArguments;
use crate::models::Source;
use crate::output;
use golden::Golden;
use report::{Report, Worst};

/// Runs the command: every folder is looked at, whatever the others gave.
///
/// # Errors
/// Only an output that cannot be written; a folder that cannot be checked is reported and makes the status 1.
pub fn execute(arguments: &CheckArguments) -> anyhow::Result<ExitCode> {
    let mut within = true;
    for folder in &arguments.folders {
        match check(folder, arguments.tolerance) {
            Ok(report) => {
                within &= report.within();
                let verdict = if report.within() { "within" } else { "OUTSIDE" };
                output::print(&format!(
                    "{}: {verdict} {:e}\n{}",
                    folder.display(),
                    arguments.tolerance,
                    report.text()
                ))?;
            }
            Err(error) => {
                within = false;
                output::complain(&error);
            }
        }
    }
    Ok(if within { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn check(folder: &Path, tolerance: f64) -> anyhow::Result<Report> {
    if EncoderDecoder::is_in(folder) {
        return encoder_decoder::check(folder, tolerance);
    }
    let model = Source::new(Some(folder)).model()?;
    let golden = Golden::open(folder)?;
    let mut report = Report::new(tolerance);
    older_spelling(&model, folder, &mut report)?;
    for case in golden.cases(model.config.vocab_size)? {
        forward::check(&model, &golden, &case, &mut report)?;
        if case.name == "a" {
            backward::check(&model, &golden, &case, &mut report)?;
        }
    }
    Ok(report)
}

/// `config.v4.json`, the spelling of most published models, must mean the same model.
fn older_spelling(model: &Model, folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let path = folder.join("config.v4.json");
    if path.exists() {
        let name = path.display().to_string();
        let config = read_config(&std::fs::read(&path).with_context(|| name.clone())?, &name)?;
        let mut worst = Worst::default();
        worst.compare_equal(config == model.config, || format!("wanted {:?}, found {config:?}", model.config));
        report.exact("config.v4", &worst);
    }
    Ok(())
}
