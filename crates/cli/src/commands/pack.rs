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
const COMPANIONS: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
];

/// Runs the command.
///
/// # Errors
/// A model that cannot be read or is packed already, a folder that is in use or cannot be written.
pub fn execute(arguments: &PackArguments) -> anyhow::Result<ExitCode> {
    let (folder, source) = (&arguments.out, Source::new(Some(&arguments.model)));
    if !arguments.force && folder.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("{}: holds something already; --force writes over it", folder.display());
    }
    let model = source.model_to_run(Some(arguments.format), arguments.format)?;
    save_packed(folder, &model)?;
    match &source {
        Source::Gguf(_) => write_companions(&source, folder)?,
        _ => copy_companions(&arguments.model, folder)?,
    }
    let bytes: usize = model.params().iter().map(|param| param.bytes()).sum();
    let bits = 8.0 * bytes as f64 / model.count_params().total as f64;
    output::note(&format!("{}: {:.2} GB, {bits:.2} bits a weight", folder.display(), bytes as f64 / 1e9));
    Ok(ExitCode::SUCCESS)
}

/// What a GGUF file says beside its weights, as the files that a folder has.
fn write_companions(source: &Source, to: &Path) -> anyhow::Result<()> {
    let write = |name: &str, text: &str| atomic_write(&to.join(name), text.as_bytes());
    write("tokenizer.json", &source.tokenizer()?.to_json()?)?;
    let ends = source.generation_defaults()?.end_tokens;
    write("generation_config.json", &format!("{}\n", serde_json::json!({ "eos_token_id": ends })))?;
    if let Some(template) = source.chat_template()? {
        write("chat_template.jinja", template.source())?;
        write("special_tokens_map.json", &format!("{}\n", serde_json::json!(template.specials())))?;
    }
    Ok(())
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
