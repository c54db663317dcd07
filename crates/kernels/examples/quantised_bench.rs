//! Speed of the products with block formats, beside how fast memory streams.
//!
//!     cargo run --release -p moebius-kernels --example quantised_bench [-- ROUNDS [FORMAT]]
//!
//! Decoding multiplies one row with far more weights than the caches hold, up to five with an expert's (16 sequences of a
//! model with 64 experts, 8 a token) or 16 with a shared matrix's; prefill multiplies 512 rows, 64 rows an expert, as in
//! OLMoE-1B-7B's layers. Each figure is the best of the rounds; every answer is compared with that of plain loops first.

use std::hint::black_box;
use std::time::{Duration, Instant};

use moebius_kernels::formats::Format;
use moebius_kernels::isa::{Isa, with_isa};
use moebius_kernels::machine::read_bandwidth;
use moebius_kernels::parallel;
use moebius_kernels::quantised::{PACKED_FORMATS, QuantisedMatrix, grouped_quantised_matmul, quantised_matmul};

const HIDDEN: usize = 2048;
const EXPERT_ROWS: usize = 64;
const EXPERTS: usize = 64;
const ROWS: [usize; 7] = [1, 2, 3, 4, 5, 8, 16];
const STREAM_BYTES: usize = 1 << 29;
const STREAM_TIME: Duration = Duration::from_millis(100);

fn main() {
    let rounds = std::env::args().nth(1).map_or(5, |rounds| rounds.parse().expect("a number of rounds"));
    let named = |name: String| {
        let format = PACKED_FORMATS.into_iter().find(|format| format.name() == name);
        format.unwrap_or_else(|| panic!("{name}: wanted one of {:?}", PACKED_FORMATS.map(|format| format.name())))
    };
    let formats = std::env::args().nth(2).map_or(PACKED_FORMATS.to_vec(), |name| vec![named(name)]);
    println!("{} threads; GB/s of weights with so many rows; billion operations a second", parallel::threads());
    print!("{:10} {:8} {:>8}", "format", "isa", "stream");
    ROWS.iter().for_each(|rows| print!(" {:>8}", format!("{rows} rows")));
    println!(" {:>16}", "512 rows, GOP/s");
    for format in formats {
        let weights: Vec<QuantisedMatrix> = (0..EXPERTS).map(|seed| random(format, seed)).collect();
        for isa in Isa::available() {
            with_isa(isa, || {
                verify(&weights[0]);
                let rounds = if isa == Isa::Portable { 1 } else { rounds };
                print!(
                    "{:10} {:8} {:8.1}",
                    format.name(),
                    isa.to_string(),
                    read_bandwidth(STREAM_BYTES, STREAM_TIME) / 1e9
                );
                ROWS.iter().for_each(|&rows_each| print!(" {:8.1}", rate(rounds, &weights, rows_each)));
                let prefill = rate(rounds, &weights[..8], EXPERT_ROWS);
                let operations =
                    prefill * 2.0 * (HIDDEN * HIDDEN * EXPERT_ROWS) as f64 / weights[0].bytes().len() as f64;
                println!(" {operations:16.0}");
            });
        }
    }
}

/// GB of weights a second when every matrix has `rows` rows.
fn rate(rounds: usize, weights: &[QuantisedMatrix], rows: usize) -> f64 {
    // Eight matrices at a time, as the experts of a token.
    let x: Vec<f32> = (0..8 * rows * HIDDEN).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
    let offsets: Vec<usize> = (0..=8).map(|expert| expert * rows).collect();
    let mut y = vec![0.0; 8 * rows * HIDDEN];
    let bytes: usize = weights.iter().map(|weight| weight.bytes().len()).sum();
    let seconds = best(rounds, || {
        for experts in weights.chunks_exact(8) {
            grouped_quantised_matmul(&x, None, &offsets, experts, &mut y);
        }
    });
    black_box(&y);
    bytes as f64 / seconds / 1e9
}

fn best(rounds: usize, mut body: impl FnMut()) -> f64 {
    body();
    let time = |_| {
        let start = Instant::now();
        body();
        start.elapsed().as_secs_f64()
    };
    (0..rounds).map(time).fold(f64::INFINITY, f64::min)
}

fn random(format: Format, seed: usize) -> QuantisedMatrix {
    let blocks = HIDDEN * HIDDEN / format.block_len();
    let mut state = seed as u64 + 1;
    let mut source = vec![0u8; blocks * format.block_bytes()];
    for byte in &mut source {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Small positive f16 wherever the scale may be.
        *byte = (state >> 56) as u8 & 0x17;
    }
    QuantisedMatrix::pack(format, HIDDEN, HIDDEN, &source)
}

fn verify(weight: &QuantisedMatrix) {
    let x: Vec<f32> = (0..2 * HIDDEN).map(|i| (i % 31) as f32 - 15.0).collect();
    let product = || {
        let mut y = vec![0.0; 2 * HIDDEN];
        quantised_matmul(&x, weight, &mut y);
        y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert_eq!(product(), with_isa(Isa::Portable, product), "{weight:?}");
}
