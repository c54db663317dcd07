//! A sound folder damaged in some place: it is refused in one line, or what is loaded is consistent. Never a panic.

use moebius_model::checkpoint::StoredAs;
use moebius_model::{Checkpoint, Ffn, Model, ModelConfig, ModelError, UniformDecoder, save_model};
use proptest::prelude::*;
use std::sync::LazyLock;

/// `config.json` and `model.safetensors` of a tiny model.
static SOUND: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
    let decoder = UniformDecoder {
        family: "mixtral",
        vocab_size: 5,
        hidden: 4,
        n_layers: 1,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 2,
        max_positions: 8,
        window: Some(4),
        ffn: Ffn::moe_of(2, 1, 2, true),
        ..UniformDecoder::default()
    };
    let config =
        ModelConfig { router_aux_loss_coef: 0.01, bos_token: Some(0), eos_tokens: vec![1], ..decoder.config() };
    let folder = tempfile::tempdir().unwrap();
    save_model(folder.path(), &Model::new(&config, 1).unwrap(), StoredAs::Bf16).unwrap();
    ["config.json", "model.safetensors"].map(|name| std::fs::read(folder.path().join(name)).unwrap())
});

/// One change of a file.
#[derive(Clone, Debug)]
enum Damage {
    /// The byte at this share of the file becomes another.
    Byte(f64, u8),
    /// The file ends there.
    Cut(f64),
    /// Bytes are put in.
    Insert(f64, Vec<u8>),
    /// Bytes are taken out.
    Remove(f64, usize),
    /// The first number from there on becomes another.
    Number(f64, String),
}

fn damage() -> impl Strategy<Value = Damage> {
    // Most of a small file is its header: half of the changes fall into the first third.
    let place = prop_oneof![0.0..0.33, 0.0..1.0f64];
    let number = prop_oneof![
        (0u64..20).prop_map(|n| n.to_string()),
        any::<u64>().prop_map(|n| n.to_string()),
        any::<f64>().prop_map(|n| n.to_string()),
        Just("null".to_owned()),
        Just("[]".to_owned()),
    ];
    prop_oneof![
        (place.clone(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        place.clone().prop_map(Damage::Cut),
        (place.clone(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        (place.clone(), 1usize..40).prop_map(|(at, count)| Damage::Remove(at, count)),
        (place, number).prop_map(|(at, number)| Damage::Number(at, number)),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    let place = |share: f64| (share * bytes.len() as f64) as usize;
    match damage {
        Damage::Byte(at, byte) => {
            let at = place(*at);
            bytes[at] = *byte;
        }
        Damage::Cut(at) => bytes.truncate(place(*at)),
        Damage::Insert(at, more) => {
            let at = place(*at);
            bytes.splice(at..at, more.iter().copied());
        }
        Damage::Remove(at, count) => {
            let at = place(*at);
            bytes.drain(at..bytes.len().min(at + count));
        }
        Damage::Number(at, number) => {
            let Some(start) = (place(*at)..bytes.len()).find(|&i| bytes[i].is_ascii_digit()) else { return };
            let end = (start..bytes.len()).find(|&i| !bytes[i].is_ascii_digit()).unwrap_or(bytes.len());
            bytes.splice(start..end, number.bytes());
        }
    }
}

fn load(config: &[u8], weights: &[u8]) -> Result<Model, ModelError> {
    Model::load(&Checkpoint::from_bytes(config, weights)?)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn damage_is_refused_in_one_line_or_harmless(in_config in any::<bool>(), damage in damage()) {
        let [mut config, mut weights] = SOUND.clone();
        apply(if in_config { &mut config } else { &mut weights }, &damage);
        match load(&config, &weights) {
            Err(error) => {
                let message = error.to_string();
                let named = message.contains("config.json: ") || message.contains("model.safetensors: ");
                prop_assert!(named && !message.contains('\n'), "{}", message);
            }
            Ok(model) => {
                prop_assert!(model.config.validate().is_ok());
                let numbers: usize = model.params().iter().map(|param| param.value().data().len()).sum();
                prop_assert!(2 * numbers <= weights.len());
                prop_assert_eq!(numbers, model.count_params().total);
            }
        }
    }
}

#[test]
fn the_undamaged_folder_is_sound() {
    let [config, weights] = &*SOUND;
    assert!(load(config, weights).is_ok());
}
