//! Quantised products against exact ones, and against themselves in other company.

use super::driver::Kernel;
use super::*;
use crate::formats::Format;
use crate::isa::{Isa, with_isa};
use crate::testing::{bits, numbers};

/// Random blocks of a published format with scales of a sensible size.
fn random_blocks(format: Format, seed: u64, blocks: usize) -> Vec<u8> {
    let (bytes, noise) = (format.block_bytes(), numbers(seed, blocks * format.block_bytes()));
    let mut source: Vec<u8> = noise.iter().map(|noise| ((noise + 1.0) * 127.99) as u8).collect();
    let half = |value: f32| half::f16::from_f32(value).to_le_bytes();
    for (block, noise) in source.chunks_exact_mut(bytes).zip(noise.chunks_exact(bytes)) {
        let (scale, min) = (half(noise[0] * 0.1), half(noise[1] * 0.05));
        match format {
            Format::MXFP4 => block[0] = 118 + (noise[0].abs() * 8.0) as u8,
            Format::Q2_K => block[80..].copy_from_slice(&[scale, min].concat()),
            Format::Q3_K => block[108..].copy_from_slice(&scale),
            Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => {
                block[..4].copy_from_slice(&[scale, min].concat());
            }
            Format::Q6_K => block[208..].copy_from_slice(&scale),
            _ => block[..2].copy_from_slice(&scale),
        }
    }
    source
}

fn matrix(format: Format, seed: u64, n: usize, k: usize) -> QuantisedMatrix {
    QuantisedMatrix::pack(format, n, k, &random_blocks(format, seed, n * k / format.block_len()))
}

fn product(weight: &QuantisedMatrix, x: &[f32]) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len() / weight.k() * weight.n()];
    quantised_matmul(x, weight, &mut y);
    y
}

/// In f64, of the decoded weights and the activations as they are.
fn exact(weight: &QuantisedMatrix, x: &[f32]) -> Vec<f64> {
    let mut row = vec![0.0; weight.k()];
    let rows: Vec<Vec<f32>> = (0..weight.n())
        .map(|n| {
            weight.row(n, &mut row);
            row.clone()
        })
        .collect();
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
    x.chunks_exact(weight.k()).flat_map(|x| rows.iter().map(move |w| dot(x, w))).collect()
}

/// What quantising the activations costs: below a hundredth of the result's norm.
fn assert_nearly_exact(weight: &QuantisedMatrix, x: &[f32]) {
    let (found, wanted) = (product(weight, x), exact(weight, x));
    let norm = wanted.iter().map(|y| y * y).sum::<f64>().sqrt();
    let error = found.iter().zip(&wanted).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
    assert!(error < 0.01 * norm, "{weight:?}: {error} of {norm}");
}

#[test]
fn products_are_close_to_exact_ones() {
    for format in PACKED_FORMATS {
        assert_nearly_exact(&matrix(format, 1, 37, 512), &numbers(2, 5 * 512));
    }
}

#[test]
fn every_row_has_its_bits_on_any_instruction_set_in_any_company() {
    for format in PACKED_FORMATS {
        for (n, k) in [(16, 256), (50, 768), (5, 256)] {
            let weight = matrix(format, 3, n, k);
            let x = numbers(4, 29 * k);
            let alone: Vec<u32> =
                with_isa(Isa::Portable, || x.chunks_exact(k).flat_map(|row| bits(&product(&weight, row))).collect());
            for isa in Isa::available() {
                for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 20, 29] {
                    for threads in [1, 3] {
                        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                        let found = pool.install(|| with_isa(isa, || product(&weight, &x[..rows * k])));
                        assert_eq!(bits(&found), alone[..rows * n], "{format:?} {isa:?} {rows}x{n}x{k} {threads}");
                    }
                }
            }
        }
    }
}

