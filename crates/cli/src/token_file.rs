//! Token ids in a safetensors file, checked before a model sees them.

use anyhow::bail;
use moebius_model::safetensors::SafetensorsFile;

/// Reads a tensor `[batch, sequence]` of whole numbers as sequences of tokens.
///
/// # Errors
/// A tensor that is missing, of another type or rank, or empty; an id outside the vocabulary, with its place.
pub fn read_tokens(file: &SafetensorsFile<'_>, key: &str, vocabulary: usize) -> anyhow::Result<Vec<Vec<u32>>> {
    let name = file.name();
    let Some(tensor) = file.get(key) else {
        let names: Vec<&str> = file.tensors().map(|tensor| tensor.name).collect();
        bail!(
            "{name}: tensor `{key}`: missing; the file holds {}",
            if names.is_empty() { "none".into() } else { names.join(", ") }
        );
    };
    let &[batch, sequence] = tensor.shape else {
        bail!("{name}: tensor `{key}`: wanted token ids [batch, sequence], found shape {:?}", tensor.shape);
    };
    if batch * sequence == 0 {
        bail!("{name}: tensor `{key}`: wanted at least one token, found shape {:?}", tensor.shape);
    }
    let ids = tensor.to_i64()?;
    let token = |(at, &id): (usize, &i64)| match u32::try_from(id) {
        Ok(token) if (token as usize) < vocabulary => Ok(token),
        _ => bail!(
            "{name}: tensor `{key}`: token id {id} at [{}, {}] is outside the vocabulary of {vocabulary}",
            at / sequence,
            at % sequence
        ),
    };
    let tokens = ids.iter().enumerate().map(token).collect::<anyhow::Result<Vec<u32>>>()?;
    Ok(tokens.chunks(sequence).map(<[u32]>::to_vec).collect())
}
