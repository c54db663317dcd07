//! Results and gradients of every operation are the same bits on one, two and three threads, and a row's result does not
//! depend on the rows beside it. The sizes are large enough for the kernels to share their work among threads.

use moebius_kernels::attention::AttentionShape;
use moebius_kernels::gemm::Precision;
use moebius_kernels::rope::RopeTable;
use moebius_tensor::{Gradients, Graph, Param, Rng, Tensor, TensorError, Var, ops};
use moebius_testkit::{same_bits, same_bits_on_any_threads};
use std::sync::Arc;

const TOKENS: usize = 613;
const HIDDEN: usize = 72;
const HEAD: usize = 12;
const VOCAB: usize = 301;
/// Queries have six heads, keys and values three.
const ATTENTION: AttentionShape = AttentionShape { window: Some(150), ..AttentionShape::grouped([6, 3, HEAD], 0.3) };
const STARTS: [usize; 5] = [0, 1, 200, 200, TOKENS];

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut data = vec![0.0; shape.iter().product()];
    Rng::new(seed).fill_normal(&mut data, 0.5);
    Tensor::new(shape, data)
}

fn ids() -> Vec<u32> {
    (0..TOKENS as u32).map(|i| i * i * 31 % VOCAB as u32).collect()
}

fn positions() -> Vec<u32> {
    STARTS.windows(2).flat_map(|bounds| 0..(bounds[1] - bounds[0]) as u32).collect()
}

struct Network {
    embedding: Param,
    norm: Param,
    queries: Param,
    keys: Param,
    values: Param,
    output: Param,
    gate_up: Param,
    down: Param,
    rope: Arc<RopeTable>,
}

impl Network {
    fn new() -> Self {
        let param = |id: usize, shape: &[usize]| Param::new(id, format!("w{id}"), random(shape, id as u64));
        Self {
            embedding: param(0, &[VOCAB, HIDDEN]),
            norm: param(1, &[HIDDEN]),
            queries: param(2, &[6 * HEAD, HIDDEN]),
            keys: param(3, &[3 * HEAD, HIDDEN]),
            values: param(4, &[3 * HEAD, HIDDEN]),
            output: param(5, &[HIDDEN, 6 * HEAD]),
            gate_up: param(6, &[2 * 50, HIDDEN]),
            down: param(7, &[HIDDEN, 50]),
            rope: Arc::new(RopeTable::new(1e4, HEAD, TOKENS)),
        }
    }

    /// Attention, then a feed-forward network, each with a norm before and a residual around it.
    fn layer<'p>(&'p self, g: &Graph<'p>, x: &Var) -> Result<Var, TensorError> {
        let normed = ops::rms_norm(g, x, &self.norm, 1e-5)?;
        let [q, k, v] = [&self.queries, &self.keys, &self.values].map(|weight| ops::linear(g, &normed, weight));
        let rotated = |x: Var, heads| ops::rope(g, x, heads, HEAD, &positions(), &self.rope);
        let mixed = ops::attention(g, &rotated(q?, 6)?, &rotated(k?, 3)?, &v?, &ATTENTION, &STARTS)?;
        let x = ops::add(g, x, ops::linear(g, &mixed, &self.output)?)?;
        let inner = ops::swiglu(g, &ops::linear_f32(g, &ops::rms_norm(g, &x, &self.norm, 1e-5)?, &self.gate_up)?)?;
        ops::add(g, &x, ops::scale(g, &ops::linear(g, &inner, &self.down)?, 0.7))
    }

    /// The loss, the hidden states, all gradients and their norm.
    fn train(&self, precision: Precision, recompute: bool) -> Vec<(String, Vec<f32>)> {
        let (g, mut gradients) = (Graph::training(precision), Gradients::new());
        let x = ops::embedding(&g, &ids(), &self.embedding).unwrap();
        let y = if recompute {
            g.checkpoint(&x, |g, x| self.layer(g, x).map(|y| vec![y])).unwrap().remove(0)
        } else {
            self.layer(&g, &x).unwrap()
        };
        // The table is the head as well: its gradient has two sources.
        let fused = ops::linear_cross_entropy(&g, &y, &self.embedding, &ids()).unwrap();
        let plain = ops::cross_entropy(&g, &y, &vec![3; TOKENS]).unwrap();
        let loss = ops::weighted_sum(&g, &[(1.0, &fused), (0.3, &plain)]);
        let mut found = vec![("hidden".into(), y.data().to_vec()), ("loss".into(), loss.data().to_vec())];
        g.backward(&loss, &mut gradients);
        found.extend((0..8).map(|id| (format!("gradient {id}"), gradients.get(id).unwrap().to_vec())));
        let norm = gradients.norm();
        gradients.scale((1.0 / norm) as f32);
        found.push(("norm".into(), vec![norm as f32, gradients.norm() as f32]));
        found
    }
}

#[test]
fn nothing_depends_on_threads_or_recomputation() {
    let network = Network::new();
    for precision in [Precision::F32, Precision::Bf16] {
        let kept = same_bits_on_any_threads(|| network.train(precision, false));
        for (name, numbers) in &kept {
            assert!(numbers.iter().all(|x| x.is_finite()) && numbers.iter().any(|&x| x != 0.0), "{name}");
        }
        for ((name, wanted), (_, found)) in kept.iter().zip(network.train(precision, true)) {
            same_bits(&format!("{name} recomputed"), &found, wanted);
        }
    }
}

#[test]
fn a_second_step_in_kept_memory_gives_the_same_bits() {
    let network = Network::new();
    let mut gradients = Gradients::new();
    let mut step = || {
        gradients.clear();
        let g = Graph::training(Precision::Bf16);
        let x = ops::embedding(&g, &ids(), &network.embedding).unwrap();
        let y = network.layer(&g, &x).unwrap();
        let loss = ops::linear_cross_entropy(&g, &y, &network.embedding, &ids()).unwrap();
        g.backward(&loss, &mut gradients);
        (0..8).map(|id| gradients.get(id).unwrap().to_vec()).collect::<Vec<_>>()
    };
    let first = step();
    for (id, (found, wanted)) in step().iter().zip(&first).enumerate() {
        same_bits(&format!("gradient {id}"), found, wanted);
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let network = Network::new();
    let x = random(&[TOKENS, HIDDEN], 20);
    for precision in [Precision::F32, Precision::Bf16] {
        let run = |rows: std::ops::Range<usize>| {
            let g = Graph::inference(precision);
            let part = x.data()[rows.start * HIDDEN..rows.end * HIDDEN].to_vec();
            let part = Var::constant(Tensor::new(&[rows.len(), HIDDEN], part));
            let normed = ops::rms_norm(&g, &part, &network.norm, 1e-5).unwrap();
            let inner = ops::swiglu(&g, &ops::linear(&g, &normed, &network.gate_up).unwrap()).unwrap();
            ops::linear_f32(&g, &inner, &network.down).unwrap().data().to_vec()
        };
        let whole = run(0..TOKENS);
        for cuts in [&[0, 1, 16, 17, 150, TOKENS][..], &[0, 300, TOKENS]] {
            let parts: Vec<f32> = cuts.windows(2).flat_map(|cut| run(cut[0]..cut[1])).collect();
            same_bits("in parts", &parts, &whole);
        }
        for row in (0..TOKENS).step_by(41) {
            same_bits("alone", &run(row..row + 1), &whole[row * HIDDEN..(row + 1) * HIDDEN]);
        }
    }
}
