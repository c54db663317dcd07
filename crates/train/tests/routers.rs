//! Every routing method trains by recipe: it learns, a stopped run resumes to the bit, and the folder is read again.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{Workshop, bits, metrics};
use moebius_kernels::attention::CacheFormat;
use moebius_kernels::gemm::Precision;
use moebius_model::config::Gate;
use moebius_model::{Batch, Checkpoint, KvCache, Model, Silent as Unobserved};
use moebius_moe::routers::ALL;
use moebius_tensor::Graph;
use moebius_train::{Event, Recipe, Silent, Start, Trainer};

/// A method, the experts of a token, its options.
const METHODS: &[(&str, usize, &str)] = &[
    ("top_k", 2, "balance = 0.01\nz = 0.001"),
    ("top_k", 1, "score = 'sigmoid_of_chosen'\nweighs_input = true"),
    ("noisy_top_k", 2, ""),
    ("hierarchical", 2, "groups = 2\ngroups_per_token = 1"),
    ("switch", 1, "capacity_factor = 1.0"),
    ("gshard", 2, "group = 64"),
    ("vision", 2, ""),
    ("expert_choice", 2, "allow_future_leak = true"),
    ("hash", 1, "table = 'balanced'"),
    ("hash", 1, "table = 'counted'"),
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

fn load(folder: &std::path::Path) -> Model {
    Model::load(&Checkpoint::open(folder).unwrap()).unwrap()
}

fn hidden(model: &Model) -> Vec<f32> {
    let (graph, batch) = (Graph::inference(Precision::F32), Batch::of_sequences(&[[5_u32, 9, 200, 31]]));
    model.forward(&graph, &batch, None, &mut Unobserved).unwrap().data().to_vec()
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

        let loaded = load(&workshop.path("unbroken/checkpoints/step-12"));
        assert_eq!(loaded.config, unbroken.model().config);
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
                let mut cache = KvCache::new(&model.config, CacheFormat::F32);
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
    let glam = "experts = 4\nexperts_every = 2\ndense_ffn = 40\ndense_activation = 'gelu'";
    let recipe = workshop.recipe(&[("experts = 4", glam)]);
    let mut trainer = workshop.trainer(&recipe, "run", Start::Fresh);
    run_until(&mut trainer, u64::MAX);
    let config = &trainer.model().config;
    assert_eq!((config.layers[0].ffn.width(), config.layers[1].ffn.width()), (40, 24));
    assert_eq!((config.dense().unwrap().gate, config.moe().unwrap().gate), (Gate::GeluTanh, Gate::Silu));
    let loaded = load(&workshop.path("run/model"));
    assert_eq!(&loaded.config, config);
    assert!(hidden(&loaded) == hidden(trainer.model()));
}

/// All networks may have another non-linearity; no family is written so.
#[test]
fn geglu_everywhere() {
    let gelu = ("ffn = 24", "ffn = 24\nactivation = 'gelu'");
    let dense = [("experts = 4\nexperts_per_token = 2\n", ""), ("[balance]\nload_balancing = 0.01\nz = 0.001\n", "")];
    for changes in [vec![gelu], vec![gelu, dense[0], dense[1]]] {
        let workshop = Workshop::new();
        let recipe = workshop.recipe(&changes);
        let (trainer, reason) = run_and_export(&workshop, &recipe);
        assert_eq!(reason.as_deref(), Some("GEGLU: families are written with SwiGLU only"));
        let loaded = load(&workshop.path("run/model"));
        assert_eq!(loaded.config, trainer.model().config);
        assert!(hidden(&loaded) == hidden(trainer.model()));
    }
}

/// Runs a recipe to its end; the trainer, and why the model is in our own layout.
fn run_and_export(workshop: &Workshop, recipe: &Recipe) -> (Trainer, Option<String>) {
    let (mut trainer, mut reason) = (workshop.trainer(recipe, "run", Start::Force), None);
    let mut watch = |event: &Event<'_>| {
        if let Event::Exported { own_layout, .. } = event {
            reason = own_layout.map(str::to_owned);
        }
    };
    trainer.run(&AtomicBool::new(false), &mut watch).expect("steps");
    (trainer, reason)
}

