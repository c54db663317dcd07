//! The tensors of a file: where it holds our weights.

use super::GgufFile;
use super::architecture::Architecture;
use crate::ModelConfig;
use crate::config::{AttentionConfig, Ffn, LatentConfig, Mixer, MoeFfn, RopePairs};
use crate::families::{TensorMap, View, matrix, norm, part, vector};

/// Ways in which files of one architecture differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Whether queries, keys and values are one tensor.
    joined: bool,
    /// Whether latents are expanded by one tensor for keys and one for values, those of keys transposed.
    split_latent: bool,
    /// Whether gate and up of all experts are one tensor.
    gate_up: bool,
    /// Whether each expert's matrices are tensors of their own, as in files of early 2024.
    experts_apart: bool,
}

impl Layout {
    /// That of a file.
    pub(super) fn of_file(file: &GgufFile) -> Self {
        let has = |part: &str| {
            // Dense layers come first.
            let ending = format!(".{part}.weight");
            file.tensors().any(|tensor| tensor.name.starts_with("blk.") && tensor.name.ends_with(&ending))
        };
        Self {
            joined: has("attn_qkv"),
            split_latent: has("attn_k_b"),
            gate_up: has("ffn_gate_up_exps"),
            experts_apart: has("ffn_gate.0"),
        }
    }

    /// The one that is written.
    pub(super) fn written(architecture: &Architecture) -> Self {
        Self { joined: architecture.joined, split_latent: true, gate_up: false, experts_apart: false }
    }
}

/// Every tensor of a model's file; what has no place in the architecture is missing.
pub(super) fn tensors(architecture: &Architecture, layout: Layout, config: &ModelConfig) -> Vec<TensorMap> {
    let naming = Naming { architecture, layout, hidden: config.hidden };
    let mut all = vec![matrix("token_embd", "embedding", config.vocab_size, config.hidden)];
    for (index, layer) in config.layers.iter().enumerate() {
        let (theirs, ours) = (format!("blk.{index}"), format!("layers.{index}"));
        let places = [
            ("attention_norm", config.norm_place.is_before()),
            ("attention_out_norm", config.norm_place.is_after()),
            ("ffn_norm", config.norm_place.is_before()),
            ("ffn_out_norm", config.norm_place.is_after()),
        ];
        for (name, (place, is_there)) in architecture.norms.iter().zip(places) {
            if is_there && !name.is_empty() {
                all.extend(norm(config, &format!("{theirs}.{name}"), &format!("{ours}.{place}")));
            }
        }
        all.extend(match &layer.mixer {
            Mixer::Attention(attention) => naming.attention(attention, &theirs, &format!("{ours}.attention")),
            Mixer::Latent(latent) => naming.latent(latent, &theirs, &format!("{ours}.attention")),
            _ => Vec::new(),
        });
        all.extend(match &layer.ffn {
            Ffn::Dense(dense) => naming.network(dense.width, &theirs, "", &format!("{ours}.mlp")),
            Ffn::Moe(moe) => naming.experts(moe, &theirs, &format!("{ours}.moe")),
        });
    }
    all.extend(norm(config, "output_norm", "final_norm"));
    if !config.tie_embeddings {
        all.push(matrix("output", "head", config.vocab_size, config.hidden));
    }
    if config.head_bias {
        all.push(vector("output.bias", "head_bias", config.vocab_size));
    }
    all
}

struct Naming<'a> {
    architecture: &'a Architecture,
    layout: Layout,
    hidden: usize,
}

