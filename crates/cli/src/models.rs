//! The model that a command works on: a folder, or the one that ships inside this binary.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use moebius_engine::{ChatTemplate, GenerationDefaults, Tokenizer, gguf};
use moebius_model::gguf::GgufFile;
use moebius_model::{Checkpoint, Model, RunFormat, Survey, packed};

use crate::output::{self, WeightsBar};

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
    /// A folder in Hugging Face's layout, or a packed one.
    Folder(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
}

impl Source {
    /// The folder or file if one is given, else the shipped model.
    pub fn new(path: Option<&Path>) -> Self {
        match path {
            None => Self::Shipped,
            Some(file) if file.is_file() => Self::Gguf(file.to_path_buf()),
            Some(folder) => Self::Folder(folder.to_path_buf()),
        }
    }

    /// Reads configuration and weights, for everything that can be done with a model.
    ///
    /// # Errors
    /// What is wrong with the folder, by file and tensor.
    pub fn model(&self) -> anyhow::Result<Model> {
        Ok(Model::load(&self.checkpoint()?)?)
    }

    /// Reads configuration and weights to be run, in the format asked for `or` else; where it takes longer than a moment,
    /// tells how far it is. A packed model is what it is, and no format may be asked of it.
    ///
    /// # Errors
    /// As [`Source::model`].
    pub fn model_to_run(&self, asked: Option<RunFormat>, or: RunFormat) -> anyhow::Result<Model> {
        if let Self::Folder(folder) = self
            && packed::is_packed(folder)
        {
            if let Some(format) = asked {
                bail!("{}: a packed model runs as it was packed, not in {format}", folder.display());
            }
            return Ok(Model::open_packed(folder)?);
        }
        let checkpoint = self.checkpoint()?;
        let (mut bar, format) = (WeightsBar::new("packing weights"), asked.unwrap_or(or));
        Ok(Model::load_to_run(&checkpoint, format, &mut |progress| bar.show(progress))?)
    }

    /// Reads the tokenizer and, as [`Source::model_to_run`], the model, which must have the tokenizer's tokens.
    ///
    /// # Errors
    /// As [`Source::tokenizer`] and [`Source::model_to_run`]; a token that the model lacks.
    pub fn tokenizer_and_model(&self, asked: Option<RunFormat>, or: RunFormat) -> anyhow::Result<(Tokenizer, Model)> {
        let (tokenizer, model) = (self.tokenizer()?, self.model_to_run(asked, or)?);
        tokenizer.check_fits(model.config.vocab_size)?;
        Ok((tokenizer, model))
    }

    /// What it is, from its configuration and headers alone.
    ///
    /// # Errors
    /// As [`Source::model`].
    pub fn survey(&self) -> anyhow::Result<Survey> {
        Ok(match self {
            Self::Shipped => Survey::from_bytes(shipped::CONFIG, shipped::WEIGHTS)?,
            Self::Folder(path) | Self::Gguf(path) => Survey::open(path)?,
        })
    }

    /// Opens it, and tells which parts of a published model are left out.
    fn checkpoint(&self) -> anyhow::Result<Checkpoint<'static>> {
        let checkpoint = match self {
            Self::Shipped => Checkpoint::from_bytes(shipped::CONFIG, shipped::WEIGHTS)?,
            Self::Folder(path) | Self::Gguf(path) => Checkpoint::open(path)?,
        };
        for (what, tensors) in checkpoint.left_out() {
            output::note(&format!("left out: {what}, {tensors} tensors"));
        }
        Ok(checkpoint)
    }

    /// Reads the tokenizer, in whatever form the model has it.
    ///
    /// # Errors
    /// The file and what is wrong with it.
    pub fn tokenizer(&self) -> anyhow::Result<Tokenizer> {
        Ok(match self {
            Self::Shipped => Tokenizer::from_bytes(shipped::TOKENIZER, "the shipped tokenizer.json")?,
            Self::Folder(folder) => Tokenizer::from_folder(folder)?,
            Self::Gguf(file) => gguf::tokenizer(&GgufFile::open(file)?)?,
        })
    }

    /// The chat template, `None` if the model has none.
    ///
    /// # Errors
    /// The file and what is wrong with it.
    pub fn chat_template(&self) -> anyhow::Result<Option<ChatTemplate>> {
        Ok(match self {
            Self::Shipped => None,
            Self::Folder(folder) => ChatTemplate::from_folder(folder)?,
            Self::Gguf(file) => gguf::chat_template(&GgufFile::open(file)?)?,
        })
    }

    /// What `generation_config.json` says, or where there is none the end token of `config.json`.
    ///
    /// # Errors
    /// The file and what is wrong with it.
    pub fn generation_defaults(&self) -> anyhow::Result<GenerationDefaults> {
        let folder = match self {
            Self::Shipped => {
                return Ok(GenerationDefaults::from_json(shipped::GENERATION, "the shipped generation_config.json")?);
            }
            Self::Gguf(file) => return Ok(gguf::generation_defaults(&GgufFile::open(file)?)?),
            Self::Folder(folder) => folder,
        };
        let generation = folder.join("generation_config.json");
        let path = if generation.exists() { generation } else { folder.join("config.json") };
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        Ok(GenerationDefaults::from_json(&bytes, &path.display().to_string())?)
    }
}
