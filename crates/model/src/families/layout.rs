//! [`Layout`]: what a configuration says of the files beside it, and not of its model: FP8 blocks, parts that are left out,
//! the place of a text model inside a larger one.

use super::keys::Keys;
use crate::{ModelConfig, ModelError};
use serde_json::{Map, Value, json};
use std::borrow::Cow;

/// How the files of a folder hold the tensors of its family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// What the family's names begin with, and what stands in the file instead.
    renamed: Option<[&'static str; 2]>,
    /// Rows and columns of the blocks that have a scale each, if weights may be in FP8.
    pub(crate) fp8_blocks: Option<[usize; 2]>,
    /// Parts that are left out.
    left_out: Vec<LeftOut>,
}

/// A part of a published model that is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeftOut {
    /// What the names of its tensors begin with.
    pub(crate) prefix: Cow<'static, str>,
    /// What it is.
    pub(crate) what: &'static str,
}

/// A model whose text part is a family.
struct Multimodal {
    model_type: &'static str,
    text: &'static str,
    renamed: [&'static str; 2],
    /// The prefixes of what is no text.
    others: &'static [&'static str],
}

const MULTIMODAL: [Multimodal; 2] = [
    Multimodal {
        model_type: "llama4",
        text: "llama4_text",
        renamed: ["", "language_model."],
        others: &["vision_model.", "multi_modal_projector."],
    },
    Multimodal {
        model_type: "qwen3_5_moe",
        text: "qwen3_5_moe_text",
        renamed: ["model.", "model.language_model."],
        others: &["model.visual."],
    },
];

const VISION: &str = "images";
const PREDICTION: &str = "multi-token prediction";

/// What families call their prediction of further tokens, where it is no layer behind the others.
const PREDICTORS: [(&str, &str); 3] =
    [("qwen3_next", "mtp."), ("qwen3_5_moe_text", "mtp."), ("ernie4_5_moe", "model.mtp_")];

/// Keys that a larger model has beside its text model, and that speak of that too.
const COMMON: [&str; 2] = ["tie_word_embeddings", "quantization_config"];

/// The keys of the text model, if there is one inside, and how the files hold it.
pub(super) fn text_model(keys: &Keys, map: Map<String, Value>) -> Result<(Map<String, Value>, Layout), ModelError> {
    let model_type = keys.text("model_type")?;
    let Some(found) = MULTIMODAL.iter().find(|multimodal| multimodal.model_type == model_type) else {
        return Ok((map, Layout::default()));
    };
    let Some(text) = keys.object("text_config")? else {
        return Err(keys.error("text_config", "wanted the configuration of its text model, found nothing"));
    };
    text.only("model_type", json!(found.text))?;
    let mut text = map["text_config"].as_object().cloned().unwrap_or_default();
    text.insert("model_type".into(), found.text.into());
    let common = COMMON.into_iter().filter_map(|key| Some((key.to_string(), map.get(key)?.clone())));
    text.extend(common.filter(|(_, value)| !value.is_null()));
    let left_out = found.others.iter().map(|&prefix| LeftOut { prefix: prefix.into(), what: VISION });
    Ok((text, Layout { renamed: Some(found.renamed), left_out: left_out.collect(), ..Layout::default() }))
}

impl Layout {
    /// Reads what weights are stored in, and takes it out of the keys if the family need not know.
    pub(super) fn read_quantisation(&mut self, file: &str, map: &mut Map<String, Value>) -> Result<(), ModelError> {
        let keys = Keys::new(file, map);
        let Some(quantised) = keys.object("quantization_config")? else { return Ok(()) };
        match quantised.text("quant_method")? {
            "fp8" => {}
            // gpt-oss's, which its family reads.
            "mxfp4" => return Ok(()),
            other => {
                let message = format!("wanted fp8 with a scale for each block, or gpt_oss's mxfp4; found {other}");
                return Err(quantised.error("quant_method", message));
            }
        }
        quantised.only("fmt", json!("e4m3"))?;
        quantised.only("activation_scheme", json!("dynamic"))?;
        let wanted = "rows and columns of a block that has a scale";
        let blocks = quantised.list("weight_block_size", wanted, |size| {
            size.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0)
        })?;
        let Ok(blocks) = <[usize; 2]>::try_from(blocks) else {
            return Err(quantised.error("weight_block_size", format!("wanted {wanted}, found another number of sizes")));
        };
        self.fp8_blocks = Some(blocks);
        map.remove("quantization_config");
        Ok(())
    }

    /// Reads which tensors predict further tokens: layers behind the model's own, or what the family calls them.
    pub(super) fn read_predictors(&mut self, keys: &Keys, config: &ModelConfig) -> Result<(), ModelError> {
        let layers = keys.optional_size("num_nextn_predict_layers")?.unwrap_or(0).min(config.n_layers());
        let behind = (0..layers).map(|layer| format!("model.layers.{}.", config.n_layers() + layer).into());
        let named = PREDICTORS.iter().filter(|(family, _)| *family == config.family);
        let prefixes = behind.chain(named.map(|(_, prefix)| Cow::Borrowed(*prefix)));
        self.left_out.extend(prefixes.map(|prefix| LeftOut { prefix, what: PREDICTION }));
        Ok(())
    }

    /// The name in the file of a tensor that the family calls `name`.
    pub(crate) fn file_name<'n>(&self, name: &'n str) -> Cow<'n, str> {
        match self.renamed.and_then(|[family, file]| Some((name.strip_prefix(family)?, file))) {
            Some((rest, file)) => format!("{file}{rest}").into(),
            None => name.into(),
        }
    }

    /// The part that is left out and has this tensor, by the name in the file.
    pub(crate) fn left_out(&self, name: &str) -> Option<&LeftOut> {
        self.left_out.iter().find(|part| name.starts_with(&*part.prefix))
    }
}
