//! Shapes of published models, for measuring speed without a download: configurations, and random weights for them.

use crate::checkpoint::{StoredAs, save_tensors};
use crate::running::{is_matrix, pack_matrices};
use crate::safetensors::{TensorData, TensorToWrite};
use crate::{Ffn, Model, ModelConfig, ModelError, QkNorm, RunFormat, UniformDecoder, families};
use moebius_kernels::parallel;
use moebius_tensor::{Param, Tensor};
use std::ops::Range;
use std::path::Path;

/// A published model's sizes.
struct PublishedShape {
    name: &'static str,
    /// The family that [`ModelConfig::family`] names.
    family: &'static str,
    qk_norm: QkNorm,
    layers: usize,
    hidden: usize,
    heads: [usize; 2],
    experts: [usize; 2],
    width: usize,
    vocab: usize,
    rope_theta: f64,
    renormalise: bool,
}

/// Width of a head in all of them.
const HEAD_DIM: usize = 128;

/// Positions: enough for measuring, whatever the published model has.
const MAX_POSITIONS: usize = 1 << 15;

const PUBLISHED: [PublishedShape; 3] = [
    PublishedShape {
        name: "olmoe-1b-7b",
        family: "olmoe",
        qk_norm: QkNorm::Projection,
        layers: 16,
        hidden: 2048,
        heads: [16, 16],
        experts: [64, 8],
        width: 1024,
        vocab: 50304,
        rope_theta: 1e4,
        renormalise: false,
    },
    PublishedShape {
        name: "qwen3-30b-a3b",
        family: "qwen3_moe",
        qk_norm: QkNorm::Head,
        layers: 48,
        hidden: 2048,
        heads: [32, 4],
        experts: [128, 8],
        width: 768,
        vocab: 151_936,
        rope_theta: 1e6,
        renormalise: true,
    },
    PublishedShape {
        name: "mixtral-8x7b",
        family: "mixtral",
        qk_norm: QkNorm::None,
        layers: 32,
        hidden: 4096,
        heads: [32, 8],
        experts: [8, 2],
        width: 14336,
        vocab: 32000,
        rope_theta: 1e6,
        renormalise: true,
    },
];

/// The configuration that `name`, `name:layers` or `name:layers:vocabulary` says: a published model, whole or cut to its
/// first layers and tokens.
///
/// # Errors
/// What was wanted, and what was found.
pub fn published(text: &str) -> Result<ModelConfig, String> {
    let mut parts = text.split(':');
    let name = parts.next().unwrap_or_default();
    let Some(shape) = PUBLISHED.iter().find(|shape| shape.name == name) else {
        let known: Vec<&str> = PUBLISHED.iter().map(|shape| shape.name).collect();
        return Err(format!("wanted one of {}, perhaps with :LAYERS behind it, found `{name}`", known.join(", ")));
    };
    let mut cut = |what: &str, whole: usize| match parts.next() {
        None => Ok(whole),
        Some(part) => match part.parse() {
            Ok(size) if (1..=whole).contains(&size) => Ok(size),
            _ => Err(format!("wanted 1 to {whole} {what}, found `{part}`")),
        },
    };
    let (n_layers, vocab_size) = (cut("layers", shape.layers)?, cut("tokens of vocabulary", shape.vocab)?);
    if let Some(surplus) = parts.next() {
        return Err(format!("wanted NAME:LAYERS:VOCABULARY, found `:{surplus}` behind it"));
    }
    let decoder = UniformDecoder {
        family: shape.family,
        vocab_size,
        hidden: shape.hidden,
        n_layers,
        n_heads: shape.heads[0],
        n_kv_heads: shape.heads[1],
        head_dim: HEAD_DIM,
        max_positions: MAX_POSITIONS,
        rope_theta: shape.rope_theta,
        qk_norm: shape.qk_norm,
        ffn: Ffn::moe_of(shape.experts[0], shape.experts[1], shape.width, shape.renormalise),
        ..UniformDecoder::default()
    };
    Ok(decoder.config())
}

/// Numbers that one thread draws at a time.
const CHUNK: usize = 1 << 16;

/// Normal numbers are looked up by this many random bits.
const TABLE_BITS: u32 = 12;

/// Normal numbers out of one random word.
const PER_WORD: usize = (u64::BITS / TABLE_BITS) as usize;

impl Model {
    /// Random weights that keep activations of ordinary size and spread tokens evenly over experts, made quickly on all
    /// threads: the same for any number of them, and the same as [`write_random`] writes but for the rounding.
    ///
    /// The embedding dominates the residual stream, so each token keeps a direction of its own up to the last layer;
    /// without that, deep layers of random weights send most tokens to the same experts, and a benchmark would flatter
    /// caches.
    ///
    /// # Errors
    /// A contradictory configuration.
    pub fn random_for_speed(config: &ModelConfig, seed: u64, format: RunFormat) -> Result<Self, ModelError> {
        let table = normal_table();
        Self::build(config, &mut |id, name, shape| {
            let weight = RandomWeight::new(name, shape, seed, &table);
            if is_matrix(name, shape) {
                let mut fill = |rows: Range<usize>, out: &mut [f32]| {
                    weight.fill(rows.start * shape[shape.len() - 1], out);
                    Ok(())
                };
                return Ok(Param::frozen(id, name, shape, pack_matrices(name, shape, format, &mut fill)?)?);
            }
            let mut value = Tensor::zeros(shape);
            weight.fill(0, value.data_mut());
            Ok(Param::new(id, name, value))
        })
    }
}

