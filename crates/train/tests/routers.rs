//! Every routing method trains by recipe: it learns, a stopped run resumes to the bit, and the folder is read again.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{Workshop, bits, metrics};
use moebius_kernels::gemm::Precision;
use moebius_model::{Batch, Checkpoint, KvCache, Model, Silent as Unobserved};
use moebius_moe::routers::ALL;
use moebius_tensor::Graph;
use moebius_train::{Event, Recipe, Start, Trainer};

/// A method, the experts of a token, its options.
const METHODS: &[(&str, usize, &str)] = &[
    ("top_k", 2, "balance = 0.01\nz = 0.001"),
    ("noisy_top_k", 2, ""),
    ("hierarchical", 2, "groups = 2\ngroups_per_token = 1"),
    ("switch", 1, "capacity_factor = 1.0"),
    ("gshard", 2, "group = 64"),
    ("vision", 2, ""),
    ("expert_choice", 2, "allow_future_leak = true"),
    ("hash", 1, "table = 'balanced'"),
    ("base", 1, "allow_future_leak = true"),
    ("sinkhorn", 2, "allow_future_leak = true"),
    ("loss_free", 2, "rate = 0.01\nscale = 2.5"),
    ("deepseek_v2", 2, "devices = 2\ndevices_per_token = 1"),
    ("forced", 2, ""),
];

fn recipe(workshop: &Workshop, name: &str, top_k: usize, options: &str) -> Recipe {
    workshop.recipe(&[
        ("experts = 4", "experts = 8"),
        ("experts_per_token = 2", &format!("experts_per_token = {top_k}")),
        ("[balance]\nload_balancing = 0.01\nz = 0.001\n", &format!("[router]\nname = '{name}'\n{options}\n")),
        ("accumulation = 1", "accumulation = 2"),
    ])
}

fn run_until(trainer: &mut Trainer, stop_at: u64) {
    let stop = AtomicBool::new(false);
    let mut watch = |event: &Event<'_>| {
        if let Event::Step(record) = event {
            stop.store(record.step >= stop_at, Ordering::Relaxed);
        }
    };
    trainer.run(&stop, &mut watch).expect("steps");
}

#[test]
fn every_method_is_here() {
    for entry in ALL {
        assert!(METHODS.iter().any(|(name, ..)| *name == entry.name), "no recipe for {}", entry.name);
    }
}

#[test]
fn every_method_learns_resumes_and_is_read_again() {
    for &(name, top_k, options) in METHODS {
        let workshop = Workshop::new();
        let recipe = recipe(&workshop, name, top_k, options);
        let mut unbroken = workshop.trainer(&recipe, "unbroken", Start::Fresh);
        run_until(&mut unbroken, u64::MAX);
        let log = metrics(&workshop.path("unbroken"));
        let losses: Vec<f64> =
            log.iter().filter(|r| r["kind"] == "step").map(|r| r["loss"].as_f64().unwrap()).collect();
        assert!(losses[11] < 0.9 * losses[0], "{name}: {losses:?}");
        if name == "switch" {
            assert!(log.iter().any(|record| record["dropped"].as_u64().is_some_and(|dropped| dropped > 0)));
        }
        if name == "loss_free" {
            let params = unbroken.model().params();
            let biases = params.iter().filter(|param| param.name().ends_with("selection_bias"));
            // Twelve steps of 0.01, up or down: the bias moved, and by nothing else.
            assert!(biases.flat_map(|p| p.value().data()).any(|b| *b != 0.0 && b.abs() < 0.1201), "{name}");
        }

        let mut first = workshop.trainer(&recipe, "broken", Start::Fresh);
        run_until(&mut first, 7);
        drop(first);
        let mut second = workshop.trainer(&recipe, "broken", Start::Resume);
        run_until(&mut second, u64::MAX);
        assert!(bits(&second) == bits(&unbroken), "{name}");
        assert_eq!(metrics(&workshop.path("broken")), log, "{name}");

        let checkpoint = Checkpoint::open(&workshop.path("unbroken/checkpoints/step-12")).expect(name);
        let loaded = Model::load(&checkpoint).expect(name);
        assert_eq!(loaded.config, unbroken.model().config);
        let hidden = |model: &Model| {
            let (graph, batch) = (Graph::inference(Precision::F32), Batch::of_sequences(&[[5_u32, 9, 200, 31]]));
            model.forward(&graph, &batch, None, &mut Unobserved).unwrap().data().to_vec()
        };
        assert!(hidden(&loaded) == hidden(unbroken.model()), "{name}");
    }
}

