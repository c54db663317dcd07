//! Weights out of a GGUF file, by our names.

use super::architecture::{Architecture, Place, read_config, row_of_halves};
use super::{GgufFile, GgufTensor};
use crate::families::{self, TensorMap};
use crate::{ModelConfig, ModelError};
use moebius_kernels::memory::Buffer;
use moebius_tensor::Tensor;
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

    /// Reads all weights by our names, as f32.
    pub(crate) fn load(&self, config: &ModelConfig) -> Result<BTreeMap<String, Tensor>, ModelError> {
        let places = families::tensors(config)
            .into_iter()
            .map(|map| Ok((self.place(&map)?, map)))
            .collect::<Result<Vec<(Place, TensorMap)>, ModelError>>()?;
        let mut parts: BTreeMap<&str, usize> = BTreeMap::new();
        for (place, _) in &places {
            *parts.entry(&place.name).or_default() += 1;
        }
        self.check_surplus(&parts.keys().copied().collect(), config)?;
        let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
        for (place, map) in &places {
            self.check(place, map, parts[&place.name[..]])?;
            // The file has the bytes of the whole tensor, so its elements can be counted.
            *sizes.entry(&map.param).or_default() += map.file_shape.iter().product::<usize>();
        }
        // Only now, with every tensor there and of its shape, is memory taken.
        let mut values: BTreeMap<String, Buffer<f32>> =
            sizes.into_iter().map(|(param, size)| (param.to_string(), Buffer::scratch(size))).collect();
        for (place, map) in &places {
            let tensor = self.find(&place.name, map)?;
            let columns = tensor.columns();
            let buffer = values.get_mut(&map.param).expect("made above");
            let out = &mut buffer[map.rows.start * columns..map.rows.end * columns];
            read_part(&tensor, place, config.head_dim, out);
        }
        Ok(values.into_iter().map(|(name, data)| (name, Tensor::new(&[data.len()], data))).collect())
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

/// Decodes a tensor, or one part of it, with the halves of its heads apart.
fn read_part(tensor: &GgufTensor, place: &Place, head_dim: usize, out: &mut [f32]) {
    let columns = tensor.columns().max(1);
    let count = out.len() / columns;
    let bytes = tensor.rows(place.part.unwrap_or(0) * count, count);
    if !place.interleaved {
        tensor.format.decode(bytes, out);
        return;
    }
    // A bias is one row of the file whose numbers are rotated as a matrix's rows are.
    let width = if tensor.shape.len() == 1 { 1 } else { columns };
    let mut stored = Buffer::scratch(out.len());
    tensor.format.decode(bytes, &mut stored);
    for (row, values) in stored.chunks_exact(width).enumerate() {
        let to = row_of_halves(row, head_dim) * width;
        out[to..to + width].copy_from_slice(values);
    }
}
