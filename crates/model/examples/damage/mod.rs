//! Damage to files, for the fuzzers: texts of JSON, and safetensors files with a header of it.

use moebius_tensor::Rng;

/// Numbers that break careless readers.
const NUMBERS: [&str; 16] = [
    "0",
    "1",
    "2",
    "3",
    "4",
    "8",
    "-1",
    "1.5",
    "1e9",
    "65536",
    "16777216",
    "4294967296",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e400",
];

/// Other values, and pieces of JSON.
const VALUES: [&str; 13] = [
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "[0,0]",
    "[[[[",
    "\"../x\"",
    "\"F32\"",
    "\"BF16\"",
    "\"silu\"",
    "\"a\\n\\u001bb\"",
    ",",
];

/// Damages the header as text, keeping the length before it honest more often than not, or the file as bytes.
pub fn safetensors(file: &mut Vec<u8>, rng: &mut Rng) {
    let length = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    match rng.below(8) {
        0 => json(file, rng),
        1 => file.truncate(rng.below(file.len())),
        2 => file[..8].copy_from_slice(&hostile_length(rng).to_le_bytes()),
        3 => file.extend(std::iter::repeat_n(7, 1 + rng.below(64))),
        _ => {
            let mut header = file[8..8 + length].to_vec();
            json(&mut header, rng);
            let honest = if rng.below(8) == 0 { length } else { header.len() };
            let data = file.split_off(8 + length);
            *file = (honest as u64).to_le_bytes().to_vec();
            file.extend(header);
            file.extend(data);
        }
    }
}

fn hostile_length(rng: &mut Rng) -> u64 {
    let near = [0, 1, 8, 1 << 20, 100 << 20, 1 << 32, u64::MAX / 2, u64::MAX - 8, u64::MAX];
    near[rng.below(near.len())].wrapping_add(rng.below(9) as u64)
}

/// One to three changes of a text of JSON.
pub fn json(text: &mut Vec<u8>, rng: &mut Rng) {
    for _ in 0..1 + rng.below(3) {
        if text.is_empty() {
            return;
        }
        let at = rng.below(text.len());
        match rng.below(8) {
            0 => text[at] ^= 1 << rng.below(8),
            1 => text[at] = rng.below(256) as u8,
            2 => drop(text.drain(at..(at + 1 + rng.below(16)).min(text.len()))),
            3 => {
                // Something said twice: a key, a tensor, a bracket.
                let piece = text[at..(at + 1 + rng.below(80)).min(text.len())].to_vec();
                let to = rng.below(text.len());
                text.splice(to..to, piece);
            }
            4 => {
                let value = VALUES[rng.below(VALUES.len())];
                replace_value(text, at, value);
            }
            _ => {
                let number = NUMBERS[rng.below(NUMBERS.len())];
                replace_value(text, at, number);
            }
        }
    }
}

/// Puts `value` in the place of the first number at or after `at`, or of what follows a colon.
fn replace_value(text: &mut Vec<u8>, at: usize, value: &str) {
    let Some(start) = (at..text.len()).find(|&i| text[i].is_ascii_digit() || i > 0 && text[i - 1] == b':') else {
        return;
    };
    let end = (start..text.len()).find(|&i| matches!(text[i], b',' | b']' | b'}')).unwrap_or(text.len());
    text.splice(start..end, value.bytes());
}
