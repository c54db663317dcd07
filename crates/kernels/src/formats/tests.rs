//! Every format: the definition's bits on random blocks, on each instruction set, any number of threads.

use super::*;
use crate::testing::bits;

fn fixture(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/fixtures/formats/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Equal bits, but that one NaN is as good as another.
fn assert_same(what: &str, found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (i, (&found, &wanted)) in found.iter().zip(wanted).enumerate() {
        let same = found.to_bits() == wanted.to_bits() || found.is_nan() && wanted.is_nan();
        assert!(same, "{what}[{i}]: found {found:e}, wanted {wanted:e}");
    }
}

#[test]
fn random_blocks_mean_what_the_definition_says() {
    for &format in &Format::all()[2..] {
        let file = fixture(&format!("{format}.bin"));
        let (blocks, wanted) = file.split_at(format.bytes_of(2048).unwrap());
        let wanted = floats(wanted);
        assert_eq!(wanted.len(), 2048, "{format}");
        assert!(wanted.iter().filter(|x| x.is_finite() && **x != 0.0).count() > 500, "{format}");
        for isa in Isa::available() {
            let mut found = vec![7.0; 2048];
            format.decode_on(isa, blocks, &mut found);
            assert_same(&format!("{format} on {isa:?}"), &found, &wanted);
        }
    }
}

#[test]
fn many_blocks_are_decoded_on_any_number_of_threads() {
    let n = 5 * RUN + 256;
    for &format in &Format::all()[2..] {
        let file = fixture(&format!("{format}.bin"));
        let (blocks, wanted) = file.split_at(format.bytes_of(2048).unwrap());
        let blocks: Vec<u8> = blocks.iter().copied().cycle().take(format.bytes_of(n).unwrap()).collect();
        let wanted: Vec<f32> = floats(wanted).into_iter().cycle().take(n).collect();
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut found = vec![7.0; n];
            pool.install(|| format.decode(&blocks, &mut found));
            assert_same(&format!("{format}, {threads} threads"), &found, &wanted);
        }
    }
}

#[test]
fn plain_numbers_come_back() {
    let values = [0.0, -0.0, 1.0, -2.5, f32::MIN_POSITIVE / 4.0, f32::MAX, f32::INFINITY, f32::from_bits(0x7fc0_1234)];
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut found = [0.0; 8];
    Format::F32.decode(&bytes, &mut found);
    assert_eq!(bits(&found), bits(&values));
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let mut found = vec![0.0; 1 << 16];
    Format::F16.decode(&all, &mut found);
    let wanted: Vec<f32> = (0..=u16::MAX).map(|bits| half::f16::from_bits(bits).to_f32()).collect();
    assert_same("f16", &found, &wanted);
}

#[test]
fn sizes_and_names() {
    for &format in Format::all() {
        assert_eq!(Format::from_name(format.name()), Some(format));
        assert_eq!(Format::from_name(&format.name().to_uppercase()), Some(format));
        assert_eq!(format.to_string(), format.name());
        assert!(RUN.is_multiple_of(format.block_len()));
        assert_eq!(format.bytes_of(512), Some(512 / format.block_len() * format.block_bytes()));
        assert_eq!(format.bytes_of(format.block_len() + 1).is_none(), format.block_len() > 1);
        assert_eq!(format.bytes_of(usize::MAX & !255).is_none(), format.block_len() <= format.block_bytes());
        format.decode(&[], &mut []);
    }
    assert_eq!(Format::from_name("q4_k_m"), None);
    // ggml.c's type sizes.
    let bits = |format: Format| format.bytes_of(1024).unwrap() as f64 / 128.0;
    assert_eq!([bits(Format::Q4_K), bits(Format::Q6_K), bits(Format::MXFP4)], [4.5, 6.5625, 4.25]);
}

#[test]
#[should_panic(expected = "q4_0: bytes for 64 numbers")]
fn bytes_of_another_length_are_refused() {
    Format::Q4_0.decode(&[0; 18], &mut [0.0; 64]);
}

/// Formats that keep less than the numbers' own bits.
fn lossy() -> &'static [Format] {
    &Format::all()[3..]
}

fn encoded(format: Format, isa: Isa, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0x5a; format.bytes_of(values.len()).unwrap()];
    format.encode_on(isa, values, &mut bytes).unwrap();
    bytes
}

/// The squared error of writing and reading.
fn error(format: Format, values: &[f32]) -> f64 {
    let mut found = vec![0.0; values.len()];
    format.decode(&encoded(format, Isa::current(), values), &mut found);
    found.iter().zip(values).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

#[test]
fn errors_are_no_larger_than_the_references() {
    let values = floats(&fixture("values.bin"));
    let kinds = ["normal", "heavy", "uniform", "shifted", "sparse", "tiny"];
    assert_eq!(values.len(), kinds.len() * 1024);
    let mut compared = 0;
    for line in String::from_utf8(fixture("errors.txt")).unwrap().lines() {
        let [who, name, kind, wanted] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let (format, kind) = (Format::from_name(name).unwrap(), kinds.iter().position(|k| *k == kind).unwrap());
        let found = error(format, &values[kind * 1024..][..1024]);
        let wanted: f64 = wanted.parse().unwrap();
        println!("{who} {name} {}: {found:.3e} for {wanted:.3e}: {:.3}", kinds[kind], found / wanted);
        assert!(found <= wanted * 1.000_01, "{name}, {}: {found:e}, {who}'s {wanted:e}", kinds[kind]);
        compared += 1;
    }
    assert!(compared > 100);
}

#[test]
fn encoding_gives_the_same_bits_everywhere() {
    let values: Vec<f32> = floats(&fixture("values.bin")).into_iter().cycle().take(3 * RUN + 512).collect();
    for &format in Format::all() {
        let wanted = encoded(format, Isa::Portable, &values);
        for isa in Isa::available() {
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                assert!(
                    pool.install(|| encoded(format, isa, &values)) == wanted,
                    "{format}, {isa:?}, {threads} threads"
                );
            }
        }
    }
}

