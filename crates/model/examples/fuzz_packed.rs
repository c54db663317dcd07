//! Sends damaged packed models through everything of this crate that reads them, and counts what came of them:
//!
//!     cargo run --release -p moebius-model --example fuzz_packed -- [INPUTS] [SEED]
//!
//! Each is a sound folder whose `packed.json`, `config.json` or header of `packed.safetensors` is damaged. It must be
//! refused in one line that names the file, or be a model that fits its file, runs, and is surveyed. A panic, an empty
//! message or an inconsistency ends with status 1 and the input.

mod damage;
mod judge;

use judge::Refusal;
use moebius_kernels::formats::Format;
use moebius_kernels::gemm::Precision;
use moebius_model::checkpoint::StoredAs;
use moebius_model::packed::save_packed;
use moebius_model::{Batch, Checkpoint, Ffn, Model, RunFormat, Silent, Survey, UniformDecoder, save_model};
use moebius_tensor::{Graph, Rng};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// The files that are damaged.
const FILES: [&str; 3] = ["packed.json", "config.json", "packed.safetensors"];

/// What a matrix may be said to be held in.
const FORMATS: [&str; 6] = ["f32", "bf16", "q8_0", "q4_0", "q4_k", "f16"];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u64>().expect("a whole number"));
    let (inputs, seed) = (arguments.next().unwrap_or(100_000), arguments.next().unwrap_or(1));
    let mut rng = Rng::new(seed);
    let experts = || Ffn::moe_of(2, 1, 32, true);
    let sound = [
        (Ffn::dense(8), RunFormat::F32),
        (Ffn::dense(8), RunFormat::Bf16),
        (experts(), RunFormat::Bf16),
        (experts(), RunFormat::Block(Format::Q8_0)),
        (experts(), RunFormat::Block(Format::Q4_0)),
    ]
    .map(|(ffn, format)| sound(ffn, format));
    let folder = tempfile::tempdir().expect("a folder");
    std::panic::set_hook(Box::new(|_| {}));
    let begun = Instant::now();
    let mut counts = [[0u64; 2]; FILES.len()];
    for number in 0..inputs {
        let (mut files, kind) = (sound[rng.below(sound.len())].clone(), rng.below(FILES.len()));
        match kind {
            2 => damage_weights(&mut files[2], &mut rng),
            _ if rng.below(4) == 0 => rename_format(&mut files[kind], &mut rng),
            _ => damage::json(&mut files[kind], &mut rng),
        }
        FILES.iter().zip(&files).for_each(|(name, bytes)| write(&folder.path().join(name), bytes));
        let read = || open(folder.path(), files[2].len());
        let problem = match judge::accepts(read, |message| FILES.iter().any(|file| message.contains(file))) {
            Ok(accepted) => {
                counts[kind][usize::from(!accepted)] += 1;
                continue;
            }
            Err(problem) => problem,
        };
        println!("input {number} of seed {seed}: {problem}");
        FILES.iter().zip(&files).for_each(|(name, bytes)| println!("{name}: {}", bytes.escape_ascii()));
        return ExitCode::FAILURE;
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("{inputs} inputs of seed {seed} in {seconds:.1} s: no panic, nothing inconsistent accepted");
    for (file, [accepted, refused]) in FILES.iter().zip(counts) {
        println!("  {file:<18} {accepted:>8} run {refused:>8} refused");
    }
    ExitCode::SUCCESS
}

/// The files of a sound folder.
fn sound(ffn: Ffn, format: RunFormat) -> [Vec<u8>; 3] {
    let decoder = UniformDecoder {
        family: if ffn.moe().is_some() { "mixtral" } else { "llama" },
        vocab_size: 6,
        hidden: 32,
        n_layers: 1,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 4,
        max_positions: 16,
        tie_embeddings: ffn.moe().is_none(),
        ffn,
        ..UniformDecoder::default()
    };
    let [folder, packed] = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
    let model = Model::new(&decoder.config(), 1).expect("a sound configuration");
    save_model(folder.path(), &model, StoredAs::F32).expect("a sound model");
    let checkpoint = Checkpoint::open(folder.path()).expect("what was saved");
    let model = Model::load_to_run(&checkpoint, format, &mut |_| ()).expect("what was saved");
    save_packed(packed.path(), &model, &mut |_| ()).expect("a sound model");
    let files = FILES.map(|name| std::fs::read(packed.path().join(name)).expect("what was packed"));
    assert!(open(packed.path(), files[2].len()).is_ok());
    files
}

/// Writes another file: who has mapped the old one keeps it.
fn write(path: &Path, bytes: &[u8]) {
    let _ = std::fs::remove_file(path);
    std::fs::write(path, bytes).expect("room for a small file");
}

fn open(folder: &Path, weights: usize) -> Result<(), Refusal> {
    let model = Model::open_packed(folder)?;
    let bytes: usize = model.params().iter().map(|param| param.bytes()).sum();
    if bytes > weights {
        return Err(Refusal::Inconsistent(format!("its weights take {bytes} of {weights} bytes")));
    }
    if let Err(error) = Survey::open(folder) {
        return Err(Refusal::Inconsistent(format!("a survey says {error}")));
    }
    let vocabulary = model.config.vocab_size;
    let length = model.config.max_positions.min(5);
    let tokens: Vec<u32> = (0..length).map(|at| (3 * at % vocabulary) as u32).collect();
    let graph = Graph::inference(Precision::Bf16);
    let logits = model.forward(&graph, &Batch::of_sequences(&[tokens]), None, &mut Silent);
    match logits.map(|hidden| model.logits(&graph, &hidden).data().len()) {
        Ok(found) if found == length * vocabulary => Ok(()),
        Ok(found) => Err(Refusal::Inconsistent(format!("{found} logits came of {length} tokens"))),
        Err(error) => Err(Refusal::Inconsistent(format!("it does not run: {error}"))),
    }
}

/// Says of one matrix that it is held in another format.
fn rename_format(text: &mut Vec<u8>, rng: &mut Rng) {
    let (at, name) = (rng.below(text.len()), FORMATS[rng.below(FORMATS.len())]);
    let quoted = |name: &str| format!("\"{name}\"").into_bytes();
    for from in FORMATS.map(quoted) {
        if let Some(found) = text[at..].windows(from.len()).position(|window| window == from) {
            text.splice(at + found..at + found + from.len(), quoted(name));
            return;
        }
    }
}

/// Damages the header, more often than not with the padding behind it so long that the data stay where they were.
fn damage_weights(file: &mut Vec<u8>, rng: &mut Rng) {
    if rng.below(4) == 0 {
        return damage::safetensors(file, rng);
    }
    let end = 8 + u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let mut header = file[8..end].trim_ascii_end().to_vec();
    damage::json(&mut header, rng);
    header.resize(header.len().max(end - 8), b' ');
    let data = file.split_off(end);
    *file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
}
