//! What this machine can do at best: arithmetic in registers, and memory read by all threads. Benchmarks give their
//! results as shares of it.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::isa::Isa;
use crate::memory::Buffer;
use crate::parallel;
use crate::simd::{Kernel, LANES, Lanes, Simd, dispatch};

/// What is multiplied and added.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operands {
    /// f32, summed in f32.
    F32,
    /// bf16, summed in f32; in f32 where the instruction set has no instruction for it.
    Bf16,
    /// Bytes, summed in integers, as the products with weights in block formats do; f32 without vectors.
    Bytes,
}

/// Multiplications and additions a second that the current pool reaches in registers: independent multiply-adds of the
/// instruction that `isa` has for such operands, on all threads at once.
///
/// # Panics
/// When this machine lacks `isa`.
pub fn peak_operations(isa: Isa, operands: Operands, time: Duration) -> f64 {
    const STEPS: usize = 200_000;
    assert!(isa <= Isa::best(), "this machine has no {isa}");
    let run = peak::function(isa, operands);
    let rates = rayon::broadcast(|_| {
        let mut operations = 0.0;
        // SAFETY: the machine has `isa`.
        let seconds = shortest(time, || operations = unsafe { run(STEPS) });
        operations / seconds
    });
    rates.iter().sum()
}

/// Bytes a second that the current pool reads from a buffer of `bytes`, which should be many times the caches: the best
/// of the passes that fit into `time`.
pub fn read_bandwidth(bytes: usize, time: Duration) -> f64 {
    const PART: usize = 1 << 18;
    let isa = Isa::current();
    let mut buffer = Buffer::<f32>::scratch((bytes / size_of::<f32>()).next_multiple_of(PART));
    // Written first: pages that nobody wrote are all the same page of zeros.
    parallel::for_each_chunk(&mut buffer, PART, 0, |_, part| part.fill(1.0));
    let seconds = shortest(time, || {
        parallel::for_each_index(buffer.len() / PART, 0, |part| {
            black_box(dispatch(isa, Sum(&buffer[part * PART..(part + 1) * PART])));
        });
    });
    size_of_val::<[f32]>(&buffer) as f64 / seconds
}

/// The shortest of the repeats that fit into `time`, at least three, after one that warms up.
fn shortest(time: Duration, mut body: impl FnMut()) -> f64 {
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

/// Adds up a stretch of memory: eight sums, so that the additions do not wait for each other.
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sums = [Lanes::splat(simd, 0.0); 8];
        for block in self.0.as_chunks::<{ 8 * LANES }>().0 {
            for (sum, lanes) in sums.iter_mut().zip(block.as_chunks::<LANES>().0) {
                *sum = *sum + Lanes::load(simd, lanes);
            }
        }
        sums.into_iter().map(Lanes::sum).sum()
    }
}

/// Loops of multiply-adds on registers alone. Each takes the number of steps and returns the operations done.
mod peak {
    use super::{Isa, Operands, black_box};

