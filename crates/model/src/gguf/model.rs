//! Weights out of a GGUF file, by our names.

use super::architecture::Architecture;
use super::config::read_config;
use super::positions::is_factors;
use super::tensors::{Layout, tensors};
use super::{GgufFile, GgufTensor};
use crate::checkpoint::Stored;
use crate::families::{self, TensorMap};
use crate::{ModelConfig, ModelError};
use moebius_kernels::formats::Format;
use std::borrow::Cow;
use std::collections::BTreeSet;

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
        let layout = Layout::of_file(&self.file);
        let maps = placed_tensors(self.architecture, layout, config, self.file.name())?;
        self.check_surplus(&maps, config)?;
        for map in &maps {
            let tensor = self.find(map)?;
            // Some writers keep a leading dimension of one.
            if without_ones(tensor.shape) != without_ones(&map.file_shape) {
                let message = format!("wanted shape {:?}, found {:?}", map.file_shape, tensor.shape);
                return Err(ModelError::tensor(tensor.file, tensor.name, message));
            }
        }
        Ok(maps)
    }

    /// What is stored of one of the tensors of [`Self::checked_maps`].
    pub(crate) fn stored(&self, map: &TensorMap) -> Result<Stored<'_>, ModelError> {
        let tensor = self.find(map)?;
        let (format, cols) = (tensor.format, tensor.columns());
        if format.block_len() == 1 {
            return Ok(Stored { format, bytes: map.gather(tensor.bytes, format.block_bytes()) });
        }
        if !has_whole_rows(map) {
            let mut numbers = vec![0.0f32; tensor.shape.iter().product()];
            tensor.read_f32(&mut numbers);
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            let gathered = map.gather(&bytes, size_of::<f32>()).into_owned();
            return Ok(Stored { format: Format::F32, bytes: Cow::Owned(gathered) });
        }
        if map.is_contiguous() {
            return Ok(Stored { format, bytes: Cow::Borrowed(tensor.rows(map.view.first / cols, map.rows.len())) });
        }
        let row = |row: usize| tensor.rows((map.view.first + row * map.view.row_stride) / cols, 1);
        let bytes = (0..map.rows.len()).flat_map(row).copied().collect();
        Ok(Stored { format, bytes: Cow::Owned(bytes) })
    }

    /// The format of [`Self::stored`].
    pub(crate) fn stored_format(&self, map: &TensorMap) -> Result<Format, ModelError> {
        let format = self.find(map)?.format;
        Ok(if format.block_len() == 1 || has_whole_rows(map) { format } else { Format::F32 })
    }

    fn find(&self, map: &TensorMap) -> Result<GgufTensor<'_>, ModelError> {
        self.file.get(&map.file_name).ok_or_else(|| {
            let message = format!("missing; wanted shape {:?}", map.file_shape);
            ModelError::tensor(self.file.name(), &map.file_name, message)
        })
    }

    fn check_surplus(&self, maps: &[TensorMap], config: &ModelConfig) -> Result<(), ModelError> {
        let wanted: BTreeSet<&str> = maps.iter().map(|map| &map.file_name[..]).collect();
        // Layers behind the last only guess further tokens.
        let is_further = |name: &str| {
            let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map(|(layer, _)| layer);
            let layer = layer.and_then(|layer| layer.parse::<usize>().ok());
            let key = format!("{}.nextn_predict_layers", self.architecture.name);
            layer.is_some_and(|layer| layer >= config.n_layers()) && self.file.metadata().has(&key)
        };
        let is_known = |name: &str| wanted.contains(name) || is_factors(name) || is_further(name);
        match self.file.tensors().find(|tensor| !is_known(tensor.name)) {
            None => Ok(()),
            Some(tensor) => {
                let message = format!("the {} configuration has no such tensor", config.family);
                Err(ModelError::tensor(tensor.file, tensor.name, message))
            }
        }
    }
}

/// A shape without its first dimensions of length one.
fn without_ones(shape: &[usize]) -> &[usize] {
    &shape[shape.iter().take_while(|&&length| length == 1).count()..]
}

/// Whether it is made of whole rows of the file's tensor, whose blocks can stay as they are.
fn has_whole_rows(map: &TensorMap) -> bool {
    let cols = map.file_shape.last().copied().unwrap_or(1).max(1);
    map.view.col_stride == 1
        && map.cols == cols
        && map.view.first.is_multiple_of(cols)
        && map.view.row_stride.is_multiple_of(cols)
}

/// The tensors of a file in a layout, in which every weight of the family has its place.
pub(super) fn placed_tensors(
    architecture: &Architecture,
    layout: Layout,
    config: &ModelConfig,
    file: &str,
) -> Result<Vec<TensorMap>, ModelError> {
    let maps = tensors(architecture, layout, config);
    let placed: BTreeSet<&str> = maps.iter().map(|map| &map.param[..]).collect();
    match families::tensors(config).into_iter().find(|map| !placed.contains(&map.param[..])) {
        None => Ok(maps),
        Some(map) => {
            let message = format!("the architecture {} has no place for it", architecture.name);
            Err(ModelError::tensor(file, &map.file_name, message))
        }
    }
}
