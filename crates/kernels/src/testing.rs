//! What the tests of all kernels share.

use crate::isa::Isa;

/// Numbers in -1..1 without a library: a multiplicative generator.
pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(3_037_000_493);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Compares with a tolerance relative to `1 + |wanted|`.
pub(crate) fn assert_close(what: &str, found: &[f32], wanted: &[f32], tolerance: f32) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (i, (&found, &wanted)) in found.iter().zip(wanted).enumerate() {
        assert!((found - wanted).abs() <= tolerance * (1.0 + wanted.abs()), "{what}[{i}]: {found} for {wanted}");
    }
}

/// Runs a kernel on each instruction set with 1, 2 and 3 threads: all must give the bits of the portable one, which
/// must be close to the reference. A result is several slices.
pub(crate) fn check(reference: &[Vec<f32>], tolerance: f32, kernel: impl Fn(Isa) -> Vec<Vec<f32>> + Sync) {
    let portable = kernel(Isa::Portable);
    assert_eq!(portable.len(), reference.len());
    for (i, (found, wanted)) in portable.iter().zip(reference).enumerate() {
        assert_close(&format!("result {i}"), found, wanted, tolerance);
    }
    for isa in Isa::available() {
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let found = pool.install(|| kernel(isa));
            for (found, wanted) in found.iter().zip(&portable) {
                assert_eq!(bits(found), bits(wanted), "{isa:?}, {threads} threads");
            }
        }
    }
}
