//! Speed of the block formats: decoding and encoding, in millions of numbers a second, on as many threads as rayon has.
//!
//!     cargo run --release -p moebius-kernels --example format_bench [MILLIONS OF NUMBERS]

use moebius_kernels::formats::Format;
use moebius_kernels::{isa::Isa, parallel};
use std::time::Instant;

fn main() {
    let millions = std::env::args().nth(1).map_or(4, |text| text.parse::<usize>().expect("a whole number"));
    let n = millions << 20;
    // A sum of uniform numbers is near enough to normal.
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let values: Vec<f32> = (0..n).map(|_| 0.02 * (uniform() + uniform() + uniform() + uniform())).collect();
    let mut out = vec![0.0; n];
    println!("{millions} Mi numbers, {:?}, {} threads", Isa::current(), parallel::threads());
    println!("{:8} {:>9} {:>12} {:>12} {:>12}", "format", "bits", "encode M/s", "decode M/s", "error");
    let square: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
    for &format in Format::all() {
        let mut bytes = vec![0; format.bytes_of(n).expect("whole blocks")];
        let rate = |seconds: f64| n as f64 / seconds / 1e6;
        let encode = best_of(3, || format.encode(&values, &mut bytes).expect("finite numbers"));
        let decode = best_of(5, || format.decode(&bytes, &mut out));
        let error: f64 = out.iter().zip(&values).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        let bits = 8.0 * bytes.len() as f64 / n as f64;
        println!("{format:8} {bits:9.4} {:12.1} {:12.1} {:12.2e}", rate(encode), rate(decode), (error / square).sqrt());
    }
}

fn best_of(times: usize, mut work: impl FnMut()) -> f64 {
    let time = |work: &mut dyn FnMut()| {
        let begun = Instant::now();
        work();
        begun.elapsed().as_secs_f64()
    };
    (0..times).map(|_| time(&mut work)).fold(f64::INFINITY, f64::min)
}
