//! The loss on held-back text: the same windows each time, in batches of the training size.

use moebius_kernels::gemm::Precision;
use moebius_model::Model;

use crate::Result;
use crate::data::corpus::Corpus;
use crate::data::sampler::{count_windows, fixed_windows};
use crate::data::shard::TokenShard;
use crate::learn::{self, LoadCounts};
use crate::metrics::Score;

/// What to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evaluation {
    /// Tokens a window.
    pub sequence_length: usize,
    /// Windows a batch.
    pub sequences: usize,
    /// Number of batches; fewer if the text is short.
    pub batches: usize,
    /// What the operands of matrix products are rounded to.
    pub precision: Precision,
    /// What routers' operands and logits are rounded to.
    pub router_precision: Precision,
}

/// Runs `model` over fixed windows of held-back tokens, spread evenly over them; adds up what the routers did in `load`.
///
/// Bits per byte divide the summed cross-entropy by the bytes of text that the targets stand for; the separator between
/// documents costs its loss and stands for no byte. `tokens` is a shard of `corpus`.
///
/// # Errors
/// The model's.
pub fn evaluate(
    model: &Model,
    corpus: &Corpus,
    tokens: &TokenShard,
    what: &Evaluation,
    load: &mut LoadCounts,
) -> Result<Score> {
    let token_bytes = corpus.tokenizer.token_bytes();
    let available = count_windows(tokens.len(), what.sequence_length);
    let chosen = fixed_windows(available, what.sequences * what.batches);
    let (mut total, mut count, mut bytes) = (0.0, 0_usize, 0_u64);
    for numbers in chosen.chunks(what.sequences) {
        let batch = corpus.windows(tokens, what.sequence_length, numbers);
        let loss = learn::measure(model, &batch, what, load)?;
        total += loss * batch.targets.len() as f64;
        count += batch.targets.len();
        bytes += batch.targets.iter().map(|&id| u64::from(token_bytes[id as usize])).sum::<u64>();
    }
    let loss = total / count as f64;
    let bits_per_byte = total / std::f64::consts::LN_2 / bytes.max(1) as f64;
    Ok(Score { loss, perplexity: loss.exp(), bits_per_byte, tokens: count as u64 })
}