/// Writes a folder in Hugging Face's layout with the weights of [`Model::random_for_speed`] in bf16, drawn while they are
/// written: memory does not have to hold them.
///
/// # Errors
/// A contradictory configuration, or what the system says; nothing is left behind then.
pub fn write_random(folder: &Path, config: &ModelConfig, seed: u64) -> Result<(), ModelError> {
    config.validate().map_err(|(key, message)| ModelError::config("configuration", key, message))?;
    let (table, maps) = (normal_table(), families::tensors(config));
    if let Some(map) = maps.iter().find(|map| !map.is_whole()) {
        let message = format!("wanted tensors that are parts of one weight, found {}", map.file_name);
        return Err(ModelError::config("random weights", "family", message));
    }
    let weights: Vec<RandomWeight> =
        maps.iter().map(|map| RandomWeight::new(&map.param, &map.file_shape, seed, &table)).collect();
    let makers: Vec<_> = (maps.iter().zip(&weights))
        .map(|(map, weight)| {
            let first = map.rows.start * map.cols;
            move |at: usize, out: &mut [f32]| weight.fill(first + at, out)
        })
        .collect();
    let tensors: Vec<TensorToWrite> = (maps.iter().zip(&makers))
        .map(|(map, make)| TensorToWrite::new(&map.file_name, &map.file_shape, TensorData::MadeBF16(make)))
        .collect();
    save_tensors(folder, config, &tensors, StoredAs::Bf16)
}

/// One weight's numbers, each of which follows from its place alone.
struct RandomWeight<'t> {
    seed: u64,
    /// None: all are one.
    deviation: Option<f32>,
    table: &'t [f32],
}

impl<'t> RandomWeight<'t> {
    /// `shape` may be that of a part of the weight.
    fn new(name: &str, shape: &[usize], seed: u64, table: &'t [f32]) -> Self {
        let inputs = shape.last().map_or(1.0, |&inputs| inputs as f32);
        let deviation = match name.rsplit('.').next() {
            Some(last) if last.ends_with("bias") => Some(0.0),
            _ if shape.len() < 2 => None,
            Some("embedding") => Some(1.0),
            Some("o") => Some(0.2 / inputs.sqrt()),
            _ => Some(1.0 / inputs.sqrt()),
        };
        Self { seed: name.bytes().fold(mix(seed), |hash, byte| mix(hash ^ u64::from(byte))), deviation, table }
    }

    /// The numbers from place `first` on.
    fn fill(&self, first: usize, out: &mut [f32]) {
        let Some(deviation) = self.deviation else { return out.fill(1.0) };
        parallel::for_each_chunk(out, CHUNK, CHUNK, |offset, chunk| {
            let mut place = first + offset;
            let mut rest = chunk;
            while !rest.is_empty() {
                let (word, skipped) = (place / PER_WORD, place % PER_WORD);
                let mut bits = mix(self.seed.wrapping_add(GOLDEN.wrapping_mul(word as u64 + 1)));
                bits >>= skipped as u32 * TABLE_BITS;
                let count = (PER_WORD - skipped).min(rest.len());
                let (now, later) = rest.split_at_mut(count);
                for x in now {
                    *x = self.table[bits as usize & (self.table.len() - 1)] * deviation;
                    bits >>= TABLE_BITS;
                }
                place += count;
                rest = later;
            }
        });
    }
}

/// The middles of equally likely slices of the normal distribution.
fn normal_table() -> Vec<f32> {
    let count = 1usize << TABLE_BITS;
    // Slices of one side by summing the density; coarse steps would show in the tails alone.
    let (step, mut at, mut below) = (1e-4, 0.0f64, 0.5f64);
    let upper: Vec<f32> = (count / 2..count)
        .map(|slice| {
            let wanted = (slice as f64 + 0.5) / count as f64;
            while below < wanted {
                below += (-0.5 * (at + 0.5 * step) * (at + 0.5 * step)).exp() / std::f64::consts::TAU.sqrt() * step;
                at += step;
            }
            at as f32
        })
        .collect();
    upper.iter().rev().map(|x| -x).chain(upper.iter().copied()).collect()
}

