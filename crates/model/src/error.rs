//! What can be wrong with a checkpoint, a configuration or an input: each says where, what was wanted, what was found.

use moebius_moe::MoeError;
use moebius_tensor::TensorError;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// An error of this crate.
#[derive(Debug, Error)]
pub enum ModelError {
    /// The system refused a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file whose content cannot be what it claims to be.
    #[error("{file}: {message}")]
    File {
        /// The file.
        file: String,
        /// What was wanted and found.
        message: String,
    },
    /// One tensor of a file does not fit.
    #[error("{file}: tensor `{tensor}`: {message}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor's name in it.
        tensor: String,
        /// What was wanted and found.
        message: String,
    },
    /// A configuration that cannot be followed.
    #[error("{file}: `{key}`: {message}")]
    Config {
        /// The file.
        file: String,
        /// The key in it.
        key: String,
        /// What was wanted and found.
        message: String,
    },
    /// A token that the model lacks.
    #[error("token {token} at position {position}: the vocabulary has {vocabulary} tokens")]
    Token {
        /// The token.
        token: u32,
        /// Where it stands.
        position: usize,
        /// Tokens there are.
        vocabulary: usize,
    },
    /// A sequence longer than the model's context.
    #[error("a sequence of {found} tokens: the model's context has {context}")]
    Context {
        /// Tokens of the sequence.
        found: usize,
        /// Tokens of the context.
        context: usize,
    },
    /// A router or plan that does not fit.
    #[error(transparent)]
    Moe(#[from] MoeError),
    /// A shape that does not fit.
    #[error(transparent)]
    Shape(#[from] TensorError),
}

impl ModelError {
    /// An error of the system about `path`.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn file(file: impl Into<String>, message: impl Into<String>) -> Self {
        Self::File { file: file.into(), message: one_line(message.into()) }
    }

    pub(crate) fn tensor(file: &str, tensor: &str, message: impl Into<String>) -> Self {
        Self::Tensor { file: file.into(), tensor: one_line(tensor.into()), message: one_line(message.into()) }
    }

    pub(crate) fn config(file: &str, key: &str, message: impl Into<String>) -> Self {
        Self::Config { file: file.into(), key: one_line(key.into()), message: one_line(message.into()) }
    }
}

/// Names and values in files may hold anything; what we say about them stays on its line and leaves terminals alone.
fn one_line(text: String) -> String {
    if text.contains(char::is_control) {
        text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
    } else {
        text
    }
}