#[test]
fn what_was_read_is_written_again_without_error() {
    // Numbers that a format can hold exactly; zero among them, and blocks of nothing else.
    for &format in Format::all() {
        let mut exact = vec![0.0; 512];
        if format == Format::MXFP4 {
            exact[..256].iter_mut().enumerate().for_each(|(i, x)| *x = [0.5, -1.5, 6.0, -4.0, 0.0][i % 5]);
        } else if [Format::IQ4_NL, Format::IQ4_XS].contains(&format) {
            exact[..256].iter_mut().enumerate().for_each(|(i, x)| *x = [-127., 113., 1., -35., 89.][i % 5] / 64.0);
        } else {
            exact[..256].iter_mut().enumerate().for_each(|(i, x)| *x = [-0.25, 0.0][i % 3 / 2]);
        }
        let mut found = vec![7.0; 512];
        format.decode(&encoded(format, Isa::current(), &exact), &mut found);
        let largest = found.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // A scale in f16 may have to be rounded.
        assert!(largest <= 1e-3 * exact.iter().fold(0.0, |m, x| x.abs().max(m)), "{format}: {largest}");
        assert!(found[256..].iter().all(|&x| x == 0.0), "{format}");
    }
}

#[test]
fn the_largest_numbers_stay_finite_and_near() {
    for &format in lossy() {
        let largest = format.entry().largest;
        for mixed in [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [0.3, -1.0], [1.0, -0.01], [0.001, 0.0]] {
            let values: Vec<f32> = (0..256).map(|i| mixed[i % 2] * largest).collect();
            let mut found = vec![0.0; 256];
            format.decode(&encoded(format, Isa::current(), &values), &mut found);
            let scale = values.iter().fold(0.0, |m: f32, x| x.abs().max(m));
            let far = found.iter().zip(&values).map(|(a, b)| (a / scale - b / scale).abs()).fold(0.0, f32::max);
            assert!(far < 0.51, "{format} of {mixed:?} x {largest:e}: off by {far}");
        }
    }
}

#[test]
fn the_smallest_numbers_are_no_worse_than_zeros() {
    for &format in lossy() {
        for size in [f32::from_bits(1), 1e-40, 1e-30, 1e-20, 1e-12, 5e-8, 1e-6] {
            let values: Vec<f32> = crate::testing::numbers(3, 256).iter().map(|x| x * size).collect();
            let (found, zeros) = (error(format, &values), values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>());
            assert!(found <= zeros, "{format} {size:e}: {found:e} of {zeros:e}");
            // Exponents of eight bits reach further than f16.
            let near = if format == Format::MXFP4 { size > 1e-37 } else { size > 9e-7 };
            assert!(!near || found < 0.2 * zeros, "{format} {size:e}: {found:e} of {zeros:e}");
        }
    }
}

#[test]
fn numbers_that_cannot_be_written_are_named() {
    for &format in Format::all() {
        let mut values = vec![0.25; 3 * RUN];
        let mut out = vec![0; format.bytes_of(values.len()).unwrap()];
        values[2 * RUN + 5] = f32::NEG_INFINITY;
        values[RUN + 700] = f32::NAN;
        let Err(error) = format.encode(&values, &mut out) else { panic!("{format} took NaN") };
        assert_eq!(error.to_string(), format!("wanted finite numbers, found NaN at element {}", RUN + 700));
        values[RUN + 700] = 0.0;
        let error = format.encode(&values, &mut out).unwrap_err();
        assert_eq!(error, EncodeError::NotFinite { index: 2 * RUN + 5, value: f32::NEG_INFINITY });
        values.truncate(RUN + 1);
        if format.block_len() > 1 {
            let error = format.encode(&values, &mut out).unwrap_err().to_string();
            assert_eq!(error, format!("{format} wants a multiple of {} numbers, found 8193", format.block_len()));
        }
        assert!(format.can_encode());
    }
    let error = Format::F16.encode(&[1.0, -65_520.0], &mut [0; 4]).unwrap_err();
    assert_eq!(error.to_string(), "f16 holds magnitudes up to 6.5519996e4, found -6.552e4 at element 1");
    let error = Format::Bf16.encode(&[f32::MAX], &mut [0; 2]).unwrap_err();
    assert!(matches!(error, EncodeError::TooLarge { index: 0, .. }));
    let mut bytes = [0; 8];
    Format::Bf16.encode(&[1.0, -f32::from_bits(0x7f7f_7fff), 1.003_906_3, 1.011_718_8], &mut bytes).unwrap();
    assert_eq!(bytes, [0x80, 0x3f, 0x7f, 0xff, 0x80, 0x3f, 0x82, 0x3f]);
}