    #[cfg(target_arch = "x86_64")]
    pub(super) fn function(isa: Isa, operands: Operands) -> unsafe fn(usize) -> f64 {
        match (isa, operands) {
            (Isa::Portable, _) => portable,
            (Isa::Avx2, Operands::Bytes) if is_x86_feature_detected!("avxvnni") => avx2_vnni_bytes,
            (Isa::Avx2, Operands::Bytes) => avx2_bytes,
            (Isa::Avx2, _) => avx2,
            (Isa::Amx, Operands::Bf16) => amx_bf16,
            (Isa::Amx, Operands::Bytes) => amx_bytes,
            (_, Operands::Bf16) => avx512_bf16,
            (_, Operands::Bytes) => avx512_bytes,
            (_, Operands::F32) => avx512_f32,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn function(_: Isa, _: Operands) -> unsafe fn(usize) -> f64 {
        portable
    }

    fn portable(steps: usize) -> f64 {
        let mut sums = black_box([1.0f32; 32]);
        let (a, b) = black_box((0.999f32, 0.001f32));
        for _ in 0..steps {
            sums.iter_mut().for_each(|sum| *sum = *sum * a + b);
        }
        black_box(sums);
        (2 * 32 * steps) as f64
    }

    #[cfg(target_arch = "x86_64")]
    macro_rules! register_loop {
        ($name:ident, $features:literal, $register:ident, $zero:expr, $step:expr, $flops:literal) => {
            #[target_feature(enable = $features)]
            fn $name(steps: usize) -> f64 {
                use std::arch::x86_64::*;
                let mut sums = [$zero; 12];
                let (a, b) = black_box(($zero, $zero));
                for _ in 0..steps {
                    for sum in &mut sums {
                        *sum = $step(*sum, a, b);
                    }
                }
                black_box(sums);
                ($flops * sums.len() * steps) as f64
            }
        };
    }
    #[cfg(target_arch = "x86_64")]
    register_loop!(avx2, "avx2,fma", __m256, _mm256_setzero_ps(), |s, a, b| _mm256_fmadd_ps(a, b, s), 16);
    #[cfg(target_arch = "x86_64")]
    register_loop!(avx512_f32, "avx512f", __m512, _mm512_setzero_ps(), |s, a, b| _mm512_fmadd_ps(a, b, s), 32);
    #[cfg(target_arch = "x86_64")]
    register_loop!(
        avx512_bf16,
        "avx512f,avx512bf16",
        __m512,
        _mm512_setzero_ps(),
        |s, a, b| _mm512_dpbf16_ps(
            s,
            // SAFETY: two types for the same 512 bits.
            unsafe { std::mem::transmute::<__m512, __m512bh>(a) },
            // SAFETY: as above.
            unsafe { std::mem::transmute::<__m512, __m512bh>(b) }
        ),
        64
    );

    #[cfg(target_arch = "x86_64")]
    register_loop!(
        avx2_bytes,
        "avx2",
        __m256i,
        _mm256_setzero_si256(),
        // Of the sum, for a product that is always the same would leave the loop.
        |s, a, b| _mm256_add_epi16(a, _mm256_maddubs_epi16(s, b)),
        64
    );
    #[cfg(target_arch = "x86_64")]
    register_loop!(
        avx2_vnni_bytes,
        "avx2,avxvnni",
        __m256i,
        _mm256_setzero_si256(),
        |s, a, b| _mm256_dpbusd_avx_epi32(s, a, b),
        64
    );
    #[cfg(target_arch = "x86_64")]
    register_loop!(
        avx512_bytes,
        "avx512f,avx512vnni",
        __m512i,
        _mm512_setzero_si512(),
        |s, a, b| _mm512_dpbusd_epi32(s, a, b),
        128
    );

    /// A loop of products of zeroed tiles into four sums: 16 rows, 16 columns, 64 bytes along K.
    #[cfg(target_arch = "x86_64")]
    macro_rules! tile_loop {
        ($name:ident, $instruction:literal, $depth:literal) => {
            fn $name(steps: usize) -> f64 {
                #[repr(align(64))]
                struct TileConfig([u8; 64]);
                let mut config = TileConfig([0; 64]);
                config.0[0] = 1;
                for tile in 0..8 {
                    config.0[16 + 2 * tile] = 64;
                    config.0[48 + tile] = 16;
                }
                // SAFETY: the machine has AMX; the tiles are ours from the configuration to the release.
                unsafe {
                    std::arch::asm!(
                        "ldtilecfg [{config}]",
                        "tilezero tmm0",
                        "tilezero tmm1",
                        "tilezero tmm2",
                        "tilezero tmm3",
                        "tilezero tmm4",
                        "tilezero tmm5",
                        "2:",
                        concat!($instruction, " tmm0, tmm4, tmm5"),
                        concat!($instruction, " tmm1, tmm4, tmm5"),
                        concat!($instruction, " tmm2, tmm4, tmm5"),
                        concat!($instruction, " tmm3, tmm4, tmm5"),
                        "dec {steps}",
                        "jnz 2b",
                        "tilerelease",
                        config = in(reg) &config,
                        steps = inout(reg) steps => _,
                        options(nostack)
                    );
                }
                (steps * 4 * 2 * 16 * 16 * $depth) as f64
            }
        };
    }
    #[cfg(target_arch = "x86_64")]
    tile_loop!(amx_bf16, "tdpbf16ps", 32);
    #[cfg(target_arch = "x86_64")]
    tile_loop!(amx_bytes, "tdpbssd", 64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_has_a_peak_and_memory_a_bandwidth() {
        let time = Duration::from_millis(1);
        for isa in Isa::available() {
            for operands in [Operands::F32, Operands::Bf16, Operands::Bytes] {
                let found = peak_operations(isa, operands, time);
                assert!(found.is_finite() && found > 1e8, "{isa} {operands:?}: {found}");
            }
            let found = crate::isa::with_isa(isa, || read_bandwidth(1 << 22, time));
            assert!(found.is_finite() && found > 1e7, "{isa}: {found}");
        }
    }

    #[test]
    fn all_of_the_buffer_is_read() {
        let numbers: Vec<f32> = (0..8 * LANES * 3).map(|i| i as f32).collect();
        let wanted = numbers.iter().sum::<f32>();
        for isa in Isa::available() {
            assert_eq!(dispatch(isa, Sum(&numbers)), wanted);
        }
    }
}
