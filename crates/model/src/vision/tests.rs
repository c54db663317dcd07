//! Gradients, permutation of images, files, refusals; every mixture.

use super::*;
use moebius_kernels::gemm::Precision;
use moebius_moe::routers::{MethodConfig, Options};
use moebius_tensor::Gradients;
use moebius_testkit::compare_gradient;

fn config(mixture: Option<Mixture>, pooling: Pooling) -> VisionConfig {
    VisionConfig {
        channels: 1,
        height: 4,
        width: 6,
        patch: 2,
        hidden: 8,
        layers: 2,
        heads: 2,
        ffn: 6,
        classes: 3,
        pooling,
        sparse_layers: usize::from(mixture.is_some()),
        mixture,
    }
}

fn routed(router: &str, top_k: usize, options: &[(&str, f64)]) -> Option<Mixture> {
    let options: Options = options.iter().map(|&(key, value)| (key.to_owned(), value.into())).collect();
    let method = MethodConfig { name: router.into(), options };
    Some(Mixture::Routed { method, experts: 4, top_k })
}

fn mixtures() -> Vec<Option<Mixture>> {
    vec![
        None,
        Some(Mixture::Soft { experts: 3, slots: 2 }),
        routed("vision", 2, &[("importance", 0.1), ("load", 0.1)]),
        routed("expert_choice", 2, &[]),
        routed("loss_free", 2, &[("sequence", 0.1)]),
    ]
}

fn pixels(images: usize, seed: u64) -> Vec<f32> {
    let mut data = vec![0.0; images * 24];
    Rng::new(seed).fill_normal(&mut data, 1.0);
    data
}

/// Weights large enough that everything matters.
fn model(config: &VisionConfig, seed: u64) -> VisionModel {
    let mut rng = Rng::new(seed);
    VisionModel::build(config, &mut |id, name, shape| {
        let mut value = Tensor::zeros(shape);
        rng.fill_normal(value.data_mut(), 0.6);
        Ok(Param::new(id, name, value))
    })
    .unwrap()
}

#[test]
fn gradients_match_finite_differences() {
    for pooling in [Pooling::Mean, Pooling::Token] {
        for mixture in mixtures() {
            // A choice may change within the step: then these weights say nothing, and others are asked. A wrong slope
            // agrees nowhere.
            let tries = if matches!(mixture, Some(Mixture::Routed { .. })) { 60 } else { 1 };
            let config = config(mixture, pooling);
            let mut complaints = Vec::new();
            let agreed = (1..=tries).any(|seed| gradients_agree(&config, seed).map_err(|c| complaints.push(c)).is_ok());
            assert!(agreed, "{config:?}: {complaints:#?}");
        }
    }
}

fn gradients_agree(config: &VisionConfig, seed: u64) -> Result<(), String> {
    let mut model = model(config, seed);
    let (pixels, labels) = (pixels(3, 2), [0, 2, 1]);
    let mut gradients = Gradients::new();
    let g = Graph::training(Precision::F32);
    let loss = model.loss(&g, &pixels, &labels, 9).unwrap();
    g.backward(&loss.total, &mut gradients);
    let names = ["patch", "patch_bias", "position_embedding", "class_embedding", "head", "layers.0.attention.k"];
    for id in 0..model.params().len() {
        let (name, value) = (model.params()[id].name().to_owned(), model.params()[id].value().clone());
        if !names.contains(&&name[..]) && !name.ends_with("down") && !name.ends_with("scale") {
            continue;
        }
        let found = compare_gradient(value.data(), gradients.get(id).unwrap(), |moved| {
            model.params_mut()[id].update(|weights| weights.copy_from_slice(moved));
            let g = Graph::training(Precision::F32);
            f64::from(model.loss(&g, &pixels, &labels, 9).unwrap().total.data()[0])
        });
        model.params_mut()[id].update(|weights| weights.copy_from_slice(value.data()));
        found.map_err(|complaint| format!("{name}{complaint}"))?;
    }
    Ok(())
}