/// 2^64 divided by the golden ratio: the increment of SplitMix64 (Steele, Lea and Flood 2014).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's output function.
fn mix(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Batch, Checkpoint, Observer};
    use moebius_kernels::gemm::Precision;
    use moebius_moe::{LoadStatistics, Routing};
    use moebius_tensor::{Graph, Var};

    #[test]
    fn names_and_cuts() {
        let whole = published("qwen3-30b-a3b").unwrap();
        assert_eq!((whole.n_layers(), whole.vocab_size), (48, 151_936));
        assert_eq!(whole.validate(), Ok(()));
        assert_eq!(published("mixtral-8x7b:4").unwrap().n_layers(), 4);
        assert_eq!(published("olmoe-1b-7b:1:512").unwrap().vocab_size, 512);
        for (text, part) in [
            ("olmo", "found `olmo`"),
            ("olmoe-1b-7b:17", "1 to 16 layers"),
            ("olmoe-1b-7b:0", "found `0`"),
            ("olmoe-1b-7b:x", "found `x`"),
            ("olmoe-1b-7b:1:2:3", "found `:3`"),
        ] {
            let message = published(text).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    /// Sixteen layers of a small model with many experts.
    fn small() -> ModelConfig {
        UniformDecoder {
            family: "olmoe",
            n_layers: 16,
            n_kv_heads: 4,
            vocab_size: 512,
            qk_norm: QkNorm::Projection,
            ffn: Ffn::moe_of(16, 2, 32, false),
            ..UniformDecoder::default()
        }
        .config()
    }

    #[derive(Default)]
    struct Loads(Vec<LoadStatistics>);

    impl Observer for Loads {
        fn routing(&mut self, _: usize, routing: &Routing) {
            let mut load = LoadStatistics::default();
            load.add(&routing.plan);
            self.0.push(load);
        }
    }

    #[test]
    fn tokens_spread_over_experts_in_every_layer() {
        let model = Model::random_for_speed(&small(), 1, RunFormat::F32).unwrap();
        let tokens: Vec<u32> = (0..400).map(|i| i * 37 % 512).collect();
        let (g, mut loads) = (Graph::inference(Precision::F32), Loads::default());
        model.forward(&g, &Batch::of_sequences(&[tokens]), None, &mut loads).unwrap();
        assert_eq!(loads.0.len(), 16);
        for (layer, load) in loads.0.iter().enumerate() {
            // Even is 1.
            assert!(load.entropy() > 0.95, "layer {layer}: {:?}", load.counts);
        }
    }

    #[test]
    fn weights_are_normal_and_follow_from_their_place() {
        let table = normal_table();
        let weight = RandomWeight::new("layers.0.moe.gate_up", &[8, 16, 4], 5, &table);
        let draw = |first, len| {
            let mut numbers = vec![0.0; len];
            weight.fill(first, &mut numbers);
            numbers
        };
        let length = 3 * CHUNK + 7;
        let numbers = moebius_testkit::threads(1).install(|| draw(0, length));
        assert!(moebius_testkit::threads(3).install(|| draw(0, length)) == numbers);
        for (first, len) in [(1, 1), (4, 3), (13, CHUNK + 9)] {
            assert!(draw(first, len) == numbers[first..first + len], "{first}");
        }
        // The deviation is one half, for four inputs.
        let mean = numbers.iter().sum::<f32>() / numbers.len() as f32;
        let moment = |power| numbers.iter().map(|x| (x * 2.0).powi(power)).sum::<f32>() / numbers.len() as f32;
        assert!(mean.abs() < 0.005, "{mean}");
        assert!((moment(2) - 1.0).abs() < 0.02 && (moment(4) - 3.0).abs() < 0.1, "{} {}", moment(2), moment(4));
    }

    /// The embedded tokens, and the logits of one of them as if it had come through all layers. What passes a router
    /// differs: in memory it is in f32, in a file rounded.
    fn embedded_and_logits(model: &Model) -> (Vec<f32>, Vec<f32>) {
        struct First(Vec<f32>);
        impl Observer for First {
            fn hidden(&mut self, index: usize, hidden: &Var) {
                if index == 0 {
                    self.0.extend_from_slice(hidden.data());
                }
            }
        }
        let (g, batch) = (Graph::inference(Precision::Bf16), Batch::of_sequences(&[[1, 2, 3, 500]]));
        let mut first = First(Vec::new());
        model.forward(&g, &batch, None, &mut first).unwrap();
        let hidden = Var::constant(Tensor::new(&[1, 64], first.0[..64].to_vec()));
        let logits = model.logits(&g, &hidden).data().to_vec();
        (first.0, logits)
    }

    #[test]
    fn what_is_written_is_what_is_made_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("model");
        write_random(&folder, &small(), 7).unwrap();
        let written = Model::load_to_run(&Checkpoint::open(&folder).unwrap(), RunFormat::Bf16, &mut |_| ()).unwrap();
        let made = Model::random_for_speed(&small(), 7, RunFormat::Bf16).unwrap();
        assert!(embedded_and_logits(&written) == embedded_and_logits(&made));
        assert_eq!(written.count_params(), made.count_params());
    }
}
