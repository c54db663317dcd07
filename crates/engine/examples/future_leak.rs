//! What a router that looks at the whole batch knows too much: the loss of windows read at once, as in training, beside the
//! loss of the same windows read from left to right, where no later token and no other window is there to look at.
//!
//! `cargo run --release -p moebius-engine --example future_leak -- MODEL TEXT [WINDOWS [LENGTH]]`

use std::error::Error;
use std::path::Path;

use moebius_engine::Tokenizer;
use moebius_kernels::gemm::Precision;
use moebius_kernels::loss::cross_entropy_rows;
use moebius_model::{Batch, Checkpoint, Model, Silent};
use moebius_tensor::{Graph, Tensor, Var};

/// The loss of the last of `rows` in each sequence of `batch`, or of every row.
fn losses(model: &Model, sequences: &[&[u32]], targets: &[u32], last_only: bool) -> Result<f64, Box<dyn Error>> {
    let (graph, batch) = (Graph::inference(Precision::F32), Batch::of_sequences(sequences));
    let hidden = model.forward(&graph, &batch, None, &mut Silent)?;
    let width = hidden.shape()[1];
    let rows = if last_only { hidden.data()[hidden.data().len() - width..].to_vec() } else { hidden.data().to_vec() };
    let logits = model.logits(&graph, &Var::constant(Tensor::new(&[targets.len(), width], rows)));
    let mut losses = vec![0.0; targets.len()];
    cross_entropy_rows(logits.data(), targets, &mut losses);
    Ok(losses.iter().map(|&loss| f64::from(loss)).sum())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, rest @ ..] = &arguments[..] else { return Err("wanted: MODEL TEXT [WINDOWS [LENGTH]]".into()) };
    let number = |at: usize, default: usize| rest.get(at).map_or(Ok(default), |number| number.parse());
    let (count, length) = (number(0, 16)?, number(1, 64)?);
    let tokenizer = Tokenizer::from_file(&Path::new(model).join("tokenizer.json"))?;
    let model = Model::load(&Checkpoint::open(Path::new(model))?)?;
    let tokens = tokenizer.encode_bare(&std::fs::read_to_string(text)?)?;
    // Windows spread evenly over the text.
    let available = tokens.len().saturating_sub(1) / length;
    if count == 0 || length == 0 || available < count {
        return Err(format!("wanted {count} windows of {length} tokens, found {available} in the text").into());
    }
    let starts: Vec<usize> = (0..count).map(|i| i * available / count * length).collect();
    let windows: Vec<&[u32]> = starts.iter().map(|&start| &tokens[start..start + length]).collect();
    let targets: Vec<u32> = starts.iter().flat_map(|&start| &tokens[start + 1..=start + length]).copied().collect();
    let total = targets.len() as f64;
    let at_once = losses(&model, &windows, &targets, false)? / total;
    let mut left_to_right = 0.0;
    for (window, targets) in windows.iter().zip(targets.chunks_exact(length)) {
        for end in 1..=length {
            left_to_right += losses(&model, &[&window[..end]], &targets[end - 1..end], true)?;
        }
    }
    println!("{total} tokens: read at once {at_once:.4} nats, from left to right {:.4} nats", left_to_right / total);
    Ok(())
}
