//! The products compared with three nested loops, on each instruction set of the machine, in every view and size that
//! meets an edge; and their independence of rows, groups and threads, to the bit.

use half::bf16;

use super::*;
use crate::isa::{Isa, with_isa};
use crate::narrow::Numbers;

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Numbers in -1..1 that look random.
fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn rounded(precision: Precision, value: f32) -> f64 {
    match precision {
        Precision::F32 => value.into(),
        Precision::Bf16 => bf16::from_f32(value).into(),
    }
}

/// Three nested loops in f64.
fn reference(precision: Precision, a: Mat, b: Mat, c: &[f32], beta: Beta) -> Vec<f32> {
    let mut result = Vec::with_capacity(c.len());
    for row in 0..a.rows() {
        for column in 0..b.cols() {
            let start = if beta == Beta::Accumulate { f64::from(c[row * b.cols() + column]) } else { 0.0 };
            let product = |k| rounded(precision, a.at(row, k)) * rounded(precision, b.at(k, column));
            result.push((0..a.cols()).map(product).fold(start, |sum, term| sum + term) as f32);
        }
    }
    result
}

fn assert_close(found: &[f32], wanted: &[f32], k: usize, what: &str) {
    assert_eq!(found.len(), wanted.len());
    // Terms are below one, so a sum of k of them errs by less than about sqrt(k) roundings at the size of sqrt(k).
    let tolerance = 1e-6 * (k as f32 + 4.0);
    for (i, (&found, &wanted)) in found.iter().zip(wanted).enumerate() {
        assert!((found - wanted).abs() <= tolerance, "{what}: element {i} is {found}, wanted {wanted}");
    }
}

/// A matrix stored whole, transposed, or inside a larger one at an odd offset.
fn view(storage: &[f32], rows: usize, cols: usize, kind: usize) -> Mat<'_> {
    match kind {
        0 => Mat::new(&storage[..rows * cols], rows, cols),
        1 => Mat::new(&storage[..rows * cols], cols, rows).t(),
        2 => Mat::strided(&storage[3..], rows, cols, cols + 5),
        _ => Mat::strided(&storage[1..], cols, rows, rows + 3).t(),
    }
}

/// Enough elements for any [`view`] of this size.
fn storage(rows: usize, cols: usize, seed: u32) -> Vec<f32> {
    values((rows + 5) * (cols + 5) + 3, seed)
}

fn on_every_isa(body: impl Fn(Isa)) {
    for isa in Isa::available() {
        with_isa(isa, || body(isa));
    }
}

#[test]
fn a_product_on_paper() {
    on_every_isa(|_| {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]);
        for precision in PRECISIONS {
            let mut c = [1.0; 4];
            matmul(precision, Mat::new(&a, 2, 2), Mat::new(&b, 2, 2), &mut c, Beta::Overwrite);
            assert_eq!(c, [19.0, 22.0, 43.0, 50.0]);
            matmul(precision, Mat::new(&a, 2, 2).t(), Mat::new(&b, 2, 2).t(), &mut c, Beta::Accumulate);
            assert_eq!(c, [19.0 + 23.0, 22.0 + 31.0, 43.0 + 34.0, 50.0 + 46.0]);
        }
    });
}

#[test]
fn every_size_around_the_blocks() {
    on_every_isa(|isa| {
        for m in (0..=14).chain([16, 17, 31, 32, 33, 50]) {
            for (n, k) in [(1, 1), (16, 32), (15, 31), (17, 33), (33, 2), (130, 65), (150, 7), (48, 100)] {
                check(isa, m, n, k, 0, 0);
            }
        }
        check(isa, 5, 0, 3, 0, 0);
        check(isa, 5, 3, 0, 0, 0);
        check(isa, 100, 30, 2100, 0, 0);
        check(isa, 5, 600, 1100, 0, 0);
    });
}

#[test]
fn every_pair_of_views() {
    on_every_isa(|isa| {
        for a_kind in 0..4 {
            for b_kind in 0..4 {
                for (m, n, k) in [(13, 18, 35), (1, 16, 32), (24, 32, 64), (40, 7, 3), (3, 300, 70)] {
                    check(isa, m, n, k, a_kind, b_kind);
                }
            }
        }
    });
}

fn check(isa: Isa, m: usize, n: usize, k: usize, a_kind: usize, b_kind: usize) {
    let (a, b) = (storage(m, k, 1), storage(k, n, 2));
    let (a, b) = (view(&a, m, k, a_kind), view(&b, k, n, b_kind));
    for precision in PRECISIONS {
        for beta in [Beta::Overwrite, Beta::Accumulate] {
            let before = values(m * n, 3);
            let mut c = before.clone();
            matmul(precision, a, b, &mut c, beta);
            let what = format!("{isa} {precision:?} {beta:?} [{m}, {k}] x [{k}, {n}] views {a_kind} {b_kind}");
            assert_close(&c, &reference(precision, a, b, &before, beta), k, &what);
        }
    }
}

