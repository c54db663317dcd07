//! Times every operation outside the matrix products at the shapes of one training step of the small model (4096
//! tokens, hidden 256, 8 heads of 32, sequences of 256, top-2 experts of 512, vocabulary 4096), next to the plain loop,
//! and says how far it is from the memory's or the multiplier's limit, both measured in the same run.
//!
//! `cargo run --release -p moebius-kernels --example op_bench [threads]`; the last line is JSON.

use moebius_kernels::attention::{self, AttentionShape, Saved};
use moebius_kernels::gates::{self, Gate, GatedGradients, GatedSaved};
use moebius_kernels::gemm::Precision;
use moebius_kernels::isa::Isa;
use moebius_kernels::machine::{Operands, peak_operations};
use moebius_kernels::narrow::{Numbers, NumbersMut};
use moebius_kernels::{activation, loss, norm, optimizer, rope, select};
use std::time::{Duration, Instant};

const TOKENS: usize = 4096;
const HIDDEN: usize = 256;
const HEADS: usize = 8;
const SEQUENCE: usize = 256;
const ASSIGNMENTS: usize = 2 * TOKENS;
const EXPERT_WIDTH: usize = 512;
const VOCABULARY: usize = 4096;
const PARAMETERS: usize = 8 << 20;

/// What bounds an operation.
enum Limit {
    /// Bytes read and written at least.
    Memory(usize),
    /// Floating-point operations.
    Compute(usize),
}

struct Row {
    name: &'static str,
    milliseconds: f64,
    naive_milliseconds: f64,
    rate: f64,
    share: f64,
    worst_difference: f32,
}

struct Bench {
    /// bytes/s
    bandwidth: f64,
    /// f32 operations/s
    peak: f64,
    rows: Vec<Row>,
}

fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(3_037_000_493);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// The median of seven runs after one to warm up, in seconds.
fn time(mut run: impl FnMut()) -> f64 {
    run();
    let mut times: Vec<f64> = (0..7)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

impl Bench {
    /// Runs `fast` and `naive` on copies of the same `state` once to compare the results, then times both.
    fn add<const RESULTS: usize>(
        &mut self,
        name: &'static str,
        limit: Limit,
        state: [Vec<f32>; RESULTS],
        mut fast: impl FnMut(&mut [Vec<f32>; RESULTS]),
        mut naive: impl FnMut(&mut [Vec<f32>; RESULTS]),
    ) {
        let (mut found, mut wanted) = (state.clone(), state);
        fast(&mut found);
        let start = Instant::now();
        naive(&mut wanted);
        let naive_seconds = start.elapsed().as_secs_f64();
        let pairs = found.iter().flatten().zip(wanted.iter().flatten());
        let worst_difference = pairs.map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max);
        assert!(worst_difference < 1e-4, "{name} is wrong by {worst_difference}");
        let seconds = time(|| fast(&mut found));
        let (rate, share) = match limit {
            Limit::Memory(bytes) => (bytes as f64 / seconds / 1e9, bytes as f64 / seconds / self.bandwidth),
            Limit::Compute(operations) => (operations as f64 / seconds / 1e9, operations as f64 / seconds / self.peak),
        };
        let unit = if matches!(limit, Limit::Memory(_)) { "GB/s" } else { "GFLOP/s" };
        println!(
            "{name:34} {:8.3} ms  {rate:7.1} {unit:7} {:4.0} % of the limit   plain loop {:8.2} ms   off by {worst_difference:.0e}",
            seconds * 1e3,
            share * 100.0,
            naive_seconds * 1e3,
        );
        let (milliseconds, naive_milliseconds) = (seconds * 1e3, naive_seconds * 1e3);
        self.rows.push(Row { name, milliseconds, naive_milliseconds, rate, share, worst_difference });
    }
}

