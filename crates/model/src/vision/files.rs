//! A vision model as a folder: `config.json` with our `model_type`, `model.safetensors` with our own names.

use super::{VisionConfig, VisionModel};
use crate::files::Staged;
use crate::safetensors::{SafetensorsFile, TensorData, TensorToWrite, stage_safetensors};
use crate::{ModelError, safetensors};
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Param, Tensor};
use serde_json::Value;
use std::path::Path;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";

impl VisionModel {
    /// Writes the folder's two files, in f32, whole or not at all.
    ///
    /// # Errors
    /// What the system says.
    pub fn save(&self, folder: &Path) -> Result<(), ModelError> {
        std::fs::create_dir_all(folder).map_err(ModelError::io(folder))?;
        let params = self.params();
        let tensors: Vec<TensorToWrite> = (params.iter())
            .map(|param| TensorToWrite {
                name: param.name().to_owned(),
                shape: param.shape().to_vec(),
                data: TensorData::F32(param.value().data()),
            })
            .collect();
        let weights = stage_safetensors(&folder.join(WEIGHTS), &tensors, 64)?;
        let mut text = serde_json::to_vec_pretty(&self.config.to_json()).expect("a value of texts and numbers");
        text.push(b'\n');
        let config = Staged::new(&folder.join(CONFIG), |out| out.write_all(&text))?;
        // The configuration last: a folder that has one is complete.
        weights.publish()?;
        config.publish()
    }

    /// Reads a folder that [`VisionModel::save`] wrote.
    ///
    /// # Errors
    /// What is missing, foreign or broken, by file and tensor.
    pub fn load(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join(CONFIG);
        let name = path.display().to_string();
        let bytes = std::fs::read(&path).map_err(ModelError::io(&path))?;
        let value: Value =
            serde_json::from_slice(&bytes).map_err(|error| ModelError::file(&name, format!("wanted JSON: {error}")))?;
        let config = VisionConfig::from_json(&value, &name)?;
        let file = SafetensorsFile::open(&folder.join(WEIGHTS))?;
        let mut wanted = 0;
        let model = Self::build(&config, &mut |id, name, shape| {
            wanted += 1;
            Ok(Param::new(id, name, read(&file, name, shape)?))
        })?;
        if let Some(surplus) = file.tensors().find(|tensor| !model.params().iter().any(|p| p.name() == tensor.name)) {
            return Err(ModelError::tensor(file.name(), surplus.name, "the configuration has no such tensor"));
        }
        Ok(model)
    }
}

fn read(file: &safetensors::SafetensorsFile<'_>, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
    let view = file.tensor(name)?;
    if view.shape != shape {
        let message = format!("wanted shape {shape:?}, found {:?}", view.shape);
        return Err(ModelError::tensor(file.name(), name, message));
    }
    let mut data = Buffer::scratch(shape.iter().product());
    view.read_f32(&mut data)?;
    Ok(Tensor::new(shape, data))
}