#[test]
fn sources_of_bf16_give_the_bits_of_f32() {
    on_every_isa(|isa| {
        // Whole k blocks are read where they stand, if the kernel can.
        let whole = [(1, 16, 32), (29, 33, 64), (150, 40, 896)];
        for (m, n, k) in
            whole.into_iter().chain([(13, 18, 35), (16, 33, 31), (40, 7, 3), (30, 300, 70), (150, 20, 900)])
        {
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let [a16, b16] = [&a, &b].map(|x| x.iter().map(|&x| bf16_of(x)).collect::<Vec<_>>());
            let product = |a: Mat, b: Mat| {
                let mut c = vec![0.0; m * n];
                matmul(Precision::Bf16, a, b, &mut c, Beta::Overwrite);
                c
            };
            let what = format!("{isa} [{m}, {k}] x [{k}, {n}]");
            let wanted = product(Mat::new(&a, m, k), Mat::new(&b, k, n));
            assert!(
                product(Mat::of(Numbers::Bf16(&a16), m, k), Mat::of(Numbers::Bf16(&b16), k, n)) == wanted,
                "{what}"
            );
            let wanted = product(Mat::new(&a, k, m).t(), Mat::new(&b, n, k).t());
            assert!(
                product(Mat::of(Numbers::Bf16(&a16), k, m).t(), Mat::of(Numbers::Bf16(&b16), n, k).t()) == wanted,
                "{what}, transposed"
            );
        }
    });
}

#[test]
#[should_panic(expected = "rounded operands of a product in f32")]
fn sources_of_bf16_are_not_for_f32() {
    let packed = Packed::pack(Precision::F32, Mat::new(&[1.0], 1, 1));
    matmul_packed(Mat::of(Numbers::Bf16(&[0x3f80]), 1, 1), &packed, &mut [0.0], Beta::Overwrite);
}

#[test]
fn a_row_does_not_know_the_others() {
    on_every_isa(|isa| {
        let (m, n, k) = (77, 83, 1500);
        let (a, b) = (values(m * k, 4), values(k * n, 5));
        for precision in PRECISIONS {
            let packed = Packed::pack(precision, Mat::new(&b, k, n));
            let mut whole = vec![0.0; m * n];
            matmul_packed(Mat::new(&a, m, k), &packed, &mut whole, Beta::Overwrite);
            for step in [1, 2, 3, 5, 12, 13, 37, 64] {
                let mut parts = vec![0.0; m * n];
                for first in (0..m).step_by(step) {
                    let rows = first..m.min(first + step);
                    let part = &mut parts[rows.start * n..rows.end * n];
                    matmul_packed(Mat::new(&a, m, k).row_range(rows), &packed, part, Beta::Overwrite);
                }
                assert!(parts == whole, "{isa} {precision:?}: {step} rows at a time");
            }
        }
    });
}

#[test]
fn threads_and_groups_change_no_bit() {
    on_every_isa(|isa| {
        let (rows, n, k) = (300, 200, 130);
        let offsets = [0, 7, 7, 120, 133, 299];
        let groups = offsets.len() - 1;
        let (x, w, dy) = (values(rows * k, 6), values(groups * k * n, 7), values(rows * n, 8));
        let weight = |g: usize| Mat::new(&w[g * k * n..(g + 1) * k * n], n, k).t();
        for precision in PRECISIONS {
            let packed = Packed::pack_many(precision, &(0..groups).map(weight).collect::<Vec<_>>());
            let mut wanted = values(rows * n, 9);
            let mut wanted_dw = values(groups * n * k, 10);
            for g in 0..groups {
                let range = offsets[g]..offsets[g + 1];
                let x = Mat::new(&x, rows, k).row_range(range.clone());
                let part = &mut wanted[range.start * n..range.end * n];
                matmul_packed(x, &packed[g], part, Beta::Accumulate);
                let dy = Mat::new(&dy, rows, n).row_range(range);
                matmul(precision, dy.t(), x, &mut wanted_dw[g * n * k..(g + 1) * n * k], Beta::Accumulate);
            }
            for threads in 1..4 {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let (mut y, mut dw) = (values(rows * n, 9), values(groups * n * k, 10));
                pool.install(|| {
                    with_isa(isa, || {
                        grouped_matmul(Mat::new(&x, rows, k), &offsets, &packed, &mut y, Beta::Accumulate);
                        let (dy, x) = (Mat::new(&dy, rows, n), Mat::new(&x, rows, k));
                        grouped_matmul_weight_gradient(precision, dy, x, &offsets, &mut dw, Beta::Accumulate);
                    });
                });
                assert!(y == wanted, "{isa} {precision:?}: {threads} threads");
                assert!(dw == wanted_dw, "{isa} {precision:?}: gradients, {threads} threads");
            }
        }
    });
}

