use super::*;
use crate::isa::{Isa, with_isa};
use crate::testing::{bits, numbers};

/// Random blocks of a published format with scales of a sensible size.
fn random_blocks(format: BlockFormat, seed: u64, blocks: usize) -> Vec<u8> {
    let (bytes, noise) = (format.block_bytes(), numbers(seed, blocks * format.block_bytes()));
    let mut source: Vec<u8> = noise.iter().map(|noise| ((noise + 1.0) * 127.99) as u8).collect();
    for (block, noise) in source.chunks_exact_mut(bytes).zip(noise.chunks_exact(bytes)) {
        let scale = half::f16::from_f32(noise[0] * 0.1).to_le_bytes();
        match format {
            BlockFormat::Mxfp4 => block[0] = 118 + (noise[0].abs() * 8.0) as u8,
            BlockFormat::Q4K => {
                block[..2].copy_from_slice(&scale);
                block[2..4].copy_from_slice(&half::f16::from_f32(noise[1] * 0.05).to_le_bytes());
            }
            BlockFormat::Q6K => block[208..].copy_from_slice(&scale),
            BlockFormat::Q8_0 | BlockFormat::Q4_0 | BlockFormat::Iq4Nl => block[..2].copy_from_slice(&scale),
        }
    }
    source
}

fn matrix(format: BlockFormat, seed: u64, n: usize, k: usize) -> QuantisedMatrix {
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
    for format in BlockFormat::ALL {
        assert_nearly_exact(&matrix(format, 1, 37, 512), &numbers(2, 5 * 512));
    }
}

#[test]
fn every_row_has_its_bits_on_any_instruction_set_in_any_company() {
    for format in BlockFormat::ALL {
        for (n, k) in [(16, 256), (50, 768), (5, 256)] {
            let weight = matrix(format, 3, n, k);
            let x = numbers(4, 29 * k);
            let alone: Vec<u32> =
                with_isa(Isa::Portable, || x.chunks_exact(k).flat_map(|row| bits(&product(&weight, row))).collect());
            for isa in Isa::available() {
                for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 29] {
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

#[test]
fn a_k_that_ends_inside_a_unit_is_fine() {
    for format in [BlockFormat::Q8_0, BlockFormat::Q4_0, BlockFormat::Iq4Nl, BlockFormat::Mxfp4] {
        assert_nearly_exact(&matrix(format, 5, 20, 96), &numbers(6, 3 * 96));
    }
}

#[test]
fn groups_take_their_rows_and_leave_the_others() {
    let (n, k) = (24, 64);
    let weights: Vec<QuantisedMatrix> = (0..4).map(|seed| matrix(BlockFormat::Q4_0, seed, n, k)).collect();
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
fn published_blocks_decode_as_defined() {
    // Q4_0: the first byte holds elements 0 (low) and 16 (high), less eight.
    let mut source = vec![0x88; 18];
    source[..2].copy_from_slice(&half::f16::from_f32(0.5).to_le_bytes());
    source[2] = 0xf1;
    let mut row = [9.0; 32];
    QuantisedMatrix::pack(BlockFormat::Q4_0, 1, 32, &source).row(0, &mut row);
    assert_eq!((row[0], row[16], row[1]), (-3.5, 3.5, 0.0));

    // MXFP4: 2^(exponent - 127) times 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
    let mut source = vec![0; 17];
    (source[0], source[1], source[2]) = (129, 0xf1, 0x07);
    QuantisedMatrix::pack(BlockFormat::Mxfp4, 1, 32, &source).row(0, &mut row);
    assert_eq!((row[0], row[16], row[1], row[17]), (2.0, -24.0, 24.0, 0.0));

    // Q6_K: element 37 is l = 5 of the second quarter: low bits in the low half of byte 37, high bits 2 and 3 of byte 5.
    let mut source = vec![0; 210];
    (source[37], source[128 + 5], source[192 + 2]) = (0x0b, 0b0100, 0xfe);
    source[208..].copy_from_slice(&half::f16::from_f32(2.0).to_le_bytes());
    let mut row = [0.0; 256];
    QuantisedMatrix::pack(BlockFormat::Q6K, 1, 256, &source).row(0, &mut row);
    assert_eq!((row[37], row[38]), (2.0 * -2.0 * (27.0 - 32.0), 2.0 * -2.0 * -32.0));

    // Q4_K: block 5's scale and minimum are spread over three bytes.
    let mut source = vec![0; 144];
    source[..2].copy_from_slice(&half::f16::from_f32(1.0).to_le_bytes());
    source[2..4].copy_from_slice(&half::f16::from_f32(0.5).to_le_bytes());
    (source[4 + 1], source[4 + 5], source[4 + 9]) = (0x40, 0x80, 0x23);
    source[16 + 64] = 0x70;
    QuantisedMatrix::pack(BlockFormat::Q4K, 1, 256, &source).row(0, &mut row);
    assert_eq!((row[160], row[161]), (7.0 * f32::from(0x13u8) - 0.5 * f32::from(0x22u8), -0.5 * f32::from(0x22u8)));
}

#[test]
#[should_panic(expected = "bytes of 2 rows of 64 weights")]
fn bytes_that_do_not_fit_are_refused() {
    QuantisedMatrix::pack(BlockFormat::Q8_0, 2, 64, &[0; 100]);
}
