//! The model that a command works on: a folder, or the one that ships inside this binary.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use moebius_engine::{GenerationDefaults, Tokenizer};
use moebius_model::{Checkpoint, Model, RunFormat, packed};

use crate::output::LoadBar;

/// The files of the shipped model, in Hugging Face's layout.
mod shipped {
    macro_rules! file {
        ($name:literal) => {
            include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/shipped/", $name))
        };
    }
    pub const CONFIG: &[u8] = file!("config.json");
    pub const WEIGHTS: &[u8] = file!("model.safetensors");
    pub const TOKENIZER: &[u8] = file!("tokenizer.json");
    pub const GENERATION: &[u8] = file!("generation_config.json");
}

/// Where a model comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Inside the binary.
    Shipped,
    /// A folder in Hugging Face's layout.
    Folder(PathBuf),
}

impl Source {
    /// The folder if one is given, else the shipped model.
    pub fn new(folder: Option<&Path>) -> Self {
        folder.map_or(Self::Shipped, |folder| Self::Folder(folder.to_path_buf()))
    }

    /// Reads configuration and weights, for everything that can be done with a model.
    ///
    /// # Errors
    /// What is wrong with the folder, by file and tensor.
    pub fn model(&self) -> anyhow::Result<Model> {
        Ok(Model::load(&self.checkpoint()?)?)
    }

    /// Reads configuration and weights to be run; where it takes longer than a moment, tells how far it is.
    ///
    /// # Errors
    /// As [`Source::model`].
    pub fn model_to_run(&self, format: RunFormat) -> anyhow::Result<Model> {
        if let Self::Folder(folder) = self
            && packed::is_packed(folder)
        {
            if format != RunFormat::AsStored {
                bail!("{}: a packed model runs as it was packed; leave out --weights and --dtype", folder.display());
            }
            return Ok(Model::open_packed(folder)?);
        }
        let checkpoint = self.checkpoint()?;
        let mut bar = LoadBar::new();
        Ok(Model::load_to_run(&checkpoint, format, &mut |progress| bar.show(progress))?)
    }

    fn checkpoint(&self) -> anyhow::Result<Checkpoint<'static>> {
        Ok(match self {
            Self::Shipped => Checkpoint::from_bytes(shipped::CONFIG, shipped::WEIGHTS)?,
            Self::Folder(folder) => Checkpoint::open(folder)?,
        })
    }

    /// Reads `tokenizer.json`.
    ///
    /// # Errors
    /// The file and what is wrong with it.
    pub fn tokenizer(&self) -> anyhow::Result<Tokenizer> {
        match self {
            Self::Shipped => Ok(Tokenizer::from_bytes(shipped::TOKENIZER, "the shipped tokenizer.json")?),
            Self::Folder(folder) => Ok(Tokenizer::from_file(&folder.join("tokenizer.json"))?),
        }
    }

    /// What `generation_config.json` says, or where there is none the end token of `config.json`.
    ///
    /// # Errors
    /// The file and what is wrong with it.
    pub fn generation_defaults(&self) -> anyhow::Result<GenerationDefaults> {
        let Self::Folder(folder) = self else {
            return Ok(GenerationDefaults::from_json(shipped::GENERATION, "the shipped generation_config.json")?);
        };
        let generation = folder.join("generation_config.json");
        let path = if generation.exists() { generation } else { folder.join("config.json") };
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        Ok(GenerationDefaults::from_json(&bytes, &path.display().to_string())?)
    }
}
