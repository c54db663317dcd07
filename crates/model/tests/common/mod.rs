//! GGUF files taken apart and put together otherwise.

use moebius_kernels::formats::Format;
use moebius_model::Model;
use moebius_model::gguf::{self, GgufFile, ValueToWrite, WeightToWrite, write_gguf};
use std::collections::BTreeMap;
use std::path::Path;

/// Keys and their values.
pub type Metadata = BTreeMap<String, ValueToWrite>;
/// Tensors by their names: shape and numbers.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// What a file holds, but for arrays among its metadata.
pub fn contents(path: &Path) -> (Metadata, Tensors) {
    let file = GgufFile::open(path).unwrap();
    let metadata = (file.metadata().keys())
        .filter_map(|key| {
            let value = match file.metadata().get(key).unwrap().unwrap() {
                gguf::Value::Whole(number) => ValueToWrite::U32(number as u32),
                gguf::Value::F32(number) => ValueToWrite::F32(number),
                gguf::Value::Flag(flag) => ValueToWrite::Bool(flag),
                gguf::Value::Text(text) => ValueToWrite::Text(text.into()),
                _ => return None,
            };
            Some((key.to_string(), value))
        })
        .collect();
    let tensors = (file.tensors())
        .map(|tensor| {
            let mut values = vec![0.0; tensor.shape.iter().product()];
            tensor.read_f32(&mut values);
            (tensor.name.to_string(), (tensor.shape.to_vec(), values))
        })
        .collect();
    (metadata, tensors)
}

/// Writes a file of these, in f32.
pub fn write_contents(path: &Path, metadata: &Metadata, tensors: &Tensors) {
    let weights: Vec<WeightToWrite> = (tensors.iter())
        .map(|(name, (shape, values))| {
            let columns = *shape.last().unwrap();
            let values: gguf::Values = Box::new(move |rows, out| {
                out.copy_from_slice(&values[rows.start * columns..rows.end * columns]);
            });
            WeightToWrite { name: name.clone(), shape: shape.clone(), format: Format::F32, values }
        })
        .collect();
    let metadata: Vec<_> = metadata.clone().into_iter().collect();
    write_gguf(path, &metadata, &weights).unwrap();
}

/// A model's weights by name.
pub fn weights(model: &Model) -> Vec<(String, Vec<f32>)> {
    model.params().iter().map(|param| (param.name().to_string(), param.value().data().to_vec())).collect()
}
