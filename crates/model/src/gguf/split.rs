//! Models in several files, as llama.cpp's `gguf-split` makes them: `NAME-00001-of-00003.gguf` and its siblings.
//!
//! Each part has tables of its own and says which one it is (`split.no`, from zero), of how many (`split.count`), and how
//! many tensors all have together (`split.tensors.count`). The model's metadata stand in the first.

use super::{Bytes, Part};
use crate::ModelError;
use moebius_kernels::memory::MappedFile;
use std::path::Path;

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";

/// Maps a file and, if it is a part of a model, the others in their order.
pub(super) fn open_all(path: &Path) -> Result<Vec<Part<'static>>, ModelError> {
    let given = map(path)?;
    let Some(count) = parts(&given)? else { return Ok(vec![given]) };
    let number = given.metadata().u32(NUMBER)?;
    let prefix = prefix(&given, path, number, count)?.to_string();
    let mut all = Vec::new();
    let mut given = Some(given);
    for at in 0..count {
        let part = match given.take_if(|_| at == number) {
            Some(part) => part,
            None => sibling(&path.with_file_name(file_name(&prefix, at, count)), path)?,
        };
        check(&part, COUNT, count, path)?;
        check(&part, NUMBER, at, path)?;
        all.push(part);
    }
    check_tensors(&all)?;
    Ok(all)
}

/// Refuses bytes in memory that are a part of a model: the others cannot be found.
pub(super) fn refuse(part: &Part) -> Result<(), ModelError> {
    match parts(part)? {
        None => Ok(()),
        Some(count) => {
            Err(part.metadata().error(COUNT, format!("wanted a whole model, found one of {count} parts in memory")))
        }
    }
}

/// How many parts a file says there are, if it is not the only one.
fn parts(part: &Part) -> Result<Option<u32>, ModelError> {
    Ok(part.metadata().optional_u32(COUNT)?.filter(|&count| count > 1))
}

/// llama.cpp's rule, `%s-%05d-of-%05d.gguf`; names count from one.
fn file_name(prefix: &str, number: u32, count: u32) -> String {
    format!("{prefix}-{:05}-of-{count:05}.gguf", u64::from(number) + 1)
}

/// What the names of all parts begin with.
fn prefix<'p>(part: &Part, path: &'p Path, number: u32, count: u32) -> Result<&'p str, ModelError> {
    if number >= count {
        return Err(part.metadata().error(NUMBER, format!("wanted 0 to {}, found {number}", count - 1)));
    }
    let (ending, name) = (file_name("", number, count), path.file_name().unwrap_or_default());
    name.to_str().and_then(|name| name.strip_suffix(&ending[..])).ok_or_else(|| {
        let message =
            format!("{number} of {count} parts wants a name that ends in `{ending}`, for so the others are found");
        part.metadata().error(NUMBER, message)
    })
}

fn map(path: &Path) -> Result<Part<'static>, ModelError> {
    let mapped = MappedFile::open(path).map_err(ModelError::io(path))?;
    Part::new(path.display().to_string(), Bytes::Mapped(mapped))
}

/// Another part than the one that was given.
fn sibling(path: &Path, given: &Path) -> Result<Part<'static>, ModelError> {
    if path.is_file() {
        return map(path);
    }
    let message = format!("no such file; wanted a part of the model that {} is one of", given.display());
    Err(ModelError::file(path.display().to_string(), message))
}

/// Checks that a part says what `given` does.
fn check(part: &Part, key: &str, wanted: u32, given: &Path) -> Result<(), ModelError> {
    let found = part.metadata().u32(key)?;
    if found == wanted {
        return Ok(());
    }
    let message = format!("wanted {wanted}, beside {}, found {found}", given.display());
    Err(part.metadata().error(key, message))
}

/// Checks that the parts have the tensors that each says all have.
fn check_tensors(parts: &[Part]) -> Result<(), ModelError> {
    let found: usize = parts.iter().map(|part| part.header.tensors.len()).sum();
    for part in parts {
        let wanted = part.metadata().u32(TENSORS)?;
        if wanted as usize != found {
            let message = format!("wanted {wanted} tensors in {} parts, found {found}", parts.len());
            return Err(part.metadata().error(TENSORS, message));
        }
    }
    Ok(())
}