/// Bytes a second of `a += b` over 256 MiB.
fn measure_bandwidth() -> f64 {
    let (mut a, b) = (vec![1.0f32; 32 << 20], vec![1.0f32; 32 << 20]);
    3.0 * 4.0 * a.len() as f64 / time(|| select::add_assign(&mut a, &b))
}

fn norms_and_activations(bench: &mut Bench) {
    let (n, m) = (TOKENS * HIDDEN, ASSIGNMENTS * EXPERT_WIDTH);
    let (x, weight, dy) = (numbers(1, n), numbers(2, HIDDEN), numbers(3, n));
    bench.add(
        "rms_norm",
        Limit::Memory(8 * n),
        [vec![0.0; n], vec![0.0; TOKENS]],
        |[y, inv]| norm::rms_norm(&x, &weight, 1e-5, y, inv),
        |[y, inv]| norm::rms_norm_reference(&x, &weight, 1e-5, y, inv),
    );
    let (mut y, mut inv) = (vec![0.0; n], vec![0.0; TOKENS]);
    norm::rms_norm(&x, &weight, 1e-5, &mut y, &mut inv);
    bench.add(
        "rms_norm_backward",
        Limit::Memory(16 * n),
        [vec![0.0; n], vec![0.0; HIDDEN]],
        |[dx, dweight]| norm::rms_norm_backward(&dy, &x, &weight, &inv, dx, dweight),
        |[dx, dweight]| norm::rms_norm_backward_reference(&dy, &x, &weight, &inv, dx, dweight),
    );
    let (gate_up, dout) = (numbers(4, 2 * m), numbers(5, m));
    let gate = Gate::Silu;
    bench.add(
        "swiglu",
        Limit::Memory(12 * m),
        [vec![0.0; m]],
        |[out]| gates::gated(gate, &gate_up, EXPERT_WIDTH, out),
        |[out]| out.copy_from_slice(&gates::gated_reference(gate, &gate_up, EXPERT_WIDTH, &dout)[0]),
    );
    let saved = GatedSaved { gate, f: EXPERT_WIDTH, gate_up: Numbers::F32(&gate_up), factors: None, dropout: None };
    bench.add(
        "swiglu_backward",
        Limit::Memory(20 * m),
        [vec![0.0; 2 * m]],
        |[dgate_up]| {
            let dgate_up = NumbersMut::F32(dgate_up);
            gates::gated_backward(&saved, &dout, GatedGradients { dgate_up, out: None, dfactors: None });
        },
        |[dgate_up]| dgate_up.copy_from_slice(&gates::gated_reference(gate, &gate_up, EXPERT_WIDTH, &dout)[1]),
    );
    bench.add(
        "softmax_rows (8 experts)",
        Limit::Memory(8 * TOKENS * 8),
        [numbers(6, TOKENS * 8)],
        |[x]| activation::softmax_rows(x, 8),
        |[x]| activation::softmax_rows_reference(x, 8),
    );
    let table = rope::RopeTable::new(10_000.0, HIDDEN / HEADS, SEQUENCE);
    let positions: Vec<u32> = (0..TOKENS).map(|token| (token % SEQUENCE) as u32).collect();
    bench.add(
        "rope",
        Limit::Memory(8 * n),
        [x.clone()],
        |[x]| rope::rope(x, HEADS, HIDDEN / HEADS, &positions, &table, false),
        |[x]| rope::rope_reference(x, HEADS, HIDDEN / HEADS, &positions, &table, false),
    );
}