/// Mixture-of-Depths: trains, resumes, and gives the same bits token by token over a cache that holds chosen tokens only.
#[test]
fn some_tokens_go_around() {
    for sampler in ["threshold", "predictor", "random"] {
        for recompute in ["false", "true"] {
            let workshop = Workshop::new();
            let depths = format!("[depths]\nshare = 0.5\nsampler = '{sampler}'\nsampler_loss = 0.1\n[balance]");
            let activations = format!("checkpoint_activations = {recompute}");
            let recipe = workshop.recipe(&[("[balance]", &depths), ("checkpoint_activations = false", &activations)]);
            let mut unbroken = workshop.trainer(&recipe, "unbroken", Start::Fresh);
            run_until(&mut unbroken, u64::MAX);
            let mut first = workshop.trainer(&recipe, "broken", Start::Fresh);
            run_until(&mut first, 7);
            drop(first);
            let mut second = workshop.trainer(&recipe, "broken", Start::Resume);
            run_until(&mut second, u64::MAX);
            assert!(bits(&second) == bits(&unbroken), "{sampler}");

            let model =
                Model::load(&Checkpoint::open(&workshop.path("unbroken/checkpoints/step-12")).unwrap()).unwrap();
            assert_eq!(model.config, unbroken.model().config);
            let tokens = [5_u32, 9, 200, 31, 77, 5, 120, 9];
            let graph = Graph::inference(Precision::F32);
            let forward = |batch: &Batch, cache: Option<&mut KvCache>| {
                let mut caches: Vec<&mut KvCache> = cache.into_iter().collect();
                let caches = if caches.is_empty() { None } else { Some(&mut caches[..]) };
                model.forward(&graph, batch, caches, &mut Unobserved).unwrap().data().to_vec()
            };
            let whole = forward(&Batch::of_sequences(&[tokens]), None);
            for chunk in [1, 3] {
                let mut cache = KvCache::new(&model.config, KvCache::format_for(Precision::F32));
                let mut parts = Vec::new();
                for (at, part) in tokens.chunks(chunk).enumerate() {
                    parts.extend(forward(&Batch::continuing(part, at * chunk), Some(&mut cache)));
                }
                assert!(parts == whole, "{sampler} {chunk}");
                // Back to the third token and on again.
                cache.truncate(3);
                assert_eq!(cache.len(), 3);
                assert!(forward(&Batch::continuing(&tokens[3..], 3), Some(&mut cache)) == whole[3 * 32..], "{sampler}");
            }
        }
    }
}

#[test]
fn dense_layers_between() {
    let workshop = Workshop::new();
    let recipe = workshop.recipe(&[("experts = 4", "experts = 4\nexperts_every = 2\ndense_ffn = 40")]);
    let mut trainer = workshop.trainer(&recipe, "run", Start::Fresh);
    run_until(&mut trainer, u64::MAX);
    let config = &trainer.model().config;
    assert_eq!((config.layers[0].ffn.width(), config.layers[1].ffn.width()), (40, 24));
    let loaded = Model::load(&Checkpoint::open(&workshop.path("run/model")).unwrap()).unwrap();
    assert_eq!(&loaded.config, config);
}

#[test]
fn wrong_combinations_are_refused_on_their_line() {
    let text = |top_k: usize, router: &str| {
        format!(
            "[model]\nhidden = 32\nlayers = 2\nheads = 4\nffn = 24\nexperts = 4\nexperts_per_token = {top_k}\ncontext = 32\n\
             [tokenizer]\nvocab_size = 280\n[data]\ntrain = ['a']\nvalid = ['b']\n[train]\nsteps = 20\n\
             [optimizer]\nlearning_rate = 1e-3\n[router]\n{router}\n"
        )
    };
    for (top_k, router, wanted) in [
        (1, "name = 'top_k'", "7: model.experts_per_token: top-1 routing with renormalised weights cannot be trained"),
        (
            2,
            "name = 'expert_choice'",
            "19: router.name: router expert_choice: a token's experts depend on later tokens",
        ),
        (1, "name = 'base'", "19: router.name: router base: a token's experts depend on later tokens"),
        (4, "name = 'noisy_top_k'", "19: router.name: router noisy_top_k: wanted fewer choices than the 4 experts"),
        (5, "name = 'top_k'", "7: model.experts_per_token: wanted 1 to model.experts = 4, found 5"),
        (1, "name = 'switch'\njitter = 7", "20: router.jitter: wanted 0 to 0.99, found 7"),
        (1, "name = 'switch'\njiter = 0.1", "20: router.jiter: wanted an option that this router has"),
        (1, "name = 'soft'", "19: router.name: wanted one of top_k"),
        (1, "jitter = 0.1", "18: router.name: wanted one of top_k"),
        (1, "name = 3", "19: router.name: wanted one of top_k"),
    ] {
        let error = Recipe::parse("r.toml", "".as_ref(), &text(top_k, router)).expect_err(wanted).to_string();
        assert!(error.starts_with(&format!("r.toml:{wanted}")), "{error}\nwanted {wanted}");
    }
}
