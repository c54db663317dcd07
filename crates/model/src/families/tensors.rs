//! The tensors of a decoder, by the names that a family gives its parts.

use super::{TensorMap, View};
use crate::config::{AttentionConfig, DenseFfn, Ffn, LatentConfig, Mixer, ModelConfig, MoeFfn, Norm};

/// What a family calls its parts.
pub(super) struct Names {
    pub(super) embedding: &'static str,
    /// What a layer's names begin with, its number behind.
    pub(super) layers: &'static str,
    /// The norms before and after the mixer.
    pub(super) mixer_norms: [&'static str; 2],
    pub(super) attention: &'static str,
    /// The norms of queries and keys.
    pub(super) qk_norms: [&'static str; 2],
    /// The norms before and after the feed-forward part.
    pub(super) ffn_norms: [&'static str; 2],
    pub(super) dense: &'static str,
    pub(super) moe: &'static str,
    /// Inside `moe`.
    pub(super) router: &'static str,
    /// The whole name, inside `moe`.
    pub(super) selection_bias: &'static str,
    pub(super) experts: ExpertTensors,
    /// Inside `moe`, or with a leading point inside the layer.
    pub(super) shared: &'static str,
    pub(super) shared_gate: &'static str,
    /// How the shared experts' gate and up stand.
    pub(super) shared_is_fused: bool,
    pub(super) final_norm: &'static str,
    pub(super) head: &'static str,
}

/// How the experts of a layer stand in a file.
#[derive(Clone, Copy)]
pub(super) enum ExpertTensors {
    /// `experts.N.` and these: gate, up, down.
    Separate([&'static str; 3]),
    /// Two tensors `[experts, 2 * width, hidden]` (gates first) and `[experts, hidden, width]`.
    Stacked([&'static str; 2]),
    /// Two tensors `[experts, hidden, 2 * width]` and `[experts, width, hidden]`.
    Transposed {
        names: [&'static str; 2],
        /// Whether gate and up alternate; else the gates come first.
        alternating: bool,
    },
    /// Three tensors `[experts * width, hidden]`: gate, up, and down transposed.
    Flat([&'static str; 3]),
}

/// What Qwen's kind calls an expert's matrices.
pub(super) const PROJECTIONS: ExpertTensors = ExpertTensors::Separate(["gate_proj", "up_proj", "down_proj"]);
/// What Mixtral's kind calls them: w1 is the gate, w3 goes up, w2 goes down.
pub(super) const NUMBERED: ExpertTensors = ExpertTensors::Separate(["w1", "w3", "w2"]);

impl Names {
    /// Llama's, with experts of Qwen's kind.
    pub(super) const LLAMA: Self = Self {
        embedding: "model.embed_tokens",
        layers: "model.layers",
        mixer_norms: ["input_layernorm", "post_attention_layernorm"],
        attention: "self_attn",
        qk_norms: ["q_norm", "k_norm"],
        ffn_norms: ["post_attention_layernorm", "post_feedforward_layernorm"],
        dense: "mlp",
        moe: "mlp",
        router: "gate",
        selection_bias: "gate.e_score_correction_bias",
        experts: PROJECTIONS,
        shared: "shared_experts",
        shared_gate: "shared_expert_gate",
        shared_is_fused: false,
        final_norm: "model.norm",
        head: "lm_head",
    };

    /// The tensors of a whole model.
    pub(super) fn tensors(&self, config: &ModelConfig) -> Vec<TensorMap> {
        let mut all = vec![matrix(self.embedding, "embedding", config.vocab_size, config.hidden)];
        for layer in 0..config.n_layers() {
            all.extend(self.layer(config, layer));
        }
        all.extend(norm(config, self.final_norm, "final_norm"));
        if !config.tie_embeddings {
            all.push(matrix(self.head, "head", config.vocab_size, config.hidden));
        }
        if config.head_bias {
            all.push(vector(&format!("{}.bias", self.head), "head_bias", config.vocab_size));
        }
        all
    }

    fn layer(&self, config: &ModelConfig, layer: usize) -> Vec<TensorMap> {
        let (theirs, ours) = (format!("{}.{layer}", self.layers), format!("layers.{layer}"));
        let (is_before, is_after) = (config.norm_place.is_before(), config.norm_place.is_after());
        let norms = |[before, after]: [&str; 2], part: &str| {
            let mut all = Vec::new();
            if is_before {
                all.extend(norm(config, &format!("{theirs}.{before}"), &format!("{ours}.{part}_norm")));
            }
            if is_after {
                all.extend(norm(config, &format!("{theirs}.{after}"), &format!("{ours}.{part}_out_norm")));
            }
            all
        };
        let mut all = norms(self.mixer_norms, "attention");
        let (theirs_mixer, ours_mixer) = (format!("{theirs}.{}", self.attention), format!("{ours}.attention"));
        all.extend(match &config.layers[layer].mixer {
            Mixer::Attention(attention) => self.attention(attention, config.hidden, &theirs_mixer, &ours_mixer),
            Mixer::Latent(latent) => latent_tensors(latent, config.hidden, &theirs_mixer, &ours_mixer),
            // Families with other mixers name their tensors themselves.
            _ => Vec::new(),
        });
        all.extend(norms(self.ffn_norms, "ffn"));
        all.extend(match &config.layers[layer].ffn {
            Ffn::Dense(DenseFfn { width, .. }) => {
                network(*width, config.hidden, &format!("{theirs}.{}", self.dense), &format!("{ours}.mlp"))
            }
            Ffn::Moe(moe) => self.mixture(moe, config.hidden, &theirs, &format!("{ours}.moe")),
        });
        all
    }

    /// The tensors of grouped-query attention.
    pub(super) fn attention(
        &self,
        config: &AttentionConfig,
        hidden: usize,
        theirs: &str,
        ours: &str,
    ) -> Vec<TensorMap> {
        let AttentionConfig { n_heads, n_kv_heads, head_dim, .. } = *config;
        let (queries, keys) = (n_heads * head_dim, n_kv_heads * head_dim);
        let mut all = Vec::new();
        for (letter, rows, cols) in
            [("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries)]
        {
            all.push(matrix(&format!("{theirs}.{letter}_proj"), &format!("{ours}.{letter}"), rows, cols));
        }
        let biases = [
            ("q", queries, config.qkv_bias),
            ("k", keys, config.qkv_bias),
            ("v", keys, config.qkv_bias),
            ("o", hidden, config.o_bias),
        ];
        for (letter, width, _) in biases.into_iter().filter(|(_, _, has)| *has) {
            all.push(vector(&format!("{theirs}.{letter}_proj.bias"), &format!("{ours}.{letter}_bias"), width));
        }
        for ((name, letter), heads) in self.qk_norms.into_iter().zip(["q", "k"]).zip([n_heads, n_kv_heads]) {
            if let Some(width) = config.qk_norm.width(heads, head_dim) {
                all.push(vector(&format!("{theirs}.{name}.weight"), &format!("{ours}.{letter}_norm"), width));
            }
        }
        if config.sinks {
            all.push(vector(&format!("{theirs}.sinks"), &format!("{ours}.sinks"), n_heads));
        }
        all
    }

    fn mixture(&self, moe: &MoeFfn, hidden: usize, layer: &str, ours: &str) -> Vec<TensorMap> {
        let theirs = format!("{layer}.{}", self.moe);
        let router = format!("{theirs}.{}", self.router);
        let mut all = vec![matrix(&router, &format!("{ours}.router"), moe.n_experts, hidden)];
        if moe.router.logit_bias {
            all.push(vector(&format!("{router}.bias"), &format!("{ours}.router_bias"), moe.n_experts));
        }
        if moe.router.selection_bias {
            let name = format!("{theirs}.{}", self.selection_bias);
            all.push(vector(&name, &format!("{ours}.selection_bias"), moe.n_experts));
        }
        all.extend(self.experts.tensors(moe, hidden, &theirs, ours));
        if let Some(shared) = moe.shared {
            let (theirs_shared, ours) = match self.shared.strip_prefix('.') {
                Some(name) => (format!("{layer}.{name}"), format!("{ours}.shared")),
                None => (format!("{theirs}.{}", self.shared), format!("{ours}.shared")),
            };
            if self.shared_is_fused {
                let (gate_up, down) = (format!("{ours}.gate_up"), format!("{ours}.down"));
                all.push(matrix(&format!("{theirs_shared}.input_linear"), &gate_up, 2 * shared.width, hidden));
                all.push(matrix(&format!("{theirs_shared}.output_linear"), &down, hidden, shared.width));
            } else {
                all.extend(network(shared.width, hidden, &theirs_shared, &ours));
            }
            if shared.gated {
                all.push(matrix(&format!("{theirs}.{}", self.shared_gate), &format!("{ours}.gate"), 1, hidden));
            }
        }
        all
    }
}

impl ExpertTensors {
    fn tensors(self, moe: &MoeFfn, hidden: usize, theirs: &str, ours: &str) -> Vec<TensorMap> {
        let MoeFfn { n_experts, width, .. } = *moe;
        let (gate_up, down) = (format!("{ours}.gate_up"), format!("{ours}.down"));
        let span = |first: usize, rows: usize| first * rows..(first + 1) * rows;
        let of_expert = |expert: usize| (span(2 * expert, width), span(2 * expert + 1, width), span(expert, hidden));
        match self {
            Self::Separate([gate, up, down_name]) => (0..n_experts)
                .flat_map(|expert| {
                    let theirs = |name: &str| format!("{theirs}.experts.{expert}.{name}");
                    [
                        part(&theirs(gate), &gate_up, 2 * expert * width, width, hidden),
                        part(&theirs(up), &gate_up, (2 * expert + 1) * width, width, hidden),
                        part(&theirs(down_name), &down, expert * hidden, hidden, width),
                    ]
                })
                .collect(),
            Self::Stacked([gate_up_name, down_name]) => vec![
                TensorMap::whole(
                    format!("{theirs}.{gate_up_name}.weight"),
                    &[n_experts, 2 * width, hidden],
                    gate_up,
                    0..n_experts * 2 * width,
                ),
                TensorMap::whole(
                    format!("{theirs}.{down_name}.weight"),
                    &[n_experts, hidden, width],
                    down,
                    0..n_experts * hidden,
                ),
            ],
            Self::Transposed { names, alternating } => {
                let [gate_up_name, down_name] = names.map(|name| format!("{theirs}.experts.{name}"));
                let mut all = Vec::new();
                let (row_stride, up) = if alternating { (2, 1) } else { (1, width) };
                for expert in 0..n_experts {
                    let (gates, ups, downs) = of_expert(expert);
                    let first = expert * hidden * 2 * width;
                    for (rows, first) in [(gates, first), (ups, first + up)] {
                        let view = View { first, row_stride, col_stride: 2 * width };
                        let shape = [n_experts, hidden, 2 * width];
                        all.push(TensorMap::whole(&gate_up_name, &shape, &gate_up, rows).viewed(hidden, view));
                    }
                    let view = View { first: expert * width * hidden, row_stride: 1, col_stride: hidden };
                    let shape = [n_experts, width, hidden];
                    all.push(TensorMap::whole(&down_name, &shape, &down, downs).viewed(width, view));
                }
                if moe.bias {
                    all.extend(bias_tensors(moe, hidden, [&gate_up_name, &down_name], ours, [row_stride, up]));
                }
                all
            }
            Self::Flat(names) => {
                let [gate, up, down_name] = names.map(|name| format!("{theirs}.experts.mlp.{name}"));
                let shape = [n_experts * width, hidden];
                let mut all = Vec::new();
                for expert in 0..n_experts {
                    let (gates, ups, downs) = of_expert(expert);
                    let first = expert * width * hidden;
                    let straight = View { first, row_stride: hidden, col_stride: 1 };
                    let transposed = View { first, row_stride: 1, col_stride: hidden };
                    all.push(TensorMap::whole(&gate, &shape, &gate_up, gates).viewed(hidden, straight));
                    all.push(TensorMap::whole(&up, &shape, &gate_up, ups).viewed(hidden, straight));
                    all.push(TensorMap::whole(&down_name, &shape, &down, downs).viewed(width, transposed));
                }
                all
            }
        }
    }
}

/// The biases of experts, `[experts, 2 * width]` and `[experts, hidden]` in the file.
fn bias_tensors(
    moe: &MoeFfn,
    hidden: usize,
    [gate_up, down]: [&str; 2],
    ours: &str,
    [col_stride, up]: [usize; 2],
) -> Vec<TensorMap> {
    let MoeFfn { n_experts, width, .. } = *moe;
    let (shape, param) = ([n_experts, 2 * width], format!("{ours}.gate_up_bias"));
    let mut all = Vec::new();
    for expert in 0..n_experts {
        for (row, first) in [(2 * expert, 0), (2 * expert + 1, up)] {
            let view = View { first: expert * 2 * width + first, row_stride: width, col_stride };
            let map = TensorMap::whole(format!("{gate_up}_bias"), &shape, &param, row..row + 1);
            all.push(map.viewed(width, view));
        }
    }
    let param = format!("{ours}.down_bias");
    all.push(TensorMap::whole(format!("{down}_bias"), &[n_experts, hidden], param, 0..n_experts));
    all
}

/// The tensors of multi-head latent attention, as DeepSeek names them.
fn latent_tensors(config: &LatentConfig, hidden: usize, theirs: &str, ours: &str) -> Vec<TensorMap> {
    let LatentConfig { n_heads, q_rank, kv_rank, nope_dim, rope_dim, value_dim, .. } = *config;
    let mut all = Vec::new();
    let (query, inputs) = match q_rank {
        None => (format!("{theirs}.q_proj.weight"), hidden),
        Some(rank) => {
            all.push(matrix(&format!("{theirs}.q_a_proj"), &format!("{ours}.q_a"), rank, hidden));
            all.push(vector(&format!("{theirs}.q_a_layernorm.weight"), &format!("{ours}.q_norm"), rank));
            (format!("{theirs}.q_b_proj.weight"), rank)
        }
    };
    let head = nope_dim + rope_dim;
    for at in 0..n_heads {
        for (name, dims, first) in [("q_nope", nope_dim, 0), ("q_rope", rope_dim, nope_dim)] {
            let view = View { first: (at * head + first) * inputs, row_stride: inputs, col_stride: 1 };
            let map = TensorMap::whole(
                &query,
                &[n_heads * head, inputs],
                format!("{ours}.{name}"),
                at * dims..(at + 1) * dims,
            );
            all.push(map.viewed(inputs, view));
        }
    }
    let latent = format!("{theirs}.kv_a_proj_with_mqa.weight");
    for (name, rows, first) in [("kv_a", kv_rank, 0), ("k_rope", rope_dim, kv_rank)] {
        let view = View { first: first * hidden, row_stride: hidden, col_stride: 1 };
        let map = TensorMap::whole(&latent, &[kv_rank + rope_dim, hidden], format!("{ours}.{name}"), 0..rows);
        all.push(map.viewed(hidden, view));
    }
    all.push(vector(&format!("{theirs}.kv_a_layernorm.weight"), &format!("{ours}.kv_norm"), kv_rank));
    let (up, shape) = (format!("{theirs}.kv_b_proj.weight"), [n_heads * (nope_dim + value_dim), kv_rank]);
    for at in 0..n_heads {
        let first = at * (nope_dim + value_dim) * kv_rank;
        let keys = View { first, row_stride: 1, col_stride: kv_rank };
        let map = TensorMap::whole(&up, &shape, format!("{ours}.k_up"), at * kv_rank..(at + 1) * kv_rank);
        all.push(map.viewed(nope_dim, keys));
        let values = View { first: first + nope_dim * kv_rank, row_stride: kv_rank, col_stride: 1 };
        let map = TensorMap::whole(&up, &shape, format!("{ours}.v_up"), at * value_dim..(at + 1) * value_dim);
        all.push(map.viewed(kv_rank, values));
    }
    all.push(matrix(&format!("{theirs}.o_proj"), &format!("{ours}.o"), hidden, n_heads * value_dim));
    all
}

/// The tensors of a norm of the residual stream.
pub(crate) fn norm(config: &ModelConfig, theirs: &str, ours: &str) -> Vec<TensorMap> {
    let mut all = vec![vector(&format!("{theirs}.weight"), ours, config.hidden)];
    if matches!(config.norm, Norm::Layer { bias: true, .. }) {
        all.push(vector(&format!("{theirs}.bias"), &format!("{ours}_bias"), config.hidden));
    }
    all
}

/// The tensors of a gated network in Llama's naming.
pub(super) fn network(width: usize, hidden: usize, theirs: &str, ours: &str) -> Vec<TensorMap> {
    let gate_up = format!("{ours}.gate_up");
    vec![
        part(&format!("{theirs}.gate_proj"), &gate_up, 0, width, hidden),
        part(&format!("{theirs}.up_proj"), &gate_up, width, width, hidden),
        matrix(&format!("{theirs}.down_proj"), &format!("{ours}.down"), hidden, width),
    ]
}

/// A whole matrix.
pub(crate) fn matrix(theirs: &str, ours: &str, rows: usize, cols: usize) -> TensorMap {
    part(theirs, ours, 0, rows, cols)
}

/// `rows` rows of a (stack of) matrices, from row `first` on.
pub(crate) fn part(theirs: &str, ours: &str, first: usize, rows: usize, cols: usize) -> TensorMap {
    TensorMap::whole(format!("{theirs}.weight"), &[rows, cols], ours, first..first + rows)
}

/// A vector under its whole name.
pub(crate) fn vector(theirs: &str, ours: &str, len: usize) -> TensorMap {
    TensorMap::whole(theirs, &[len], ours, 0..1)
}
