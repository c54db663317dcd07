//! `moebius logits`: the logits of given tokens, and what the routers computed, as a safetensors file.

use std::process::ExitCode;

use anyhow::bail;
use moebius_model::safetensors::{SafetensorsFile, TensorData, TensorToWrite, write_safetensors};

use crate::arguments::LogitsArguments;
use crate::models::Source;
use crate::record::{Keep, record};
use crate::token_file::read_tokens;

/// Runs the command.
///
/// # Errors
/// A model or file that cannot be read, a token outside the vocabulary, a sequence longer than the model's context, an
/// output that cannot be written; it is whole or not there.
pub fn execute(arguments: &LogitsArguments) -> anyhow::Result<ExitCode> {
    let file = SafetensorsFile::open(&arguments.tokens)?;
    let source = Source::new(arguments.model.as_deref());
    let model = source.model_to_run(arguments.weights, arguments.dtype.weights())?;
    let config = &model.config;
    let sequences = read_tokens(&file, &arguments.key, config.vocab_size)?;
    let (batch, sequence) = (sequences.len(), sequences[0].len());
    if sequence > config.max_positions {
        let (name, key, context) = (file.name(), &arguments.key, config.max_positions);
        bail!("{name}: tensor `{key}`: sequences of {sequence} tokens, but the model's context holds {context}");
    }
    let keep = Keep { hidden: false, routing: arguments.routing };
    let found = record(&model, arguments.dtype.into(), &sequences, keep)?;

    // The format stores 64-bit indices where PyTorch users expect them.
    let indices: Vec<Vec<i64>> =
        found.routing.iter().map(|layer| layer.experts.iter().map(|&expert| i64::from(expert)).collect()).collect();
    let tokens = batch * sequence;
    let mut tensors = vec![TensorToWrite::f32("logits", &[batch, sequence, config.vocab_size], &found.logits)];
    for (routing, indices) in found.routing.iter().zip(&indices) {
        let (layer, k) = (&routing.place, routing.top_k);
        tensors.extend([
            TensorToWrite::f32(format!("router_logits.{layer}"), &[tokens, routing.n_experts], &routing.logits),
            TensorToWrite::new(format!("topk_index.{layer}"), &[tokens, k], TensorData::I64(indices)),
            TensorToWrite::f32(format!("topk_weight.{layer}"), &[tokens, k], &routing.weights),
        ]);
    }
    write_safetensors(&arguments.out, &tensors)?;
    Ok(ExitCode::SUCCESS)
}
