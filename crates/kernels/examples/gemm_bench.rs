//! Times the matrix products in the shapes that matter, verifies each answer, and says what share of the processor's
//! measured peak is reached. The last line is JSON.
//!
//!     cargo run --release -p moebius-kernels --example gemm_bench -- [--threads N] [--only TEXT] [--seconds S]
//!
//! Products are timed as training and inference meet them: the left operand is packed within the time, the right one
//! before it (weights) or within it (weight gradients). `MOEBIUS_ISA` chooses the instruction set. A shared machine
//! disturbs; the best of many short repeats is taken, and the peak is measured the same way.

use std::hint::black_box;
use std::time::{Duration, Instant};

use moebius_kernels::gemm::{
    Beta, Mat, Packed, Precision, grouped_matmul, grouped_matmul_weight_gradient, matmul, matmul_packed,
};
use moebius_kernels::isa::Isa;
use moebius_kernels::machine::{Operands, peak_operations};
use moebius_kernels::memory::Buffer;

fn main() {
    let options = Options::read();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build().expect("a thread pool");
    pool.install(|| run(&options));
}

struct Options {
    threads: usize,
    only: String,
    time: Duration,
}

impl Options {
    fn read() -> Self {
        let arguments: Vec<String> = std::env::args().collect();
        let value = |name: &str| arguments.iter().position(|a| a == name).and_then(|at| arguments.get(at + 1)).cloned();
        let threads = value("--threads").map_or(rayon::current_num_threads(), |v| v.parse().expect("--threads N"));
        let seconds: f64 = value("--seconds").map_or(0.3, |v| v.parse().expect("--seconds S"));
        Self { threads, only: value("--only").unwrap_or_default(), time: Duration::from_secs_f64(seconds) }
    }
}

fn run(options: &Options) {
    let isa = Isa::current();
    println!("{isa}, {} threads; each line is the best of what fits into {:?}", options.threads, options.time);
    let mut json = Vec::new();
    for (precision, operands) in [(Precision::Bf16, Operands::Bf16), (Precision::F32, Operands::F32)] {
        let peak = peak_operations(isa, operands, options.time);
        println!("\n{precision:?}: peak {:.0} GFLOP/s", peak / 1e9);
        for case in cases() {
            if !format!("{precision:?} {}", case.name()).contains(&options.only) {
                continue;
            }
            let seconds = case.measure(precision, options.time);
            let rate = case.flops() / seconds;
            let bytes = case.weight_bytes(precision) / seconds;
            println!(
                "{:<44} {:>9.1} us {:>8.1} GFLOP/s {:>5.1} % of peak, weights {:>6.1} GB/s",
                case.name(),
                seconds * 1e6,
                rate / 1e9,
                rate / peak * 100.0,
                bytes / 1e9
            );
            json.push(format!(
                r#"{{"precision":"{precision:?}","case":"{}","seconds":{seconds:e},"gflops":{:.1},"share_of_peak":{:.3},"weight_gb_per_s":{:.2}}}"#,
                case.name(), rate / 1e9, rate / peak, bytes / 1e9
            ));
        }
    }
    if "packing".contains(&options.only) {
        json.extend(measure_packing(options.time));
    }
    println!("{{\"isa\":\"{isa}\",\"threads\":{},\"results\":[{}]}}", options.threads, json.join(","));
}

/// What is multiplied in a case.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// `x Wᵀ`, the weight packed before.
    Forward,
    /// `dy W`, the weight packed before.
    InputGradient,
    /// `dyᵀ x`, both packed within the time.
    WeightGradient,
}

struct Case {
    kind: Kind,
    what: &'static str,
    groups: usize,
    rows: usize,
    inputs: usize,
    outputs: usize,
}

/// The small MoE of the peers' training table (hidden 256, 8 experts top-2 of 512, vocabulary 4096, 4096 tokens a step),
/// a large square layer, and decoding.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Kind::Forward, Kind::InputGradient, Kind::WeightGradient] {
        let mut case =
            |what, groups, rows, inputs, outputs| cases.push(Case { kind, what, groups, rows, inputs, outputs });
        case("attention", 1, 4096, 256, 256);
        case("experts gate_up", 8, 8192, 256, 1024);
        case("experts down", 8, 8192, 512, 256);
        case("head", 1, 512, 256, 4096);
        case("large", 1, 512, 2048, 2048);
    }
    let mut decode =
        |what, rows, inputs, outputs| cases.push(Case { kind: Kind::Forward, what, groups: 1, rows, inputs, outputs });
    decode("decode small", 1, 256, 1024);
    decode("decode large", 1, 2048, 16384);
    decode("decode 4 rows", 4, 2048, 16384);
    decode("decode 16 rows", 16, 2048, 16384);
    cases
}

impl Case {
    fn name(&self) -> String {
        let kind = match self.kind {
            Kind::Forward => "forward",
            Kind::InputGradient => "dX",
            Kind::WeightGradient => "dW",
        };
        let groups = if self.groups > 1 { format!("{} of ", self.groups) } else { String::new() };
        format!("{kind} {} {groups}[{}, {}] -> {}", self.what, self.rows / self.groups, self.inputs, self.outputs)
    }

    fn flops(&self) -> f64 {
        2.0 * (self.rows * self.inputs * self.outputs) as f64
    }

