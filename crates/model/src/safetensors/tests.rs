//! Hostile files: each gets one line that names the file and, where there is one, the tensor.

use super::*;
use proptest::prelude::*;

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 1);
    bytes
}

fn message(bytes: Vec<u8>) -> String {
    SafetensorsFile::from_bytes("f", bytes).err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn lies_are_found() {
    let entry =
        |shape: &str, offsets: &str| format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
    let cases = [
        (vec![1, 2], "f: wanted a safetensors file of at least 8 bytes, found 2"),
        (
            u64::MAX.to_le_bytes().to_vec(),
            "f: its first 8 bytes ask for a header of 18446744073709551615 bytes, 0 follow",
        ),
        (file("[]", 0), "f: the header is no list of tensors"),
        (file("{\"a\":1}", 0), "f: the header is no list of tensors"),
        (file(&entry("[2]", "[0,4]"), 4), "f: tensor `a`: F32 of shape [2] wants 8 bytes, its offsets hold 4"),
        (file(&entry("[1]", "[0,4]"), 3), "f: tensor `a`: wanted bytes within the 3 of the file's data, found 0 to 4"),
        (file(&entry("[1]", "[8,4]"), 9), "f: tensor `a`: wanted bytes within the 9 of the file's data, found 8 to 4"),
        (file(&entry("[1]", "[4,8]"), 8), "f: tensor `a`: wanted offset 0, found 4: leaves bytes unused before it"),
        (file(&entry("[1]", "[0,4]"), 5), "f: the tensors take 4 bytes, 5 follow the header"),
        (
            file(&entry("[4294967296,4294967296,4]", "[0,4]"), 4),
            "f: tensor `a`: its shape [4294967296, 4294967296, 4] overflows",
        ),
        (
            file(r#"{"a":{"dtype":"F3","shape":[],"data_offsets":[0,4]}}"#, 4),
            "f: the header is no list of tensors: unknown variant `F3`",
        ),
        (
            file(
                r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
                3,
            ),
            "f: tensor `b`: wanted offset 2, found 1: overlaps the tensor before it",
        ),
        (
            file(
                r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
                0,
            ),
            "f: tensor `a`: stands in the header twice",
        ),
    ];
    let names_with_line_ends = [
        (
            file(r#"{"a\nb":{"dtype":"U8","shape":[1],"data_offsets":[0,2]}}"#, 2),
            r"f: tensor `a\nb`: U8 of shape [1] wants",
        ),
        (
            file(r#"{"a":{"dtype":"\u001b\n","shape":[1],"data_offsets":[0,2]}}"#, 2),
            r"f: the header is no list of tensors: unknown variant `\u{1b}\n`",
        ),
    ];
    for (bytes, wanted) in cases.into_iter().chain(names_with_line_ends) {
        let found = message(bytes);
        assert!(found.starts_with(wanted) && !found.contains('\n'), "wanted {wanted}\n found {found}");
    }
    assert_eq!(message(file("{}", 0)), "");
    let mut bytes = file("{\"\u{e9}\":1}", 0);
    bytes[11] = 0xff;
    assert!(message(bytes).starts_with("f: the header is not UTF-8 at its byte 2"));
}

#[test]
fn what_is_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let floats = [1.0, -0.0, f32::INFINITY, 1.003_906_2, 3.3e38, 1e-40];
    let (whole, ids) = ([i64::MIN, 7], [u32::MAX]);
    write_safetensors(
        &path,
        &[
            TensorToWrite::f32("f", &[2, 3], &floats),
            TensorToWrite::new("b", &[6], TensorData::BF16(&floats)),
            TensorToWrite::new("i", &[2], TensorData::I64(&whole)),
            TensorToWrite::new("u", &[1, 1], TensorData::U32(&ids)),
        ],
    )
    .unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.tensor("f").unwrap().to_f32().unwrap()[..], floats);
    assert_eq!(file.tensor("f").unwrap().shape, [2, 3]);
    let rounded: Vec<f32> = floats.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
    assert_eq!(file.tensor("b").unwrap().to_f32().unwrap()[..], rounded);
    assert_eq!(file.tensor("i").unwrap().to_i64().unwrap(), whole);
    assert_eq!(file.tensor("u").unwrap().to_i64().unwrap(), [i64::from(u32::MAX)]);
    let missing = file.tensor("x").err().unwrap().to_string();
    assert!(missing.ends_with("t.safetensors: tensor `x`: missing"), "{missing}");
    let dtype = file.tensor("i").unwrap().to_f32().err().unwrap().to_string();
    assert!(dtype.ends_with("tensor `i`: wanted F32, F16 or BF16, found I64"), "{dtype}");
}

/// A header of entries that are right or nearly so.
fn nearly_right() -> impl Strategy<Value = Vec<u8>> {
    let dtype = prop::sample::select(vec!["F32", "BF16", "I64", "U8", "F33", ""]);
    let number = prop_oneof![0u64..6, Just(u64::MAX), Just(1 << 62), any::<u64>()];
    let entry = (dtype, prop::collection::vec(number.clone(), 0..4), number.clone(), number);
    (prop::collection::vec(("[a-c]{0,2}", entry), 0..4), 0usize..64, any::<Option<(u8, u8)>>()).prop_map(
        |(entries, data, flip)| {
            let entries: Vec<String> = entries
                .into_iter()
                .map(|(name, (dtype, shape, start, end))| {
                    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#)
                })
                .collect();
            let mut bytes = file(&format!("{{{}}}", entries.join(",")), data);
            if let Some((at, value)) = flip {
                let at = at as usize % bytes.len();
                bytes[at] ^= value;
            }
            bytes
        },
    )
}

proptest! {
    #[test]
    fn hostile_bytes_never_panic_and_what_is_accepted_is_consistent(
        bytes in prop_oneof![nearly_right(), prop::collection::vec(any::<u8>(), 0..200)],
    ) {
        if let Ok(file) = SafetensorsFile::from_bytes("f", bytes) {
            for tensor in file.tensors() {
                prop_assert_eq!(tensor.bytes.len(), tensor.shape.iter().product::<usize>() * tensor.dtype.size());
                let _ = tensor.to_f32();
                let _ = tensor.to_i64();
            }
        }
    }
}
