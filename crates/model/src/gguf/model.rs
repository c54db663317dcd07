//! Weights out of a GGUF file, by our names.

use super::architecture::{Architecture, Place, read_config, row_of_halves};
use super::{GgufFile, GgufTensor};
use crate::checkpoint::Stored;
use crate::families::{self, TensorMap};
use crate::{ModelConfig, ModelError};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

/// A model's file and how its tensors are named.
pub(crate) struct GgufModel<'a> {
    file: GgufFile<'a>,
    architecture: &'static Architecture,
}

impl<'a> GgufModel<'a> {
    /// Takes a file, and gives its configuration beside.
    pub(crate) fn new(file: GgufFile<'a>) -> Result<(ModelConfig, Self), ModelError> {
        let (config, architecture) = read_config(&file)?;
        Ok((config, Self { file, architecture }))
    }

    /// The family's tensors, each of which is there and of its shape.
    pub(crate) fn checked_maps(&self, config: &ModelConfig) -> Result<Vec<TensorMap>, ModelError> {
        let maps = families::tensors(config);
        let places = maps.iter().map(|map| self.place(map)).collect::<Result<Vec<Place>, ModelError>>()?;
        let mut parts: BTreeMap<&str, usize> = BTreeMap::new();
        for place in &places {
            *parts.entry(&place.name).or_default() += 1;
        }
        self.check_surplus(&parts.keys().copied().collect(), config)?;
        for (place, map) in places.iter().zip(&maps) {
            self.check(place, map, parts[&place.name[..]])?;
        }
        Ok(maps)
    }

    /// What is stored of one of the family's tensors, the halves of its heads apart.
    pub(crate) fn stored(&self, map: &TensorMap, config: &ModelConfig) -> Result<Stored<'_>, ModelError> {
        let place = self.place(map)?;
        let tensor = self.find(&place.name, map)?;
        let format = tensor.format;
        // A bias is one row of the file, whose numbers are rotated as a matrix's rows are.
        let row_len = if map.file_shape.len() == 1 { 1 } else { tensor.columns().max(1) };
        let count = map.file_shape.iter().product::<usize>() / tensor.columns().max(1);
        let bytes = tensor.rows(place.part.unwrap_or(0) * count, count);
        if !place.interleaved {
            return Ok(Stored { format, bytes: Cow::Borrowed(bytes) });
        }
        let Some(row_bytes) = format.bytes_of(row_len) else {
            let message = format!("wanted single numbers, to be reordered; found {}", format.name());
            return Err(ModelError::tensor(tensor.file, tensor.name, message));
        };
        let head_dim = head_dim(config);
        let mut reordered = vec![0; bytes.len()];
        for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
            let to = row_of_halves(row, head_dim) * row_bytes;
            reordered[to..to + row_bytes].copy_from_slice(bytes);
        }
        Ok(Stored { format, bytes: Cow::Owned(reordered) })
    }

    fn place(&self, map: &TensorMap) -> Result<Place, ModelError> {
        self.architecture.place(&map.file_name).ok_or_else(|| {
            let message = format!("the architecture {} has no place for it", self.architecture.name);
            ModelError::tensor(self.file.name(), &map.file_name, message)
        })
    }

    fn find(&self, name: &str, map: &TensorMap) -> Result<GgufTensor<'_>, ModelError> {
        self.file.get(name).ok_or_else(|| {
            let message = format!("missing; wanted shape {:?}, for {}", map.file_shape, map.file_name);
            ModelError::tensor(self.file.name(), name, message)
        })
    }

    fn check(&self, place: &Place, map: &TensorMap, parts: usize) -> Result<(), ModelError> {
        let tensor = self.find(&place.name, map)?;
        let stack = place.part.map(|_| parts);
        let wanted: Vec<usize> = stack.into_iter().chain(map.file_shape.iter().copied()).collect();
        if tensor.shape != wanted {
            let message = format!("wanted shape {wanted:?}, found {:?}", tensor.shape);
            return Err(ModelError::tensor(tensor.file, tensor.name, message));
        }
        Ok(())
    }

    fn check_surplus(&self, wanted: &BTreeSet<&str>, config: &ModelConfig) -> Result<(), ModelError> {
        match self.file.tensors().find(|tensor| !wanted.contains(tensor.name)) {
            None => Ok(()),
            Some(tensor) => {
                let message = format!("the {} configuration has no such tensor", config.family);
                Err(ModelError::tensor(tensor.file, tensor.name, message))
            }
        }
    }
}

/// The width of a head of the architectures here.
pub(super) fn head_dim(config: &ModelConfig) -> usize {
    config.attention().map_or(1, |attention| attention.head_dim)
}