#[test]
fn a_group_without_rows_has_no_gradient() {
    let (dy, x) = (values(4 * 3, 11), values(4 * 5, 12));
    let (dy, x) = (Mat::new(&dy, 4, 3), Mat::new(&x, 4, 5));
    let offsets = [0, 4, 4];
    let mut dw = vec![2.0; 2 * 15];
    grouped_matmul_weight_gradient(Precision::F32, dy, x, &offsets, &mut dw, Beta::Accumulate);
    assert!(dw[15..].iter().all(|&v| v == 2.0) && dw[..15].iter().all(|&v| v != 2.0));
    grouped_matmul_weight_gradient(Precision::F32, dy, x, &offsets, &mut dw, Beta::Overwrite);
    assert!(dw[15..].iter().all(|&v| v == 0.0));
}

#[test]
fn the_packed_layout_is_the_same_on_every_instruction_set() {
    for (rows, cols) in [(1, 1), (32, 16), (65, 50), (3, 300), (100, 16)] {
        for kind in 0..4 {
            let storage = storage(rows, cols, 13);
            for precision in PRECISIONS {
                let pack = || Packed::pack(precision, view(&storage, rows, cols, kind));
                let wanted = with_isa(Isa::Portable, pack);
                on_every_isa(|isa| {
                    assert!(pack().words() == wanted.words(), "{isa} {precision:?} [{rows}, {cols}] view {kind}");
                });
            }
        }
    }
}

#[test]
fn rounding_is_to_the_nearest_on_every_instruction_set() {
    // Ties to either side, just above a tie, the largest numbers, infinities, signed zeros, a NaN.
    let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x7f7f_7fff, 0x7f7f_ffff, 0xff80_0000, 0x8000_0000];
    let nan = 0x7f80_0001;
    let source: Vec<f32> =
        (0..64 * 16).map(|i| f32::from_bits(*ties.iter().chain([&nan]).nth(i % 8).unwrap())).collect();
    for b in [Mat::new(&source, 64, 16), Mat::new(&source, 16, 64).t()] {
        on_every_isa(|isa| {
            let packed = Packed::pack(Precision::Bf16, b);
            for (place, &word) in packed.words().iter().enumerate() {
                let (k, column) = (place / 16 * 2, place % 16);
                for (k, found) in [(k, word << 16), (k + 1, word & 0xffff_0000)] {
                    let wanted = bf16::from_f32(b.at(k, column)).to_f32();
                    let found = f32::from_bits(found);
                    assert!(found.to_bits() == wanted.to_bits() || found.is_nan() && wanted.is_nan(), "{isa} {wanted}");
                }
            }
        });
    }
}

#[test]
fn views_point_where_they_say() {
    let data = values(100, 14);
    let whole = Mat::new(&data, 10, 10);
    let part = whole.row_range(2..7).col_range(3..9);
    assert_eq!((part.rows(), part.cols()), (5, 6));
    assert_eq!(part.at(4, 5), data[6 * 10 + 8]);
    assert_eq!(part.t().at(5, 4), data[6 * 10 + 8]);
    assert_eq!(whole.row_range(10..10).rows(), 0);
}

/// The AMX kernels on simulated tiles: blocks, edges, sums carried between blocks of K, independence of rows.
#[cfg(target_arch = "x86_64")]
#[test]
fn simulated_tiles_multiply() {
    let multiply = |a: Mat, b: &Packed, c: &mut [f32], beta| {
        driver::run_on(&amx::SIMULATED, &[driver::Job { a, b, first: 0 }], c, beta);
    };
    for (m, n, k) in
        [(1, 16, 32), (16, 32, 64), (17, 33, 31), (31, 70, 100), (32, 48, 7), (150, 300, 33), (70, 20, 900)]
    {
        for kind in 0..4 {
            let (a, b) = (storage(m, k, 15), storage(k, n, 16));
            let (a, b) = (view(&a, m, k, kind), view(&b, k, n, kind));
            let packed = Packed::pack(Precision::Bf16, b);
            for beta in [Beta::Overwrite, Beta::Accumulate] {
                let before = values(m * n, 17);
                let mut c = before.clone();
                multiply(a, &packed, &mut c, beta);
                let what = format!("simulated {beta:?} [{m}, {k}] x [{k}, {n}] views {kind}");
                assert_close(&c, &reference(Precision::Bf16, a, b, &before, beta), k, &what);
                for row in [0, m / 2, m - 1] {
                    let mut alone = before[row * n..(row + 1) * n].to_vec();
                    multiply(a.row_range(row..row + 1), &packed, &mut alone, beta);
                    assert!(alone == c[row * n..(row + 1) * n], "{what}: row {row} alone");
                }
            }
        }
    }
}
