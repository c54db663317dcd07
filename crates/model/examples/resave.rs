//! Loads a model folder and saves it again, as we write it:
//!
//!     cargo run --release -p moebius-model --example resave -- FROM TO [f32|bf16]
//!
//! `bench/transformers_interop.py` checks with it that transformers reads what we write.

use moebius_model::checkpoint::StoredAs;
use moebius_model::{Checkpoint, Model, ModelError, save_model};
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (from, to, stored_as) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [from, to] | [from, to, "f32"] => (from, to, StoredAs::F32),
        [from, to, "bf16"] => (from, to, StoredAs::Bf16),
        _ => {
            eprintln!("usage: resave FROM TO [f32|bf16]");
            return ExitCode::from(2);
        }
    };
    match resave(Path::new(from), Path::new(to), stored_as) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn resave(from: &Path, to: &Path, stored_as: StoredAs) -> Result<(), ModelError> {
    save_model(to, &Model::load(&Checkpoint::open(from)?)?, stored_as)
}