/// The kernels that this machine does not choose by itself: for AMX on simulated tiles, wherever the rest of them can run,
/// and for AVX2 without AVX-VNNI.
#[test]
#[cfg(target_arch = "x86_64")]
fn other_kernels_give_the_bits_of_plain_loops() {
    if Isa::best() >= Isa::Avx512 {
        gives_the_bits_of_plain_loops(QuantisedMatrix::simulated_kernel);
    }
    if Isa::best() >= Isa::Avx2 {
        gives_the_bits_of_plain_loops(QuantisedMatrix::kernel_without_vnni);
    }
}

#[cfg(target_arch = "x86_64")]
fn gives_the_bits_of_plain_loops(kernel: impl Fn(&QuantisedMatrix) -> Kernel) {
    for format in PACKED_FORMATS {
        // More blocks than are taken at once, and units and columns that end inside.
        for (n, k) in [(50, 1280), (16, 256), (5, 2048)] {
            let weights = [matrix(format, 3, n, k), matrix(format, 4, n, k)];
            let mut x = numbers(4, 40 * k);
            x[9 * k + 33] = f32::NAN;
            let (offsets, source) = ([1, 36, 58], (0..60).map(|i| i * 7 % 40).collect::<Vec<u32>>());
            let mut wanted = vec![2.5; 60 * n];
            with_isa(Isa::Portable, || grouped_quantised_matmul(&x, Some(&source), &offsets, &weights, &mut wanted));
            let (bias, halves) = weights[0].bias();
            let activations = Activations::quantise(&x, k, weights[0].blocks(), bias, halves);
            let jobs = [0, 1].map(|group| Job { matrix: &weights[group], rows: offsets[group]..offsets[group + 1] });
            let mut found = vec![2.5; 60 * n];
            run(kernel(&weights[0]), &jobs, &activations, Some(&source), &mut found);
            for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                let same = found.to_bits() == wanted.to_bits() || found.is_nan() && wanted.is_nan();
                assert!(same, "{format:?} {n}x{k}: row {} column {}: {found} for {wanted}", i / n, i % n);
            }
        }
    }
}

#[test]
fn a_k_that_ends_inside_a_unit_is_fine() {
    for format in PACKED_FORMATS.into_iter().filter(|format| format.block_len() == 32) {
        assert_nearly_exact(&matrix(format, 5, 20, 96), &numbers(6, 3 * 96));
    }
}

#[test]
fn groups_take_their_rows_and_leave_the_others() {
    let (n, k) = (24, 64);
    let weights: Vec<QuantisedMatrix> = (0..4).map(|seed| matrix(Format::Q4_0, seed, n, k)).collect();
    let x = numbers(9, 3 * k);
    let source = [2, 0, 1, 1, 0, 2];
    let mut y = vec![7.0; 7 * n];
    grouped_quantised_matmul(&x, Some(&source), &[1, 3, 3, 4, 6], &weights, &mut y);
    let row = |i: usize| &x[source[i] as usize * k..][..k];
    for (i, group) in [(1, 0), (2, 0), (3, 2), (4, 3), (5, 3)] {
        assert_eq!(y[i * n..(i + 1) * n], product(&weights[group], row(i)), "row {i}");
    }
    assert!(y[..n].iter().chain(&y[6 * n..]).all(|&y| y == 7.0));
}

#[test]
fn packed_rows_decode_to_the_bits_of_the_published_blocks() {
    for format in PACKED_FORMATS {
        let (n, k) = (19, 512);
        let source = random_blocks(format, 7, n * k / format.block_len());
        let mut wanted = vec![0.0; n * k];
        format.decode(&source, &mut wanted);
        let weight = QuantisedMatrix::pack(format, n, k, &source);
        let mut row = vec![0.0; k];
        for (index, wanted) in wanted.chunks_exact(k).enumerate() {
            weight.row(index, &mut row);
            let bits = |row: &[f32]| row.iter().map(|w| (w + 0.0).to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&row), bits(wanted), "{format:?}, row {index}; zeros of either sign");
        }
    }
}

#[test]
#[should_panic(expected = "bytes of 2 rows of 64 weights")]
fn bytes_that_do_not_fit_are_refused() {
    QuantisedMatrix::pack(Format::Q8_0, 2, 64, &[0; 100]);
}
