//! Sends generated hostile inputs through everything of this crate that reads outside bytes, and counts what came of them:
//!
//!     cargo run --release -p moebius-model --example fuzz_safetensors -- [INPUTS] [SEED]
//!
//! Half of the inputs are safetensors files, most of the rest configurations, and one in two hundred is a whole model
//! that is loaded. Each is a sound one damaged in some way. It must be read to the end or refused in one line that names the file;
//! what is accepted must be consistent. A panic, an empty message or an inconsistency ends with status 1 and the input.

mod damage;
mod judge;

use judge::Refusal;
use moebius_model::safetensors::SafetensorsFile;
use moebius_model::{Checkpoint, Model, families};
use moebius_tensor::Rng;
use std::process::ExitCode;
use std::time::Instant;

/// Sound configurations, in both spellings.
const CONFIGS: [&str; 3] = [
    r#"{"model_type":"mixtral","vocab_size":6,"hidden_size":4,"intermediate_size":2,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,"num_local_experts":2,"num_experts_per_tok":2,"max_position_embeddings":16,"rms_norm_eps":1e-5,"hidden_act":"silu","rope_theta":10000.0,"rope_scaling":null,"sliding_window":null,"tie_word_embeddings":true,"eos_token_id":[1,2],"torch_dtype":"float32"}"#,
    r#"{"model_type":"llama","vocab_size":6,"hidden_size":4,"intermediate_size":2,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,"head_dim":2,"max_position_embeddings":16,"rms_norm_eps":1e-5,"hidden_act":"silu","rope_parameters":{"rope_theta":10000.0,"rope_type":"default"},"tie_word_embeddings":true,"bos_token_id":0,"eos_token_id":1,"attention_bias":false,"dtype":"float32"}"#,
    r#"{"model_type":"mistral","vocab_size":6,"hidden_size":4,"intermediate_size":2,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,"head_dim":2,"max_position_embeddings":16,"rms_norm_eps":1e-5,"hidden_act":"silu","rope_theta":10000.0,"sliding_window":null,"tie_word_embeddings":true,"quantization_config":null}"#,
];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u64>().expect("a whole number"));
    let (inputs, seed) = (arguments.next().unwrap_or(1_000_000), arguments.next().unwrap_or(1));
    let mut rng = Rng::new(seed);
    let sound: Vec<Vec<u8>> = CONFIGS.iter().map(|config| sound_weights(config.as_bytes())).collect();
    std::panic::set_hook(Box::new(|_| {}));
    let begun = Instant::now();
    let mut counts = ["safetensors files", "configurations", "whole models"].map(|kind| (kind, [0u64; 2]));
    for number in 0..inputs {
        let family = rng.below(CONFIGS.len());
        let (mut config, mut weights) = (CONFIGS[family].as_bytes().to_vec(), sound[family].clone());
        let kind = if number % 200 == 199 { 2 } else { (number % 2) as usize };
        // In a whole model one or the other is damaged, so that the damage gets past the first reader.
        if kind == 0 || kind == 2 && rng.below(2) == 0 {
            damage::safetensors(&mut weights, &mut rng);
        } else {
            damage::json(&mut config, &mut rng);
        }
        let read = || match kind {
            0 => read_weights(&weights),
            1 => read_config(&config),
            _ => load_model(&config, &weights),
        };
        let fit = |message: &str| message.contains("config") || message.contains("safetensors");
        let problem = match judge::accepts(read, fit) {
            Ok(accepted) => {
                counts[kind].1[usize::from(!accepted)] += 1;
                continue;
            }
            Err(problem) => problem,
        };
        println!("input {number} of seed {seed}: {problem}");
        println!("config: {}\nweights: {}", config.escape_ascii(), weights.escape_ascii());
        return ExitCode::FAILURE;
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("{inputs} inputs of seed {seed} in {seconds:.1} s: no panic, nothing inconsistent accepted");
    for (kind, [accepted, refused]) in counts {
        println!("  {kind:<18} {accepted:>8} accepted {refused:>8} refused");
    }
    ExitCode::SUCCESS
}

fn read_weights(bytes: &[u8]) -> Result<(), Refusal> {
    let file = SafetensorsFile::from_bytes("model.safetensors", bytes)?;
    let mut taken = 0;
    for tensor in file.tensors() {
        let wanted = tensor.shape.iter().try_fold(tensor.dtype.size(), |product, &n| product.checked_mul(n));
        if wanted != Some(tensor.bytes.len()) {
            return Err(Refusal::Inconsistent(format!("{} has {} bytes", tensor.name, tensor.bytes.len())));
        }
        taken += tensor.bytes.len();
        let read = tensor.to_f32().is_ok() || tensor.to_i64().is_ok();
        let _ = read;
    }
    if taken > bytes.len() {
        return Err(Refusal::Inconsistent(format!("its tensors take {taken} of {} bytes", bytes.len())));
    }
    Ok(())
}

fn read_config(bytes: &[u8]) -> Result<(), Refusal> {
    let config = families::read_config(bytes, "config.json")?;
    if let Err((key, message)) = config.validate() {
        return Err(Refusal::Inconsistent(format!("{key}: {message}")));
    }
    let written = families::write_config(&config, "float32").to_string();
    let again = families::read_config(written.as_bytes(), "config.json (written again)")?;
    if again != config {
        return Err(Refusal::Inconsistent(format!("it is written as {written}")));
    }
    Ok(())
}

fn load_model(config: &[u8], weights: &[u8]) -> Result<(), Refusal> {
    let model = Model::load(&Checkpoint::from_bytes(config, weights)?)?;
    let elements: usize = model.params().iter().map(|param| param.value().data().len()).sum();
    if elements * 2 > weights.len() {
        return Err(Refusal::Inconsistent(format!("{elements} weights came from {} bytes", weights.len())));
    }
    Ok(())
}

/// A sound file of zeros for a configuration.
fn sound_weights(config: &[u8]) -> Vec<u8> {
    let config = families::read_config(config, "config.json").expect("a sound configuration");
    let mut end = 0;
    let entries: Vec<String> = families::tensors(&config)
        .iter()
        .map(|map| {
            let start = end;
            end += 4 * map.file_shape.iter().product::<usize>();
            let (name, shape) = (&map.file_name, &map.file_shape);
            format!(r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{end}]}}"#)
        })
        .collect();
    let header = format!(r#"{{"__metadata__":{{"format":"pt"}},{}}}"#, entries.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + end, 0);
    file
}