    fn weight_bytes(&self, precision: Precision) -> f64 {
        let element = if precision == Precision::Bf16 { 2 } else { 4 };
        (self.groups * self.inputs * self.outputs * element) as f64
    }

    fn measure(&self, precision: Precision, time: Duration) -> f64 {
        let &Self { kind, groups, rows, inputs, outputs, .. } = self;
        let offsets: Vec<usize> = (0..=groups).map(|g| g * rows / groups).collect();
        let (x, dy) = (numbers(rows * inputs, 1), numbers(rows * outputs, 2));
        let (x, dy) = (Mat::new(&x, rows, inputs), Mat::new(&dy, rows, outputs));
        let w = numbers(groups * inputs * outputs, 3);
        let weight = |g: usize| Mat::new(&w[g * inputs * outputs..(g + 1) * inputs * outputs], outputs, inputs);
        if kind == Kind::WeightGradient {
            let mut dw = Buffer::zeroed(w.len());
            let seconds = best(time, || {
                if groups == 1 {
                    matmul(precision, dy.t(), x, &mut dw, Beta::Overwrite);
                } else {
                    grouped_matmul_weight_gradient(precision, dy, x, &offsets, &mut dw, Beta::Overwrite);
                }
            });
            let last = offsets[groups - 1]..rows;
            let part = &dw[(groups - 1) * inputs * outputs..];
            verify(precision, dy.row_range(last.clone()).t(), x.row_range(last), part);
            return seconds;
        }
        let oriented = |g: usize| if kind == Kind::Forward { weight(g).t() } else { weight(g) };
        let packed = Packed::pack_many(precision, &(0..groups).map(oriented).collect::<Vec<_>>());
        let a = if kind == Kind::Forward { x } else { dy };
        let n = packed[0].n();
        let mut c = Buffer::zeroed(rows * n);
        let seconds = best(time, || {
            if groups == 1 {
                matmul_packed(a, &packed[0], &mut c, Beta::Overwrite);
            } else {
                grouped_matmul(a, &offsets, &packed, &mut c, Beta::Overwrite);
            }
        });
        let last = offsets[groups - 1]..rows;
        verify(precision, a.row_range(last.clone()), oriented(groups - 1), &c[last.start * n..]);
        seconds
    }
}

/// Packing all weights of a small model, in both orientations.
fn measure_packing(time: Duration) -> Vec<String> {
    let mut json = Vec::new();
    println!("\npacking 16 weights [1024, 1024]; bytes are those read and written");
    let (rows, cols, count) = (1024, 1024, 16);
    let w = numbers(count * rows * cols, 4);
    let weights: Vec<Mat> = w.chunks_exact(rows * cols).map(|w| Mat::new(w, rows, cols)).collect();
    let transposed: Vec<Mat> = weights.iter().map(|w| w.t()).collect();
    for precision in [Precision::Bf16, Precision::F32] {
        for (name, operands) in [("as stored", &weights), ("transposed", &transposed)] {
            let mut bytes = size_of_val::<[f32]>(&w);
            let seconds = best(time, || {
                let packed = black_box(Packed::pack_many(precision, operands));
                bytes = size_of_val::<[f32]>(&w) + packed.iter().map(Packed::bytes).sum::<usize>();
            });
            let rate = bytes as f64 / seconds;
            println!("{precision:?} {name:<12} {:>9.1} us {:>6.1} GB/s", seconds * 1e6, rate / 1e9);
            let case = format!("pack {name}");
            json.push(format!(
                r#"{{"precision":"{precision:?}","case":"{case}","seconds":{seconds:e},"gb_per_s":{:.2}}}"#,
                rate / 1e9
            ));
        }
    }
    let mut copy = Buffer::<f32>::zeroed(w.len());
    let seconds = best(time, || copy.copy_from_slice(black_box(&w)));
    println!("one thread copying: {:.1} GB/s", 2.0 * size_of_val::<[f32]>(&w) as f64 / seconds / 1e9);
    json
}

/// The shortest of the repeats that fit into `time`, at least three.
fn best(time: Duration, mut body: impl FnMut()) -> f64 {
    body();
    let (start, mut shortest, mut repeats) = (Instant::now(), f64::INFINITY, 0);
    while repeats < 3 || start.elapsed() < time {
        let before = Instant::now();
        body();
        shortest = shortest.min(before.elapsed().as_secs_f64());
        repeats += 1;
    }
    shortest
}

/// Numbers in -1..1 that look random and are whole multiples of 1/128: bf16 holds them, and small sums are exact.
fn numbers(len: usize, seed: u32) -> Buffer<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as f32 / 128.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Compares some elements of `c = a b` with sums in f64.
fn verify(precision: Precision, a: Mat, b: Mat, c: &[f32]) {
    for sample in 0..64 {
        let (row, column) = (sample * 7919 % a.rows(), sample * 104_729 % b.cols());
        let wanted: f64 = (0..a.cols()).map(|k| f64::from(a.at(row, k)) * f64::from(b.at(k, column))).sum();
        let found = f64::from(c[row * b.cols() + column]);
        let tolerance = 1e-5 * (a.cols() as f64).sqrt();
        assert!((found - wanted).abs() < tolerance, "{precision:?} ({row}, {column}): {found}, wanted {wanted}");
    }
}