/// What Mixtral can express is written in its layout, the same model to the bit; of the rest it is said why not.
#[test]
fn the_model_is_written_as_a_published_family_where_one_has_it() {
    let raw = "renormalise = false";
    for (name, top_k, options, model, wanted) in [
        ("top_k", 2, "z = 0.001", "", Ok("mixtral")),
        ("top_k", 2, raw, "qk_norm = 'projection'", Ok("olmoe")),
        ("top_k", 1, raw, "qk_norm = 'head'\nexperts_every = 2", Ok("qwen3_moe")),
        ("loss_free", 2, "groups = 4\ngroups_per_token = 2\nscale = 2.5", "", Ok("glm4_moe")),
        ("top_k", 1, raw, "", Err("raw softmax weights without normed queries and keys: olmoe ")),
        ("hash", 1, "", "", Err("the router `hash`: no published family has it")),
    ] {
        let workshop = Workshop::new();
        let ffn = format!("ffn = 24\n{model}");
        let text = recipe(&workshop, name, top_k, options).text().replacen("ffn = 24", &ffn, 1);
        let recipe = Recipe::parse("workshop.toml", &workshop.path(""), &text).unwrap();
        let (trainer, reason) = run_and_export(&workshop, &recipe);
        let loaded = load(&workshop.path("run/model"));
        match wanted {
            Ok(family) => assert_eq!((loaded.config.family.as_str(), reason), (family, None)),
            Err(wanted) => {
                assert_eq!(loaded.config, trainer.model().config);
                assert!(reason.is_some_and(|reason| reason.starts_with(wanted)), "{name}");
            }
        }
        assert!(hidden(&loaded) == hidden(trainer.model()), "{name}");
    }
}

/// Tables of a hash router from another model's embeddings: like ids together, or apart.
#[test]
fn hash_tables_come_of_embeddings() {
    let workshop = Workshop::new();
    let teacher = workshop.recipe(&[("steps = 12", "steps = 4"), ("save_every = 5", "save_every = 4")]);
    let mut trainer = workshop.trainer(&teacher, "teacher", Start::Fresh);
    run_until(&mut trainer, u64::MAX);
    let of = |table: &str| {
        let recipe = recipe(&workshop, "hash", 1, &format!("table = '{table}'\nembeddings = 'teacher/model'"));
        workshop.trainer(&recipe, "run", Start::Force)
    };
    let [clustered, dispersed] = ["clustered", "dispersed"].map(|table| {
        let mut trainer = of(table);
        let tables = |trainer: &Trainer| -> Vec<Vec<f32>> {
            let params = trainer.model().params();
            let tables = params.iter().filter(|param| param.name().ends_with(".table"));
            tables.map(|param| param.value().data().to_vec()).collect()
        };
        let before = tables(&trainer);
        assert_eq!((before.len(), &before[0]), (2, &before[1]));
        trainer.step().unwrap();
        assert_eq!(tables(&trainer), before, "no step moves a table");
        before[0].clone()
    });
    let counts = |table: &[f32]| (0..8).map(|e| table.iter().filter(|&&t| t == e as f32).count()).collect::<Vec<_>>();
    assert_eq!(counts(&dispersed), vec![35; 8]);
    assert!(counts(&clustered) != counts(&dispersed) && counts(&clustered).iter().sum::<usize>() == 280);
    // Each cluster is dealt out evenly.
    for cluster in 0..8 {
        let dealt = (0..280).filter(|&id| clustered[id] == cluster as f32).map(|id| dispersed[id] as usize);
        let mut members = [0_usize; 8];
        dealt.for_each(|expert| members[expert] += 1);
        assert!(members.iter().max().unwrap() - members.iter().min().unwrap() <= 1, "{members:?}");
    }

    let other = workshop.recipe(&[
        ("vocab_size = 280", "vocab_size = 270"),
        ("experts_per_token = 2", "experts_per_token = 1"),
        (
            "[balance]\nload_balancing = 0.01\nz = 0.001\n",
            "[router]\nname = 'hash'\ntable = 'clustered'\nembeddings = 'teacher/model'\n",
        ),
    ]);
    let error = Trainer::prepare(other, &workshop.path("other"), Start::Fresh, &mut Silent).err().unwrap().to_string();
    assert!(error.ends_with("router.embeddings: wanted a model of 270 tokens as here, found 280"), "{error}");
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
        (2, "name = 'switch'", "19: router.name: router switch: wanted 1 choices a token"),
        (2, "name = 'hash'\ntable = 'counted'", "19: router.name: router hash: wanted 1 choice a token of at most 256"),
        (1, "name = 'hash'\ntable = 'clustered'", "18: router.embeddings: wanted the folder of a trained model"),
        (1, "name = 'hash'\nembeddings = 'x'", "20: router.embeddings: wanted no such key"),
        (1, "name = 'hash'\ntable = 'clustered'\nembeddings = 3", "21: router.embeddings: wanted the folder"),
        (1, "name = 'switch'\ncapacity_factor = 0.005", "20: router.capacity_factor: wanted at least 800 tokens"),
        (1, "name = 'sinkhorn'", "19: router.name: router sinkhorn: a token's experts depend on later tokens"),
        (2, "name = 'vision'\nbatch_priority = true", "19: router.name: router vision: "),
        (1, "name = 'loss_free'", "7: model.experts_per_token: top-1 routing with renormalised weights"),
        (1, "name = 'noisy_top_k'", "7: model.experts_per_token: top-1 routing with renormalised weights"),
        (1, "name = 3", "19: router.name: wanted one of top_k"),
    ] {
        let error = Recipe::parse("r.toml", "".as_ref(), &text(top_k, router)).expect_err(wanted).to_string();
        assert!(error.starts_with(&format!("r.toml:{wanted}")), "{error}\nwanted {wanted}");
    }
}