/// Without capacity, an image's bits do not depend on the images beside it.
#[test]
fn an_image_is_alone_in_its_batch() {
    for mixture in [None, Some(Mixture::Soft { experts: 3, slots: 2 }), routed("vision", 2, &[])] {
        let model = model(&config(mixture, Pooling::Token), 5);
        let (all, g) = (pixels(5, 3), Graph::inference(Precision::F32));
        let (together, _) = model.forward(&g, &all, 0).unwrap();
        for image in 0..5 {
            let (alone, _) = model.forward(&g, &all[image * 24..(image + 1) * 24], 0).unwrap();
            moebius_testkit::same_bits("features", alone.data(), &together.data()[image * 8..(image + 1) * 8]);
        }
    }
}

#[test]
fn patches_on_paper() {
    let config = config(None, Pooling::Mean);
    let pixels: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let patches = embed::patches(&config, &pixels).unwrap();
    assert_eq!(patches.shape(), [6, 4]);
    assert_eq!(patches.data()[..8], [0.0, 1.0, 6.0, 7.0, 2.0, 3.0, 8.0, 9.0]);
    assert!(embed::patches(&config, &pixels[1..]).is_err());
}

#[test]
fn what_is_saved_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    for mixture in mixtures() {
        let saved = model(&config(mixture, Pooling::Token), 5);
        saved.save(folder.path()).unwrap();
        let loaded = VisionModel::load(folder.path()).unwrap();
        assert_eq!(loaded.config, saved.config);
        for (a, b) in loaded.params().iter().zip(saved.params()) {
            assert_eq!(a.name(), b.name());
            moebius_testkit::same_bits(a.name(), a.value().data(), b.value().data());
        }
    }
}

#[test]
fn broken_folders_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let saved = model(&config(routed("vision", 2, &[]), Pooling::Mean), 5);
    saved.save(folder.path()).unwrap();
    let path = folder.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    for (from, to, wanted) in [
        ("\"hidden\": 8", "\"hidden\": 80000000", "`hidden`: wanted 1 to 65536"),
        ("\"hidden\": 8", "\"hidden\": 16", "tensor `patch`: wanted shape [16, 4], found [8, 4]"),
        ("\"patch\": 2", "\"patch\": 0", "`patch`: wanted 1 to 65536, found 0"),
        ("\"heads\": 2", "\"heads\": -2", "`heads`: wanted a whole number, found -2"),
        ("\"router\": \"vision\"", "\"router\": \"v\"", "wanted one of top_k"),
        ("\"experts_per_token\": 2", "\"experts_per_token\": 9", "wanted 1 to 4 choices"),
        ("moebius_vision", "vit", "`model_type`: wanted \"moebius_vision\", found \"vit\""),
        ("\"kind\": \"routed\"", "\"kind\": 3", "`kind`: wanted a text, found 3"),
    ] {
        assert!(text.contains(from), "{from}");
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let error = VisionModel::load(folder.path()).unwrap_err().to_string();
        assert!(error.contains(wanted) && !error.contains('\n'), "{error}");
    }
}

#[test]
fn contradictions_are_refused() {
    let refuse = |change: fn(&mut VisionConfig)| {
        let mut config = config(routed("vision", 2, &[]), Pooling::Mean);
        change(&mut config);
        VisionModel::new(&config, 1).unwrap_err().to_string()
    };
    assert!(refuse(|c| c.width = 7).contains("`width`: wanted a multiple of patch = 2, found 7"));
    assert!(refuse(|c| c.heads = 3).contains("`heads`: wanted a divisor of hidden = 8, found 3"));
    assert!(refuse(|c| c.sparse_layers = 3).contains("`sparse_layers`: wanted 1 to 2, found 3"));
    assert!(refuse(|c| c.channels = 2).contains("`channels`: wanted 1 or 3, found 2"));
    assert!(refuse(|c| c.mixture = Some(Mixture::Soft { experts: 2, slots: 0 })).contains("`slots`: wanted 1 to 4096"));
    assert!(refuse(|c| c.mixture = None).contains("`sparse_layers`: wanted 0 to 0, found 1"));
}
