//! What a model computes from given sequences, kept whole: for `logits` and `check`.

use moebius_kernels::gemm::Precision;
use moebius_model::{Batch, Model, Observer};
use moebius_moe::Routing;
use moebius_tensor::{Graph, Var};

/// Sequences go through the model together up to this many tokens.
const TOKENS_AT_ONCE: usize = 4096;

/// What to keep besides the logits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Keep {
    /// Hidden states.
    pub hidden: bool,
    /// What the routers computed.
    pub routing: bool,
}

/// What came out. `tokens` is the number of tokens of all sequences, in their order.
#[derive(Debug, Default)]
pub struct Record {
    /// `[tokens, vocab]`
    pub logits: Vec<f32>,
    /// `[tokens, hidden]`: the embedding's output, each layer's but the last, the final norm's.
    pub hidden: Vec<Vec<f32>>,
    /// Each MoE layer's routing, bottom to top.
    pub routing: Vec<LayerRouting>,
}

/// What one layer's router computed.
#[derive(Debug, Default)]
pub struct LayerRouting {
    /// The layer's number among all layers, from 0; behind `attn.` for a router of attention heads.
    pub place: String,
    /// Number of experts.
    pub n_experts: usize,
    /// Experts chosen for a token.
    pub top_k: usize,
    /// `[tokens, experts]`
    pub logits: Vec<f32>,
    /// `[tokens, k]`, heaviest first.
    pub experts: Vec<u32>,
    /// `[tokens, k]`
    pub weights: Vec<f32>,
}

/// Runs sequences of one length, none of them empty.
///
/// # Errors
/// Whatever the model reports: a token that it lacks, a sequence that is too long.
pub fn record(model: &Model, precision: Precision, sequences: &[Vec<u32>], keep: Keep) -> anyhow::Result<Record> {
    let mut recorder = Recorder { keep, record: Record::default() };
    let length = sequences.first().map_or(1, Vec::len);
    for together in sequences.chunks((TOKENS_AT_ONCE / length).max(1)) {
        let graph = Graph::inference(precision);
        let hidden = model.forward(&graph, &Batch::of_sequences(together), None, &mut recorder)?;
        recorder.record.logits.extend_from_slice(model.logits(&graph, &hidden).data());
    }
    Ok(recorder.record)
}

struct Recorder {
    keep: Keep,
    record: Record,
}

impl Observer for Recorder {
    fn hidden(&mut self, index: usize, hidden: &Var) {
        if !self.keep.hidden {
            return;
        }
        let all = &mut self.record.hidden;
        if all.len() <= index {
            all.resize_with(index + 1, Vec::new);
        }
        all[index].extend_from_slice(hidden.data());
    }

    fn routing(&mut self, layer: usize, routing: &Routing) {
        self.keep(layer.to_string(), routing);
    }

    fn mixer_routing(&mut self, layer: usize, routing: &Routing) {
        self.keep(format!("attn.{layer}"), routing);
    }
}

impl Recorder {
    fn keep(&mut self, place: String, routing: &Routing) {
        if !self.keep.routing {
            return;
        }
        let all = &mut self.record.routing;
        let at = all.iter().position(|known| known.place == place).unwrap_or_else(|| {
            all.push(LayerRouting {
                place,
                n_experts: routing.plan.n_experts(),
                top_k: routing.topk_index.len() / routing.plan.n_tokens().max(1),
                ..LayerRouting::default()
            });
            all.len() - 1
        });
        all[at].logits.extend_from_slice(routing.logits.data());
        all[at].experts.extend_from_slice(&routing.topk_index);
        all[at].weights.extend_from_slice(routing.topk_weight.data());
    }
}
