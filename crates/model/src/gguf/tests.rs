//! Files written and read, and hostile ones: each gets one line that names the file and the key or tensor.

use super::*;

fn text(bytes: &str) -> Vec<u8> {
    [(bytes.len() as u64).to_le_bytes().as_slice(), bytes.as_bytes()].concat()
}

/// A field of the metadata.
fn field(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [text(key), kind.to_le_bytes().to_vec(), value.to_vec()].concat()
}

/// A line of the tensor table.
fn entry(name: &str, dimensions: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut all = text(name);
    all.extend((dimensions.len() as u32).to_le_bytes());
    dimensions.iter().for_each(|n| all.extend(n.to_le_bytes()));
    all.extend(kind.to_le_bytes());
    all.extend(offset.to_le_bytes());
    all
}

/// A file of these tables and `data` bytes behind them.
fn file(fields: &[Vec<u8>], entries: &[Vec<u8>], data: usize) -> Vec<u8> {
    let mut all = b"GGUF\x03\0\0\0".to_vec();
    all.extend((entries.len() as u64).to_le_bytes());
    all.extend((fields.len() as u64).to_le_bytes());
    all.extend(fields.concat());
    all.extend(entries.concat());
    all.resize(all.len().next_multiple_of(32) + data, 0);
    all
}

fn message(bytes: Vec<u8>) -> String {
    GgufFile::from_bytes("f", bytes).err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn lies_are_found() {
    let f32s = |offset| entry("a", &[4], 0, offset);
    let aligned = |value: u32| field("general.alignment", 4, &value.to_le_bytes());
    let count = u64::MAX.to_le_bytes();
    let cases = [
        (b"GG".to_vec(), "f: wanted 4 bytes of the mark `GGUF` at byte 0, 2 are left"),
        (b"PK\x03\x04".to_vec(), r"f: wanted a GGUF file, which begins with `GGUF`, found `PK\x03\x04`"),
        (b"GGUF\0\0\0\x03".to_vec(), "f: wanted GGUF of version 2 or 3, little-endian, found a big-endian file"),
        (b"GGUF\x01\0\0\0".to_vec(), "f: wanted GGUF of version 2 or 3, little-endian, found version 1"),
        ([b"GGUF\x02\0\0\0".as_slice(), &count, &count].concat(), "f: wanted 8 bytes of a key at byte 24, 0 are left"),
        (file(&[field("k", 13, &[])], &[], 0), "f: `k`: wanted a value of type 0 to 12, found 13"),
        (file(&[field("k", 9, &[9, 0, 0, 0])], &[], 0), "f: `k`: is an array of arrays"),
        (
            file(&[field("k", 9, &[[4, 0, 0, 0].as_slice(), &count].concat())], &[], 0),
            "f: wanted 18446744073709551615 bytes of the value of `k` at byte 49, 15 are left",
        ),
        (file(&[field("k", 8, &count)], &[], 0), "f: wanted 18446744073709551615 bytes of a text of the metadata"),
        (file(&[field("k", 7, &[1]), field("k", 0, &[1])], &[], 0), "f: `k`: stands in the metadata twice"),
        (file(&[aligned(3)], &[], 0), "f: `general.alignment`: wanted a power of two, found 3"),
        (file(&[aligned(0)], &[], 0), "f: `general.alignment`: wanted a power of two, found 0"),
        (file(&[], &[entry("a", &[1; 5], 0, 0)], 64), "f: tensor `a`: wanted up to 4 dimensions, found 5"),
        (
            file(&[], &[entry("a", &[4], 4, 0)], 64),
            "f: tensor `a`: its type is ggml's number 4, which is not known here",
        ),
        (file(&[], &[entry("a", &[1 << 40, 1 << 40], 0, 0)], 64), "f: tensor `a`: its dimensions [1099511627776, "),
        (
            file(&[], &[entry("a", &[u64::MAX], 0, 0)], 64),
            "f: tensor `a`: its dimensions [18446744073709551615] overflow",
        ),
        (file(&[], &[entry("a", &[48, 2], 8, 0)], 99), "f: tensor `a`: q8_0 wants rows of a multiple of 32, found 48"),
        (file(&[], &[f32s(8)], 64), "f: tensor `a`: wanted an offset that is a multiple of 32, found 8"),
        (
            file(&[], &[f32s(64)], 64),
            "f: tensor `a`: wanted 16 bytes at offset 64 of the data, which begins at byte 64; the file has 128",
        ),
        (file(&[], &[f32s(u64::MAX - 31)], 64), "f: tensor `a`: wanted 16 bytes at offset 18446744073709551584"),
        (
            file(&[], &[entry("a", &[16], 0, 0), entry("b", &[2], 0, 32)], 64),
            "f: tensor `b`: wanted bytes behind those of `a`, which end at 160, found 128: overlap",
        ),
        (file(&[], &[f32s(0), f32s(32)], 64), "f: tensor `a`: stands in the table twice"),
        (file(&[], &[entry("a\n", &[4], 99, 0)], 64), r"f: tensor `a\n`: its type is ggml's number 99"),
    ];
    for (bytes, wanted) in cases {
        let found = message(bytes);
        assert!(found.starts_with(wanted) && !found.contains('\n'), "wanted {wanted}\n found {found}");
    }
    assert_eq!(message(file(&[aligned(64)], &[], 0)), "");
    let mut bytes = file(&[field("kk", 0, &[1])], &[], 0);
    bytes[33] = 0xff;
    assert_eq!(message(bytes), "f: a key at byte 24 is not UTF-8 at its byte 1");
}

#[test]
fn every_cut_of_a_file_is_refused() {
    let texts = [[8u32.to_le_bytes().as_slice(), &2u64.to_le_bytes()].concat(), text("x"), text("yz")].concat();
    let fields = [field("k", 9, &texts), field("n", 4, &[7, 0, 0, 0])];
    let whole = file(&fields, &[entry("a", &[32, 2], 8, 0)], 68);
    assert_eq!(message(whole.clone()), "");
    for length in 0..whole.len() {
        assert!(message(whole[..length].to_vec()).starts_with("f: "), "{length} bytes");
    }
}

fn written(metadata: &[MetadataToWrite], tensors: &[WeightToWrite]) -> Result<GgufFile<'static>, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.gguf");
    let result = write_gguf(&path, metadata, tensors);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), usize::from(result.is_ok()), "whole or not at all");
    result?;
    GgufFile::open(&path)
}

