//! `moebius bench`: speed of prefill and decode, as rates and as shares of what the machine can do.

mod report;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use moebius_engine::bench::{self, BenchOptions};
use moebius_kernels::gemm::Precision;
use moebius_kernels::isa::Isa;
use moebius_kernels::machine::{self, Operands};
use moebius_model::{Model, ModelConfig, RunFormat, shapes};

use crate::arguments::BenchArguments;
use crate::models::Source;
use crate::{memory, output};
use report::{Machine, Report};

/// Memory that is read to measure its speed: many times any cache.
const BANDWIDTH_BYTES: usize = 1 << 29;

/// How long each of the machine's limits is measured.
const LIMIT_TIME: Duration = Duration::from_millis(500);

/// The random weights' seed.
const SEED: u64 = 1;

/// Runs the command.
///
/// # Errors
/// A model that cannot be read, a shape that nobody knows or that does not fit into memory, sequences longer than the
/// model's context, an output that cannot be written.
pub fn execute(arguments: &BenchArguments) -> anyhow::Result<ExitCode> {
    let (precision, asked) = (Precision::from(arguments.precision.dtype), arguments.precision.weights);
    let or = arguments.precision.dtype.weights();
    if let (Some(shape), Some(folder)) = (&arguments.random_weights, &arguments.out) {
        shapes::write_random(folder, &published(shape)?, SEED)?;
        output::note(&format!("{}: written in bf16", folder.display()));
        return Ok(ExitCode::SUCCESS);
    }
    let started = Instant::now();
    let (name, model) = match &arguments.random_weights {
        Some(shape) => (format!("{shape}, random weights"), random_model(shape, asked.unwrap_or(or))?),
        None => {
            let name = arguments.model.as_ref().map_or("shipped".into(), |path| path.display().to_string());
            (name, Source::new(arguments.model.as_deref()).model_to_run(asked, or)?)
        }
    };
    let load_seconds = started.elapsed().as_secs_f64();
    let options = options(arguments, &model);
    options.check(&model)?;
    output::note(&format!("{name}: loaded in {load_seconds:.2} s"));
    let result = bench::measure(&model, precision, &options, &mut output::note)?;
    // Before the machine is measured, which takes memory of its own.
    let (resident_bytes, peak_bytes) = (memory::resident(), memory::peak());
    let machine = measure_machine(precision);
    let batch = options.batch;
    let report =
        Report { name, model: &model, precision, machine, load_seconds, batch, resident_bytes, peak_bytes, result };
    output::print(&if arguments.json { report.json() } else { report.table() })?;
    Ok(ExitCode::SUCCESS)
}

fn options(arguments: &BenchArguments, model: &Model) -> BenchOptions {
    let (default, decode) = (BenchOptions::default(), arguments.decode.get());
    let longest = BenchOptions::longest_prefill(model, decode).max(1);
    BenchOptions {
        prefill: arguments.prefill.map_or(default.prefill.min(longest), usize::from),
        decode,
        batch: arguments.batch.map_or(default.batch, usize::from),
        rounds: arguments.rounds.get(),
        ..default
    }
}

fn measure_machine(precision: Precision) -> Machine {
    let isa = Isa::current();
    let operands = match precision {
        Precision::F32 => Operands::F32,
        Precision::Bf16 => Operands::Bf16,
    };
    output::note("measuring the machine");
    Machine {
        isa,
        threads: rayon::current_num_threads(),
        read_bandwidth: machine::read_bandwidth(BANDWIDTH_BYTES, LIMIT_TIME),
        peak_operations: machine::peak_operations(isa, operands, LIMIT_TIME),
        peak_byte_operations: machine::peak_operations(isa, Operands::Bytes, LIMIT_TIME),
    }
}

fn published(shape: &str) -> anyhow::Result<ModelConfig> {
    shapes::published(shape).map_err(|message| anyhow!("--random-weights {shape}: {message}"))
}

/// The shape with random weights, if memory holds them.
fn random_model(shape: &str, format: RunFormat) -> anyhow::Result<Model> {
    let config = published(shape)?;
    if let Some(available) = memory::available() {
        check_memory(shape, &config, format, available)?;
    }
    let weights = config.count_weights_of(config.n_layers()) as usize;
    output::note(&format!("{shape}: drawing {} weights", output::count(weights)));
    Ok(Model::random_for_speed(&config, SEED, format)?)
}

/// An error that says what would fit.
fn check_memory(shape: &str, config: &ModelConfig, format: RunFormat, available: u64) -> anyhow::Result<()> {
    let needed = |layers| (config.count_weights_of(layers) as f64 * format.bits() / 8.0) as u64;
    let n_layers = config.n_layers();
    if needed(n_layers) <= available {
        return Ok(());
    }
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    let fitting = (1..n_layers).rev().find(|&layers| needed(layers) <= available);
    let name = shape.split(':').next().unwrap_or(shape);
    let advice = match fitting {
        Some(layers) => format!("{name}:{layers} would fit"),
        None => "not even one layer fits".into(),
    };
    bail!(
        "--random-weights {shape}: needs {:.1} GB of memory, {:.1} GB are available: {advice}",
        gigabytes(needed(n_layers)),
        gigabytes(available)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_that_does_not_fit_says_what_would() {
        let config = shapes::published("olmoe-1b-7b").unwrap();
        let check = |available| check_memory("olmoe-1b-7b", &config, RunFormat::Bf16, available);
        assert!(check(1 << 40).is_ok());
        let message = check(7_000_000_000).unwrap_err().to_string();
        assert!(message.contains("13.8 GB") && message.contains("7.0 GB"), "{message}");
        assert!(message.contains("olmoe-1b-7b:7 would fit"), "{message}");
        assert!(check(1000).unwrap_err().to_string().contains("not even one layer"));
    }

    #[test]
    fn the_count_is_the_models() {
        let config = ModelConfig { vocab_size: 64, ..shapes::published("olmoe-1b-7b:1").unwrap() };
        // OLMoE-1B-7B: 6.92 billion in all.
        let whole = shapes::published("olmoe-1b-7b").unwrap();
        assert!((6.90e9..6.93e9).contains(&(whole.count_weights_of(16) as f64)));
        assert_eq!(
            config.count_weights_of(1) as usize - config.count_weights_of(0) as usize,
            2048 * (2 * 32 * 128 + 64 * (3 * 1024 + 1))
        );
    }
}