impl Naming<'_> {
    /// Whether rows of heads must change their places for features that turn together.
    fn moves(&self, pairs: RopePairs) -> bool {
        self.architecture.interleaved && pairs == RopePairs::Halves
    }

    fn attention(&self, config: &AttentionConfig, theirs: &str, ours: &str) -> Vec<TensorMap> {
        let &AttentionConfig { n_heads, n_kv_heads, head_dim, .. } = config;
        let (queries, keys) = (n_heads * head_dim, n_kv_heads * head_dim);
        let turning = config.rope.as_ref().filter(|rope| self.moves(rope.pairs)).map_or(0, |rope| rope.dims);
        let mut all = Vec::new();
        let rows = [("q", queries, turning, 0), ("k", keys, turning, queries), ("v", keys, 0, queries + keys)];
        for (letter, rows, turning, first) in rows {
            let ours = format!("{ours}.{letter}");
            let whole = match self.layout.joined {
                false => matrix(&format!("{theirs}.attn_{letter}"), &ours, rows, self.hidden),
                true => {
                    let view = View { first: first * self.hidden, row_stride: self.hidden, col_stride: 1 };
                    let shape = [queries + 2 * keys, self.hidden];
                    TensorMap::whole(format!("{theirs}.attn_qkv.weight"), &shape, &ours, 0..rows)
                        .viewed(self.hidden, view)
                }
            };
            all.extend(interleaved(whole, head_dim, turning));
        }
        all.push(matrix(&format!("{theirs}.attn_output"), &format!("{ours}.o"), self.hidden, queries));
        // No family has biases of heads whose rows change their places.
        if config.qkv_bias && turning == 0 && !self.layout.joined {
            for (letter, width) in [("q", queries), ("k", keys), ("v", keys)] {
                all.push(vector(&format!("{theirs}.attn_{letter}.bias"), &format!("{ours}.{letter}_bias"), width));
            }
        }
        if config.o_bias {
            all.push(vector(&format!("{theirs}.attn_output.bias"), &format!("{ours}.o_bias"), self.hidden));
        }
        for (letter, heads) in [("q", n_heads), ("k", n_kv_heads)] {
            if let Some(width) = config.qk_norm.width(heads, head_dim).filter(|_| turning == 0) {
                all.push(vector(
                    &format!("{theirs}.attn_{letter}_norm.weight"),
                    &format!("{ours}.{letter}_norm"),
                    width,
                ));
            }
        }
        if config.sinks {
            all.push(vector(&format!("{theirs}.attn_sinks.weight"), &format!("{ours}.sinks"), n_heads));
        }
        all
    }

    fn latent(&self, config: &LatentConfig, theirs: &str, ours: &str) -> Vec<TensorMap> {
        let LatentConfig { n_heads, q_rank, kv_rank, nope_dim, rope_dim, value_dim, .. } = *config;
        let (hidden, turning) = (self.hidden, if self.moves(config.rope.pairs) { rope_dim } else { 0 });
        let (theirs_of, ours_of) =
            (|name: &str| format!("{theirs}.attn_{name}"), |name: &str| format!("{ours}.{name}"));
        let mut all = Vec::new();
        let (query, inputs) = match q_rank {
            None => (theirs_of("q.weight"), hidden),
            Some(rank) => {
                all.push(matrix(&theirs_of("q_a"), &ours_of("q_a"), rank, hidden));
                all.push(vector(&theirs_of("q_a_norm.weight"), &ours_of("q_norm"), rank));
                (theirs_of("q_b.weight"), rank)
            }
        };
        let head = nope_dim + rope_dim;
        let rows = |name: &str, shape: [usize; 2], ours: &str, rows: std::ops::Range<usize>, first: usize| {
            let view = View { first: first * shape[1], row_stride: shape[1], col_stride: 1 };
            TensorMap::whole(name, &shape, ours, rows).viewed(shape[1], view)
        };
        for at in 0..n_heads {
            let shape = [n_heads * head, inputs];
            let (still, turned) = (at * nope_dim..(at + 1) * nope_dim, at * rope_dim..(at + 1) * rope_dim);
            all.push(rows(&query, shape, &ours_of("q_nope"), still, at * head));
            let turned = rows(&query, shape, &ours_of("q_rope"), turned, at * head + nope_dim);
            all.extend(interleaved(turned, rope_dim, turning));
        }
        let (name, shape) = (theirs_of("kv_a_mqa.weight"), [kv_rank + rope_dim, hidden]);
        all.push(rows(&name, shape, &ours_of("kv_a"), 0..kv_rank, 0));
        all.extend(interleaved(rows(&name, shape, &ours_of("k_rope"), 0..rope_dim, kv_rank), rope_dim, turning));
        all.push(vector(&theirs_of("kv_a_norm.weight"), &ours_of("kv_norm"), kv_rank));
        all.extend(self.expansion(config, theirs, ours));
        all.push(matrix(&theirs_of("output"), &ours_of("o"), hidden, n_heads * value_dim));
        all
    }

    /// What makes keys and values of a latent.
    fn expansion(&self, config: &LatentConfig, theirs: &str, ours: &str) -> Vec<TensorMap> {
        let LatentConfig { n_heads, kv_rank, nope_dim, value_dim, .. } = *config;
        let (keys, values) = (format!("{ours}.k_up"), format!("{ours}.v_up"));
        if self.layout.split_latent {
            let whole = |name: &str, ours: String, rows: usize, cols: usize| {
                TensorMap::whole(format!("{theirs}.{name}.weight"), &[n_heads, rows, cols], ours, 0..n_heads * rows)
            };
            return vec![whole("attn_k_b", keys, kv_rank, nope_dim), whole("attn_v_b", values, value_dim, kv_rank)];
        }
        let (name, shape) = (format!("{theirs}.attn_kv_b.weight"), [n_heads * (nope_dim + value_dim), kv_rank]);
        let of_head = |at: usize| {
            let first = at * (nope_dim + value_dim) * kv_rank;
            let transposed = View { first, row_stride: 1, col_stride: kv_rank };
            let straight = View { first: first + nope_dim * kv_rank, row_stride: kv_rank, col_stride: 1 };
            let (key_rows, value_rows) = (at * kv_rank..(at + 1) * kv_rank, at * value_dim..(at + 1) * value_dim);
            [
                TensorMap::whole(&name, &shape, &keys, key_rows).viewed(nope_dim, transposed),
                TensorMap::whole(&name, &shape, &values, value_rows).viewed(kv_rank, straight),
            ]
        };
        (0..n_heads).flat_map(of_head).collect()
    }

    /// One gated network; `kind` is what its names end in.
    fn network(&self, width: usize, theirs: &str, kind: &str, ours: &str) -> Vec<TensorMap> {
        let gate_up = format!("{ours}.gate_up");
        vec![
            part(&format!("{theirs}.ffn_gate{kind}"), &gate_up, 0, width, self.hidden),
            part(&format!("{theirs}.ffn_up{kind}"), &gate_up, width, width, self.hidden),
            matrix(&format!("{theirs}.ffn_down{kind}"), &format!("{ours}.down"), self.hidden, width),
        ]
    }

    fn experts(&self, moe: &MoeFfn, theirs: &str, ours: &str) -> Vec<TensorMap> {
        let (hidden, MoeFfn { n_experts, width, .. }) = (self.hidden, *moe);
        let mut all = vec![matrix(&format!("{theirs}.ffn_gate_inp"), &format!("{ours}.router"), n_experts, hidden)];
        if moe.router.logit_bias {
            all.push(vector(&format!("{theirs}.ffn_gate_inp.bias"), &format!("{ours}.router_bias"), n_experts));
        }
        if moe.router.selection_bias {
            all.push(vector(&format!("{theirs}.exp_probs_b.bias"), &format!("{ours}.selection_bias"), n_experts));
        }
        all.extend(match self.layout.experts_apart {
            true => (0..n_experts).flat_map(|expert| self.expert(expert, width, theirs, ours)).collect(),
            false => self.bank(moe, theirs, ours),
        });
        if let Some(shared) = moe.shared {
            let ours = format!("{ours}.shared");
            all.extend(self.network(shared.width, theirs, "_shexp", &ours));
            if shared.gated {
                let gate = format!("{theirs}.ffn_gate_inp_shexp.weight");
                all.push(TensorMap::whole(gate, &[hidden], format!("{ours}.gate"), 0..1));
            }
        }
        all
    }

    /// The matrices of one expert, each a tensor.
    fn expert(&self, expert: usize, width: usize, theirs: &str, ours: &str) -> Vec<TensorMap> {
        let (hidden, gate_up) = (self.hidden, format!("{ours}.gate_up"));
        let first = 2 * expert * width;
        let down = TensorMap::whole(
            format!("{theirs}.ffn_down.{expert}.weight"),
            &[hidden, width],
            format!("{ours}.down"),
            expert * hidden..(expert + 1) * hidden,
        );
        vec![
            part(&format!("{theirs}.ffn_gate.{expert}"), &gate_up, first, width, hidden),
            part(&format!("{theirs}.ffn_up.{expert}"), &gate_up, first + width, width, hidden),
            down,
        ]
    }

    /// The matrices of all experts, one tensor of each kind.
    fn bank(&self, moe: &MoeFfn, theirs: &str, ours: &str) -> Vec<TensorMap> {
        let (hidden, MoeFfn { n_experts, width, .. }) = (self.hidden, *moe);
        let mut all = Vec::new();
        let (gate_up, down) = (format!("{ours}.gate_up"), format!("{ours}.down"));
        if self.layout.gate_up {
            let shape = [n_experts, 2 * width, hidden];
            let name = format!("{theirs}.ffn_gate_up_exps.weight");
            all.push(TensorMap::whole(name, &shape, &gate_up, 0..n_experts * 2 * width));
        } else {
            for (name, second) in [("gate", 0), ("up", 1)] {
                let name = format!("{theirs}.ffn_{name}_exps");
                for expert in 0..n_experts {
                    let first = (2 * expert + second) * width;
                    let view = View { first: expert * width * hidden, row_stride: hidden, col_stride: 1 };
                    let (shape, rows) = ([n_experts, width, hidden], first..first + width);
                    let weights = TensorMap::whole(format!("{name}.weight"), &shape, &gate_up, rows);
                    all.push(weights.viewed(hidden, view));
                    if moe.bias {
                        let row = 2 * expert + second;
                        let view = View { first: expert * width, row_stride: width, col_stride: 1 };
                        let (shape, ours) = ([n_experts, width], format!("{gate_up}_bias"));
                        let bias = TensorMap::whole(format!("{name}.bias"), &shape, ours, row..row + 1);
                        all.push(bias.viewed(width, view));
                    }
                }
            }
        }
        let shape = [n_experts, hidden, width];
        all.push(TensorMap::whole(format!("{theirs}.ffn_down_exps.weight"), &shape, &down, 0..n_experts * hidden));
        if moe.bias {
            let name = format!("{theirs}.ffn_down_exps.bias");
            all.push(TensorMap::whole(name, &[n_experts, hidden], format!("{down}_bias"), 0..n_experts));
        }
        all
    }
}