fn losses(bench: &mut Bench) {
    // As many rows as the model's head makes at once, four chunks a step.
    let rows = TOKENS / 4;
    let n = rows * VOCABULARY;
    let logits: Vec<f32> = numbers(1, n).iter().map(|x| 8.0 * x).collect();
    let targets: Vec<u32> = (0..rows).map(|row| (row * 31 % VOCABULARY) as u32).collect();
    bench.add(
        "cross_entropy (1024 rows)",
        Limit::Memory(4 * n),
        [vec![0.0; rows]],
        |[losses]| loss::cross_entropy_rows(&logits, &targets, losses),
        |[losses]| loss::cross_entropy_rows_reference(&logits, &targets, losses),
    );
    bench.add(
        "cross_entropy and gradient (1024)",
        Limit::Memory(8 * n),
        [logits.clone(), vec![0.0; rows]],
        |[logits, losses]| loss::cross_entropy_rows_with_gradient(logits, &targets, losses, 0.1, None),
        |[logits, losses]| {
            loss::cross_entropy_rows_reference(logits, &targets, losses);
            loss::cross_entropy_rows_backward_reference(logits, &targets, 0.1);
        },
    );
}

fn rows_of_experts(bench: &mut Bench) {
    let (n, m) = (TOKENS * HIDDEN, ASSIGNMENTS * HIDDEN);
    // Token t goes to rows t and TOKENS + (its mirror).
    let offsets: Vec<usize> = (0..=TOKENS).map(|token| 2 * token).collect();
    let rows: Vec<u32> = (0..TOKENS as u32).flat_map(|token| [token, 2 * TOKENS as u32 - 1 - token]).collect();
    let mut token_of_row = vec![0u32; ASSIGNMENTS];
    rows.iter().enumerate().for_each(|(i, &row)| token_of_row[row as usize] = i as u32 / 2);
    let (x, source, weights) = (numbers(1, n), numbers(2, m), numbers(3, ASSIGNMENTS));
    bench.add(
        "gather_rows",
        Limit::Memory(8 * m),
        [vec![0.0; m]],
        |[out]| select::gather_rows(&x, HIDDEN, &token_of_row, out),
        |[out]| {
            for (out, &row) in out.chunks_exact_mut(HIDDEN).zip(&token_of_row) {
                out.copy_from_slice(&x[row as usize * HIDDEN..][..HIDDEN]);
            }
        },
    );
    bench.add(
        "scatter_weighted",
        Limit::Memory(4 * (m + n)),
        [vec![0.0; n]],
        |[out]| select::scatter_weighted(&source, HIDDEN, &offsets, &rows, &weights, out),
        |[out]| select::scatter_weighted_reference(&source, HIDDEN, &offsets, &rows, &weights, out),
    );
    let ids: Vec<u32> = (0..TOKENS).map(|token| (token * token * 31 % VOCABULARY) as u32).collect();
    bench.add(
        "embedding_backward",
        Limit::Memory(12 * n),
        [vec![0.0; VOCABULARY * HIDDEN]],
        |[dtable]| select::embedding_backward(&x, HIDDEN, &ids, dtable),
        |[dtable]| select::embedding_backward_reference(&x, HIDDEN, &ids, dtable),
    );
}

fn parameters(bench: &mut Bench) {
    let n = PARAMETERS;
    let (grad, settings) = (
        numbers(1, n),
        optimizer::AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 5, grad_scale: 0.5 },
    );
    bench.add(
        "adamw (8 Mi parameters)",
        Limit::Memory(28 * n),
        [numbers(2, n), numbers(3, n), vec![0.1; n]],
        |[param, m, v]| optimizer::adamw(param, &grad, m, v, &settings),
        |[param, m, v]| optimizer::adamw_reference(param, &grad, m, v, &settings),
    );
    bench.add(
        "sum_squares (8 Mi)",
        Limit::Memory(4 * n),
        [vec![0.0]],
        |[sum]| sum[0] = select::sum_squares(&grad) as f32,
        |[sum]| sum[0] = grad.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() as f32,
    );
}

/// Multiply-adds of all pairs that see each other.
fn attention_pairs(length: usize) -> usize {
    length * (length + 1) / 2
}

