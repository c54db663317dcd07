//! `moebius pack`: a model as it runs.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use moebius_model::atomic_write;
use moebius_model::packed::save_packed;

use crate::arguments::PackArguments;
use crate::models::Source;
use crate::output;

/// Files beside the weights that running asks for.
const COMPANIONS: [&str; 5] =
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "tokenizer.model"];

/// Runs the command.
///
/// # Errors
/// A model that cannot be read or is packed already, a folder that is in use or cannot be written.
pub fn execute(arguments: &PackArguments) -> anyhow::Result<ExitCode> {
    let (folder, source) = (&arguments.out, Source::new(Some(&arguments.model)));
    if !arguments.force && folder.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("{}: holds something already; --force writes over it", folder.display());
    }
    let model = source.model_to_run(arguments.format)?;
    save_packed(folder, &model)?;
    if arguments.model.is_dir() {
        copy_companions(&arguments.model, folder)?;
    }
    let bytes: usize = model.params().iter().map(|param| param.bytes()).sum();
    let bits = 8.0 * bytes as f64 / model.count_params().total as f64;
    output::note(&format!("{}: {:.2} GB, {bits:.2} bits a weight", folder.display(), bytes as f64 / 1e9));
    Ok(ExitCode::SUCCESS)
}

fn copy_companions(from: &Path, to: &Path) -> anyhow::Result<()> {
    for name in COMPANIONS {
        let source = from.join(name);
        if source.is_file() {
            let bytes = std::fs::read(&source).with_context(|| source.display().to_string())?;
            atomic_write(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}