/// Rows of whole heads whose first `turning` rows stand in the file with the first and the second half in turns.
fn interleaved(map: TensorMap, head_dim: usize, turning: usize) -> Vec<TensorMap> {
    if turning == 0 {
        return vec![map];
    }
    let half = turning / 2;
    let of_head = |head: usize| {
        let (row, stride) = (map.rows.start + head * head_dim, map.view.row_stride);
        let first = map.view.first + head * head_dim * stride;
        let part = |row: usize, count: usize, first: usize, row_stride: usize| TensorMap {
            rows: row..row + count,
            view: View { first, row_stride, ..map.view },
            ..map.clone()
        };
        [
            part(row, half, first, 2 * stride),
            part(row + half, half, first + stride, 2 * stride),
            part(row + turning, head_dim - turning, first + turning * stride, stride),
        ]
    };
    (0..map.rows.len() / head_dim).flat_map(of_head).filter(|part| !part.rows.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_heads_stand_in_turns() {
        // Two heads of eight rows, six of which turn: in the file 0 3 1 4 2 5 6 7, then 8 more.
        let mut order = [0; 16];
        for map in interleaved(matrix("q", "q", 16, 2), 8, 6) {
            for row in 0..map.rows.len() {
                let place: Vec<usize> = map.places(row).collect();
                assert_eq!(place[1], place[0] + 1);
                order[place[0] / 2] = map.rows.start + row;
            }
        }
        assert_eq!(order, [0, 3, 1, 4, 2, 5, 6, 7, 8, 11, 9, 12, 10, 13, 14, 15]);
        assert_eq!(interleaved(matrix("q", "q", 16, 2), 8, 0), [matrix("q", "q", 16, 2)]);
    }
}
