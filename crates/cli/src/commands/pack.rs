//! `moebius pack`: a model as it runs.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use moebius_model::atomic_write;
use moebius_model::packed::save_packed;

use crate::arguments::PackArguments;
use crate::models::Source;
use crate::output::{self, WeightsBar};

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
    let companions = companions(&source, &arguments.model)?;
    let model = source.model_to_run(Some(arguments.format), arguments.format)?;
    let mut bar = WeightsBar::new("writing weights");
    save_packed(folder, &model, &mut |progress| bar.show(progress))?;
    drop(bar);
    for (name, bytes) in &companions {
        atomic_write(&folder.join(name), bytes)?;
    }
    let bytes: usize = model.params().iter().map(|param| param.bytes()).sum();
    let bits = 8.0 * bytes as f64 / model.count_params().total as f64;
    output::note(&format!("{}: {:.2} GB, {bits:.2} bits a weight", folder.display(), bytes as f64 / 1e9));
    Ok(ExitCode::SUCCESS)
}

/// The files that stand beside the weights: those of the folder, or what a GGUF file says besides, in such files.
fn companions(source: &Source, path: &Path) -> anyhow::Result<Vec<(&'static str, Vec<u8>)>> {
    let Source::Gguf(_) = source else {
        let there = COMPANIONS.into_iter().filter(|name| path.join(name).is_file());
        let read = |name| {
            let file = path.join(name);
            Ok((name, std::fs::read(&file).with_context(|| file.display().to_string())?))
        };
        return there.map(read).collect();
    };
    // First what a broken file refuses: a tokenizer that cannot be read is but a note.
    let ends = serde_json::json!({ "eos_token_id": source.generation_defaults()?.end_tokens });
    let mut files = vec![("generation_config.json", format!("{ends}\n").into_bytes())];
    match source.tokenizer().and_then(|tokenizer| Ok(tokenizer.to_json()?)) {
        Ok(json) => files.push(("tokenizer.json", json.into_bytes())),
        Err(error) => output::note(&format!("no tokenizer is written: {error}")),
    }
    if let Some(template) = source.chat_template().ok().flatten() {
        files.push(("chat_template.jinja", template.source().as_bytes().to_vec()));
        let specials = serde_json::json!(template.specials());
        files.push(("special_tokens_map.json", format!("{specials}\n").into_bytes()));
    }
    Ok(files)
}
