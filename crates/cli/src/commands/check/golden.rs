//! Reading a golden folder.

use std::path::{Path, PathBuf};

use anyhow::Context;
use moebius_kernels::memory::Buffer;
use moebius_model::safetensors::SafetensorsFile;

use crate::token_file::read_tokens;

/// What a model must give.
pub struct Golden {
    folder: PathBuf,
    expected: SafetensorsFile<'static>,
}

/// One batch of token ids with what must come of it.
pub struct Case {
    /// `a` or `b`.
    pub name: String,
    /// The rows of `X.input_ids`.
    pub sequences: Vec<Vec<u32>>,
}

impl Case {
    /// The token that follows each token of all sequences; `u32::MAX` after the last of each.
    pub fn next_tokens(&self) -> Vec<u32> {
        let of = |sequence: &Vec<u32>| [&sequence[1..], &[u32::MAX]].concat();
        self.sequences.iter().flat_map(of).collect()
    }
}

/// `aux.json`: the load-balancing loss over case `a`.
#[derive(serde::Deserialize)]
pub struct BalanceLoss {
    /// The loss before its coefficient; nothing where the reference has none.
    pub aux_loss: Option<f32>,
}

impl Golden {
    /// Opens `expected.safetensors`.
    ///
    /// # Errors
    /// That it is missing or damaged.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let expected = SafetensorsFile::open(&folder.join("expected.safetensors"))?;
        Ok(Self { folder: folder.to_path_buf(), expected })
    }

    /// Every `X.input_ids`, in the order of their names.
    ///
    /// # Errors
    /// Ids that are none of the model's; no case at all.
    pub fn cases(&self, vocabulary: usize) -> anyhow::Result<Vec<Case>> {
        let names = self.expected.tensors().filter_map(|tensor| tensor.name.strip_suffix(".input_ids"));
        let mut names: Vec<String> = names.map(ToString::to_string).collect();
        names.sort_unstable();
        if names.is_empty() {
            anyhow::bail!("{}: wanted at least one tensor X.input_ids, found none", self.expected.name());
        }
        let case = |name: String| {
            let sequences = read_tokens(&self.expected, &format!("{name}.input_ids"), vocabulary)?;
            Ok(Case { name, sequences })
        };
        names.into_iter().map(case).collect()
    }

    /// Rows of tokens.
    ///
    /// # Errors
    /// That they are missing, or none of the model's.
    pub fn token_rows(&self, name: &str, vocabulary: usize) -> anyhow::Result<Vec<Vec<u32>>> {
        read_tokens(&self.expected, name, vocabulary)
    }

    /// An expected quantity, if the folder has it.
    ///
    /// # Errors
    /// Another type.
    pub fn floats(&self, name: &str) -> anyhow::Result<Option<Buffer<f32>>> {
        Ok(self.expected.get(name).map(|tensor| tensor.to_f32()).transpose()?)
    }

    /// Expected whole numbers, if the folder has them.
    ///
    /// # Errors
    /// Another type.
    pub fn integers(&self, name: &str) -> anyhow::Result<Option<Vec<i64>>> {
        Ok(self.expected.get(name).map(|tensor| tensor.to_i64()).transpose()?)
    }

    /// The gradients of case `a`'s loss, if the folder has them.
    ///
    /// # Errors
    /// A damaged file.
    pub fn gradients(&self) -> anyhow::Result<Option<SafetensorsFile<'static>>> {
        let path = self.folder.join("grads.safetensors");
        Ok(if path.exists() { Some(SafetensorsFile::open(&path)?) } else { None })
    }

    /// The load-balancing loss of case `a`, if the folder has it.
    ///
    /// # Errors
    /// A file that cannot be read or is something else.
    pub fn balance_loss(&self) -> anyhow::Result<Option<BalanceLoss>> {
        let path = self.folder.join("aux.json");
        if !path.exists() {
            return Ok(None);
        }
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        Ok(Some(serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?))
    }
}
