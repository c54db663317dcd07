//! Sends generated hostile GGUF files through everything of this crate that reads them, and counts what came of them:
//!
//!     cargo run --release -p moebius-model --example fuzz_gguf -- [INPUTS] [SEED]
//!
//! Each is a sound model damaged in some way; one in ten is loaded whole. It must be read to the end or refused in one
//! line that names the file; what is accepted must be consistent. A panic, an empty message or an inconsistency ends
//! with status 1 and the input.

mod judge;

use judge::Refusal;
use moebius_kernels::formats::Format;
use moebius_model::gguf::{ExportSettings, GgufFile, Value, write_model};
use moebius_model::{Checkpoint, Ffn, Model, ModelConfig, UniformDecoder};
use moebius_tensor::Rng;
use std::process::ExitCode;
use std::time::Instant;

const TOKENIZER: &[u8] = br#"{"added_tokens":[{"id":0,"content":"<|end|>","special":true}],
    "pre_tokenizer":{"type":"ByteLevel","use_regex":true},"post_processor":null,
    "model":{"type":"BPE","vocab":{"<|end|>":0,"a":1,"b":2,"ab":3},"merges":["a b"]}}"#;

/// Numbers that break careless readers.
const NUMBERS: [u64; 14] = [0, 1, 2, 4, 8, 9, 12, 31, 39, 1 << 16, 1 << 31, 1 << 32, u64::MAX / 2, u64::MAX];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u64>().expect("a whole number"));
    let (inputs, seed) = (arguments.next().unwrap_or(1_000_000), arguments.next().unwrap_or(1));
    let mut rng = Rng::new(seed);
    let sound: Vec<(Vec<u8>, usize)> =
        [(Ffn::dense(8), Format::F16), (Ffn::dense(32), Format::Q8_0), (Ffn::moe_of(2, 1, 32, true), Format::Q4_0)]
            .map(|(ffn, format)| sound(ffn, format))
            .to_vec();
    std::panic::set_hook(Box::new(|_| {}));
    let begun = Instant::now();
    let mut counts = [[0u64; 2]; 2];
    for number in 0..inputs {
        let (mut bytes, tables) = sound[rng.below(sound.len())].clone();
        damage(&mut bytes, tables, &mut rng);
        let whole = number % 10 == 9;
        let read = || if whole { load(&bytes) } else { read(&bytes) };
        let problem = match judge::accepts(read, |message| message.starts_with("m.gguf: ")) {
            Ok(accepted) => {
                counts[usize::from(whole)][usize::from(!accepted)] += 1;
                continue;
            }
            Err(problem) => problem,
        };
        println!("input {number} of seed {seed}: {problem}\n{}", bytes.escape_ascii());
        return ExitCode::FAILURE;
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("{inputs} inputs of seed {seed} in {seconds:.1} s: no panic, nothing inconsistent accepted");
    for (kind, [accepted, refused]) in ["files", "whole models"].iter().zip(counts) {
        println!("  {kind:<12} {accepted:>8} accepted {refused:>8} refused");
    }
    ExitCode::SUCCESS
}

/// A sound file, and where its tables end.
fn sound(ffn: Ffn, format: Format) -> (Vec<u8>, usize) {
    let moe = ffn.moe().is_some();
    let decoder = UniformDecoder {
        family: if moe { "mixtral" } else { "llama" },
        vocab_size: 6,
        hidden: 32,
        n_layers: 1,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 4,
        max_positions: 16,
        tie_embeddings: moe,
        ffn,
        ..UniformDecoder::default()
    };
    let config = ModelConfig { bos_token: Some(0), eos_tokens: vec![0, 1], ..decoder.config() };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("m.gguf");
    let model = Model::new(&config, 1).expect("a sound configuration");
    let settings = ExportSettings { format, name: None, tokenizer: Some(TOKENIZER), chat_template: None };
    write_model(&path, &model, &settings).expect("a sound model");
    let bytes = std::fs::read(&path).expect("the file");
    let file = GgufFile::from_bytes("m.gguf", &bytes[..]).expect("a sound file");
    let data: usize = file.tensors().map(|tensor| tensor.bytes.len().next_multiple_of(32)).sum();
    let tables = bytes.len() - data;
    drop(file);
    (bytes, tables)
}

fn read(bytes: &[u8]) -> Result<(), Refusal> {
    let file = GgufFile::from_bytes("m.gguf", bytes)?;
    let mut taken = 0;
    for tensor in file.tensors() {
        let elements = tensor.shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        if elements.and_then(|elements| tensor.format.bytes_of(elements)) != Some(tensor.bytes.len()) {
            return Err(Refusal::Inconsistent(format!("{} has {} bytes", tensor.name, tensor.bytes.len())));
        }
        taken += tensor.bytes.len();
        let mut values = vec![0.0; elements.unwrap_or_default()];
        tensor.read_f32(&mut values);
    }
    if taken > bytes.len() {
        return Err(Refusal::Inconsistent(format!("its tensors take {taken} of {} bytes", bytes.len())));
    }
    let metadata = file.metadata();
    for key in metadata.keys() {
        if let Some(Value::Array(array)) = metadata.get(key)? {
            let found = array.values().collect::<Result<Vec<_>, _>>()?.len();
            if found != array.len() {
                return Err(Refusal::Inconsistent(format!("{key} has {found} values of {}", array.len())));
            }
        }
    }
    Ok(())
}

fn load(bytes: &[u8]) -> Result<(), Refusal> {
    let model = Model::load(&Checkpoint::from_gguf(GgufFile::from_bytes("m.gguf", bytes)?)?)?;
    let elements: usize = model.params().iter().map(|param| param.value().data().len()).sum();
    if elements > 4 * bytes.len() {
        return Err(Refusal::Inconsistent(format!("{elements} weights came from {} bytes", bytes.len())));
    }
    Ok(())
}

/// One to three changes, most of them in the tables.
fn damage(bytes: &mut Vec<u8>, tables: usize, rng: &mut Rng) {
    for _ in 0..1 + rng.below(3) {
        let end = if rng.below(8) == 0 { bytes.len() } else { tables.min(bytes.len()) };
        if end < 9 {
            return;
        }
        let at = rng.below(end - 8);
        let number = NUMBERS[rng.below(NUMBERS.len())].wrapping_add(rng.below(3) as u64).to_le_bytes();
        match rng.below(9) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.below(256) as u8,
            2 => drop(bytes.drain(at..at + 1 + rng.below(8))),
            3 => {
                let piece = bytes[at..(at + 1 + rng.below(80)).min(end)].to_vec();
                let to = rng.below(end);
                bytes.splice(to..to, piece);
            }
            4 => bytes.truncate(at),
            5 => bytes[at..at + 4].copy_from_slice(&number[..4]),
            6 => bytes[at..at + 8].copy_from_slice(&number),
            // A number that was there, a little other.
            7 => bytes[at] = bytes[at].wrapping_add(1 + rng.below(2) as u8),
            _ => {
                let from = rng.below(end - 8);
                bytes.copy_within(from..from + 8, at);
            }
        }
    }
}
