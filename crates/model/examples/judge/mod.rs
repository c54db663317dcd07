//! What may come of a damaged file, for the fuzzers: an answer that is consistent, or an error of one line that says where.

use moebius_model::ModelError;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Why a reader's answer is none that it may give, or the error that it may.
pub enum Refusal {
    Error(ModelError),
    Inconsistent(String),
}

impl From<ModelError> for Refusal {
    fn from(error: ModelError) -> Self {
        Self::Error(error)
    }
}

/// Whether `read` accepted its input (or refused it in one line that is `fit`).
///
/// # Errors
/// What it did instead.
pub fn accepts(read: impl FnOnce() -> Result<(), Refusal>, fit: impl FnOnce(&str) -> bool) -> Result<bool, String> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(())) => Ok(true),
        Ok(Err(Refusal::Error(error))) => {
            let message = error.to_string();
            if fit(&message) && !message.contains(['\n', '\r']) {
                Ok(false)
            } else {
                Err(format!("an unfit message: {message}"))
            }
        }
        Ok(Err(Refusal::Inconsistent(what))) => Err(format!("accepted although {what}")),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            Err(format!("panic: {}", text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("?")))
        }
    }
}