fn weight<'a>(name: &str, shape: &[usize], format: Format, data: &'a [f32]) -> WeightToWrite<'a> {
    let columns = *shape.last().unwrap();
    let values: Values =
        Box::new(move |rows, out| out.copy_from_slice(&data[rows.start * columns..rows.end * columns]));
    WeightToWrite { name: name.into(), shape: shape.to_vec(), format, values }
}

#[test]
fn what_is_written_is_read() {
    let data: Vec<f32> = (0..2 * 3 * 256).map(|i| (i as f32 * 0.37).sin()).collect();
    let metadata = [
        ("a.u32".into(), ValueToWrite::U32(u32::MAX)),
        ("a.i32".into(), ValueToWrite::I32(-5)),
        ("a.f32".into(), ValueToWrite::F32(1e-5)),
        ("a.flag".into(), ValueToWrite::Bool(true)),
        ("a.text".into(), ValueToWrite::Text("Ġ\n".into())),
        ("a.texts".into(), ValueToWrite::Texts(vec!["".into(), "ab".into(), "é".into()])),
        ("a.f32s".into(), ValueToWrite::F32s(vec![0.5, -1.0])),
        ("a.i32s".into(), ValueToWrite::I32s(vec![1, -3])),
    ];
    for &format in Format::all() {
        let file =
            written(&metadata, &[weight("v", &[5], Format::F32, &data[..5]), weight("m", &[2, 3, 256], format, &data)])
                .unwrap();
        let tensor = file.get("m").unwrap();
        assert_eq!((tensor.format, tensor.shape), (format, &[2, 3, 256][..]));
        let mut bytes = vec![0; format.bytes_of(data.len()).unwrap()];
        format.encode(&data, &mut bytes).unwrap();
        assert_eq!(tensor.bytes, bytes, "{format}");
        assert_eq!(tensor.rows(3, 1), &bytes[bytes.len() / 2..][..bytes.len() / 6]);
        let mut vector = [0.0; 5];
        file.get("v").unwrap().read_f32(&mut vector);
        assert_eq!(vector, data[..5]);
        assert!(file.get("w").is_none());
        assert_eq!(file.tensors().map(|tensor| tensor.name).collect::<Vec<_>>(), ["v", "m"]);
    }
    let file = written(&metadata, &[]).unwrap();
    let read = file.metadata();
    assert_eq!(read.keys().count(), 8);
    assert_eq!((read.u32("a.u32").unwrap(), read.f32("a.f32").unwrap(), read.has("b")), (u32::MAX, 1e-5, false));
    assert_eq!(read.get("a.i32").unwrap(), Some(Value::Whole(-5)));
    assert_eq!((read.optional_flag("a.flag").unwrap(), read.text("a.text").unwrap()), (Some(true), "Ġ\n"));
    assert_eq!(read.array("a.texts").unwrap().texts().unwrap(), ["", "ab", "é"]);
    assert_eq!(read.array("a.f32s").unwrap().f32s().unwrap(), [0.5, -1.0]);
    assert_eq!(read.array("a.i32s").unwrap().i32s().unwrap(), [1, -3]);
    let complaint =
        |result: Result<u32, ModelError>| result.unwrap_err().to_string().split_once(": ").unwrap().1.to_string();
    assert_eq!(complaint(read.u32("a.i32")), "`a.i32`: wanted a whole number of 32 bits, found -5");
    assert_eq!(complaint(read.u32("b")), "`b`: wanted a whole number of 32 bits, found nothing");
    assert_eq!(complaint(read.u32("a.texts")), "`a.texts`: wanted a whole number of 32 bits, found an array of 3");
    let floats = read.array("a.i32s").unwrap().f32s().unwrap_err().to_string();
    assert!(floats.ends_with("`a.i32s`: wanted numbers of 32 bits, found 1"), "{floats}");
}

#[test]
fn what_cannot_be_stored_is_named_and_leaves_nothing() {
    let data = [1.0, f32::NAN, 0.0, 0.0];
    let error = written(&[], &[weight("m", &[2, 2], Format::F16, &data)]).err().unwrap().to_string();
    assert!(error.ends_with("tensor `m`: wanted finite numbers, found NaN at element 1 from row 0 on"), "{error}");
    let error = written(&[], &[weight("m", &[2, 2], Format::Q4_0, &data)]).err().unwrap().to_string();
    assert!(error.ends_with("tensor `m`: q4_0 wants rows of a multiple of 32, found shape [2, 2]"), "{error}");
}
