//! A model as a Hugging Face folder: configuration, weights, tokenizer.

use std::path::Path;

use moebius_model::checkpoint::StoredAs;
use moebius_model::{Checkpoint, Model, ModelConfig, families, save_model_as};

use crate::data::tokenizer::TextTokenizer;
use crate::recipe::ExportDtype;
use crate::{Result, files};

/// Writes the folder whole or not at all; an older one is replaced.
///
/// # Errors
/// The system's.
pub fn save(path: &Path, model: &Model, tokenizer: &TextTokenizer, dtype: ExportDtype) -> Result<()> {
    files::write_folder_whole(path, |folder| fill(folder, model, tokenizer, dtype))
}

/// As [`save`], in a published family's layout if one can express the model; if none can, in its own, and the answer says
/// why.
///
/// # Errors
/// The system's.
pub fn publish(path: &Path, model: &Model, tokenizer: &TextTokenizer, dtype: ExportDtype) -> Result<Option<String>> {
    let (config, reason) = match families::published(&model.config) {
        Ok(config) => (config, None),
        Err(reason) => (model.config.clone(), Some(reason)),
    };
    files::write_folder_whole(path, |folder| fill_as(folder, model, &config, tokenizer, dtype))?;
    Ok(reason)
}

/// Writes the files into a folder that is there.
///
/// # Errors
/// The system's.
pub fn fill(folder: &Path, model: &Model, tokenizer: &TextTokenizer, dtype: ExportDtype) -> Result<()> {
    fill_as(folder, model, &model.config, tokenizer, dtype)
}

fn fill_as(
    folder: &Path,
    model: &Model,
    config: &ModelConfig,
    tokenizer: &TextTokenizer,
    dtype: ExportDtype,
) -> Result<()> {
    let stored_as = match dtype {
        ExportDtype::F32 => StoredAs::F32,
        ExportDtype::Bf16 => StoredAs::Bf16,
    };
    save_model_as(folder, model, config, stored_as)?;
    files::write_whole(&folder.join("tokenizer.json"), tokenizer.json().as_bytes())?;
    let config = tokenizer.config_json(model.config.max_positions);
    files::write_whole(&folder.join("tokenizer_config.json"), config.as_bytes())
}

/// Reads the weights back.
///
/// # Errors
/// What is missing, foreign or broken, by file.
pub fn load(folder: &Path) -> Result<Model> {
    Ok(Model::load(&Checkpoint::open(folder)?)?)
}