fn attentions(bench: &mut Bench, names: [&'static str; 2], heads: [usize; 3], length: usize, tokens: usize) {
    let [n_heads, _, head_dim] = heads;
    let shape = AttentionShape::grouped(heads, 1.0 / (head_dim as f32).sqrt());
    let starts: Vec<usize> = (0..=tokens / length).map(|i| i * length).collect();
    let (n, m) = (tokens * shape.query_width(), tokens * shape.key_width());
    let (q, k, v, dout) = (numbers(1, n), numbers(2, m), numbers(3, m), numbers(4, n));
    let operations = 4 * tokens / length * attention_pairs(length) * shape.query_width();
    bench.add(
        names[0],
        Limit::Compute(operations),
        [vec![0.0; n], vec![0.0; n_heads * tokens]],
        |[out, lse]| attention::attention_forward(&shape, [&q, &k, &v], None, &starts, out, lse),
        |[out, lse]| attention::attention_reference(&shape, [&q, &k, &v], None, &starts, out, lse),
    );
    let (mut out, mut lse) = (vec![0.0; n], vec![0.0; n_heads * tokens]);
    attention::attention_forward(&shape, [&q, &k, &v], None, &starts, &mut out, &mut lse);
    let saved = Saved { q: &q, k: &k, v: &v, sequence_starts: &starts, out: &out, lse: &lse };
    bench.add(
        names[1],
        Limit::Compute(operations / 2 * 5),
        [vec![0.0; n], vec![0.0; m], vec![0.0; m]],
        |[dq, dk, dv]| attention::attention_backward(&shape, &saved, Precision::F32, &dout, [dq, dk, dv]),
        |[dq, dk, dv]| attention::attention_backward_reference(&shape, &saved, None, &dout, [dq, dk, dv]),
    );
}

fn decoding(bench: &mut Bench) {
    let shape = AttentionShape::grouped([32, 8, 128], 0.1);
    let positions = 2048;
    let n = positions * shape.key_width();
    let (q, keys, values) = (numbers(1, shape.query_width()), numbers(2, n), numbers(3, n));
    let mut cache = attention::LayerCache::new(8, 128, attention::CacheFormat::F32);
    cache.push(&keys, &values);
    let sequence = [attention::CachedSequence { rows: 1, cache: attention::Cached::KeysValues(&cache) }];
    bench.add(
        "attention_cached (1 row of 2048)",
        Limit::Memory(8 * n),
        [vec![0.0; q.len()]],
        |[out]| attention::attention_cached(&shape, &q, None, &sequence, out),
        |[out]| attention::attention_cached_reference(&shape, &q, positions - 1, &keys, &values, out),
    );
}

fn main() {
    let threads = std::env::args().nth(1).map_or(2, |n| n.parse().expect("the number of threads"));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    pool.install(|| {
        let peak = peak_operations(Isa::current(), Operands::F32, Duration::from_millis(200));
        let mut bench = Bench { bandwidth: measure_bandwidth(), peak, rows: Vec::new() };
        println!(
            "{:?}, {threads} threads, memory {:.1} GB/s, f32 {:.0} GFLOP/s",
            Isa::current(),
            bench.bandwidth / 1e9,
            bench.peak / 1e9
        );
        norms_and_activations(&mut bench);
        losses(&mut bench);
        rows_of_experts(&mut bench);
        parameters(&mut bench);
        let heads = [HEADS, HEADS, HIDDEN / HEADS];
        attentions(&mut bench, ["attention (256 tokens, 8 x 32)", "attention_backward"], heads, SEQUENCE, TOKENS);
        attentions(&mut bench, ["attention (1024, 8 on 2 x 128)", "attention_backward"], [8, 2, 128], 1024, 1024);
        decoding(&mut bench);
        let rows: Vec<String> = bench
            .rows
            .iter()
            .map(|row| {
                format!(
                    "{{\"name\":\"{}\",\"ms\":{:.4},\"plain_ms\":{:.3},\"giga_per_s\":{:.2},\"share\":{:.3},\"off\":{:e}}}",
                    row.name, row.milliseconds, row.naive_milliseconds, row.rate, row.share, row.worst_difference
                )
            })
            .collect();
        println!("[{}]", rows.join(","));
    });
}
