//! What a step does: the loss falls, accumulation adds, threads change no bit.

mod common;

use std::sync::atomic::AtomicBool;

use common::{Workshop, bits, metrics};
use moebius_train::{Silent, Start, Trainer};

fn steps(trainer: &mut Trainer, count: usize) -> Vec<f64> {
    (0..count).map(|_| trainer.step().expect("a step").loss).collect()
}

#[test]
fn the_loss_falls_sparse_and_dense() {
    let dense = [("experts = 4\nexperts_per_token = 2\n", ""), ("\n[balance]\nload_balancing = 0.01\nz = 0.001\n", "")];
    for changes in [&[][..], &dense] {
        let workshop = Workshop::new();
        let recipe = workshop.recipe(&[changes, &[("steps = 12", "steps = 120")]].concat());
        let mut trainer = workshop.trainer(&recipe, "run", Start::Fresh);
        let outcome = trainer.run(&AtomicBool::new(false), &mut Silent).unwrap();
        assert!(outcome.finished);
        // From about ln 280 = 5.6 nats; the language's own entropy is below 0.7 nats a word, a token or two.
        let first = &metrics(&workshop.path("run"))[0];
        assert!((first["loss"].as_f64().unwrap() - 280_f64.ln()).abs() < 0.3, "{first}");
        // An even load has a loss of the number of experts a token, 2, whose coefficient is 0.01.
        let balance = first["balance_loss"].as_f64().unwrap();
        assert!(if changes.is_empty() { (0.019..0.03).contains(&balance) } else { balance == 0.0 }, "{first}");
        let best = outcome.best.expect("validated");
        assert!(best.loss < 1.2, "validation loss {} after {} steps", best.loss, best.step);
        for name in
            ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
        {
            assert!(workshop.path("run/model").join(name).is_file(), "{name}");
        }
        assert!(workshop.path("run/plot.svg").is_file());
    }
}

/// Muon and SGD learn as well, with rates of their own; an average of the weights is validated beside them, and other
/// texts apart.
#[test]
fn other_methods_learn() {
    for (kind, rate) in [("muon", "1e-2"), ("sgd", "0.5")] {
        let workshop = Workshop::new();
        let recipe = workshop.recipe(&[
            ("warmup_steps = 3", &format!("warmup_steps = 3\nkind = '{kind}'")),
            ("learning_rate = 1e-2", &format!("learning_rate = {rate}")),
            ("steps = 12", "steps = 120"),
            ("keep = 2", "keep = 2\naverage = 0.9"),
            ("valid = ['valid.txt']", "valid = ['valid.txt']\neval.other = ['other.txt']"),
        ]);
        let mut trainer = workshop.trainer(&recipe, "run", Start::Fresh);
        let best = trainer.run(&AtomicBool::new(false), &mut Silent).unwrap().best.expect("validated");
        assert!(best.loss < if kind == "muon" { 1.3 } else { 2.0 }, "{kind}: {}", best.loss);
        let validation = trainer.validate(&mut Silent).unwrap();
        let average = validation.average.expect("an average");
        assert!(
            (average.loss - validation.score.loss).abs() < 0.3,
            "{kind}: {} {}",
            average.loss,
            validation.score.loss
        );
        // The same language, other sentences.
        let other = &validation.sets["other"];
        assert!((other.loss - validation.score.loss).abs() < 0.2 && other.loss != validation.score.loss);
        // Exchanging weights for the average and back changes no bit.
        let before = bits(&trainer);
        trainer.validate(&mut Silent).unwrap();
        assert!(bits(&trainer) == before);
    }
}

#[test]
fn threads_change_no_bit() {
    let workshop = Workshop::new();
    for precision in ["precision = 'bf16'", "precision = 'f32'"] {
        let recipe = workshop.recipe(&[
            ("precision = 'bf16'", precision),
            ("accumulation = 1", "accumulation = 2"),
            ("warmup_steps = 3", "warmup_steps = 3\nkind = 'muon'"),
        ]);
        let with_threads = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut trainer = workshop.trainer(&recipe, "run", Start::Force);
                let losses = steps(&mut trainer, 4);
                (losses, trainer.validate(&mut Silent).unwrap().score.loss, bits(&trainer))
            })
        };
        let one = with_threads(1);
        assert!(one == with_threads(2), "two threads, {precision}");
        assert!(one == with_threads(3), "three threads, {precision}");
    }
}

#[test]
fn recomputed_activations_change_no_bit() {
    let workshop = Workshop::new();
    let after = |flags: &str| {
        let recipe = workshop.recipe(&[("checkpoint_activations = false", flags)]);
        let mut trainer = workshop.trainer(&recipe, "run", Start::Force);
        (steps(&mut trainer, 3), bits(&trainer))
    };
    let kept = after("checkpoint_activations = false");
    assert!(kept == after("checkpoint_activations = true"));
    // Routers in bf16 are another run, and the same one whether computed again or not.
    let rounded = after("checkpoint_activations = false\nrouter_precision = 'bf16'");
    assert!(rounded != kept);
    assert!(rounded == after("checkpoint_activations = true\nrouter_precision = 'bf16'"));
    // So are experts with dropout: what was dropped is dropped again.
    let dropped = after("checkpoint_activations = false\nexpert_dropout = 0.4");
    assert!(dropped != kept);
    assert!(dropped == after("checkpoint_activations = true\nexpert_dropout = 0.4"));
}

/// A small text whose windows are all alike: every micro-batch is the same, and the mean over them is each of them.
/// 1 / 2 and 1 / 4 are exact, so the bits must be equal.
#[test]
fn accumulating_the_same_batch_changes_no_bit() {
    let workshop = Workshop::new();
    // Windows of 16 tokens over a text that repeats every word: see below that one word is one token.
    std::fs::write(workshop.path("train.txt"), " amber".repeat(2000)).unwrap();
    std::fs::write(workshop.path("valid.txt"), " amber".repeat(100)).unwrap();
    let after = |accumulation: usize| {
        let changed = format!("accumulation = {accumulation}");
        let recipe = workshop.recipe(&[("accumulation = 1", &changed), ("vocab_size = 280", "vocab_size = 262")]);
        let mut trainer = workshop.trainer(&recipe, "run", Start::Force);
        let losses = steps(&mut trainer, 3);
        (losses, bits(&trainer))
    };
    let one = after(1);
    assert!(one == after(2));
    assert!(one == after(4));
}

/// Two micro-batches of two windows see what one batch of four sees; without the pooled losses, whose means over parts
/// are not the mean over the whole, the gradients agree up to rounding.
#[test]
fn accumulating_halves_is_nearly_the_whole() {
    let workshop = Workshop::new();
    let plain = [("precision = 'bf16'", "precision = 'f32'"), ("load_balancing = 0.01\nz = 0.001", "")];
    let after = |changes: &[(&str, &str)]| {
        let recipe = workshop.recipe(&[&plain, changes].concat());
        let mut trainer = workshop.trainer(&recipe, "run", Start::Force);
        let record = trainer.step().unwrap();
        (record.loss, record.gradient_norm)
    };
    let whole = after(&[]);
    let halves = after(&[("accumulation = 1", "accumulation = 2"), ("sequences = 4", "sequences = 2")]);
    assert!((whole.0 - halves.0).abs() < 1e-5, "{whole:?} {halves:?}");
    assert!((whole.1 - halves.1).abs() < 1e-4 * whole.1, "{whole:?} {halves:?}");
}

/// The balance loss over a whole step is the same however its sequences are cut into micro-batches, and so is its
/// gradient; that of each micro-batch by itself is not, and over those so far it is nearly so.
#[test]
fn a_steps_balance_loss_does_not_depend_on_its_micro_batches() {
    let workshop = Workshop::new();
    let after = |over: &str, accumulation: usize| {
        let recipe = workshop.recipe(&[
            ("precision = 'bf16'", "precision = 'f32'"),
            ("load_balancing = 0.01\nz = 0.001", &format!("load_balancing = 1\nz = 0.001\nover = '{over}'")),
            ("accumulation = 1", &format!("accumulation = {accumulation}")),
            ("sequences = 4", &format!("sequences = {}", 4 / accumulation)),
        ]);
        let mut trainer = workshop.trainer(&recipe, "run", Start::Force);
        let record = trainer.step().unwrap();
        (record.balance_loss, record.gradient_norm)
    };
    let whole = after("step", 1);
    assert!(whole == after("micro_batch", 1) && whole == after("so_far", 1));
    let distance = |over: &str, accumulation: usize| {
        let (loss, norm) = after(over, accumulation);
        ((loss - whole.0).abs(), (norm - whole.1).abs() / whole.1)
    };
    for accumulation in [2, 4] {
        let (loss, norm) = distance("step", accumulation);
        assert!(loss < 1e-5 && norm < 1e-4, "{accumulation}: {loss} {norm}");
        let [alone, so_far] = ["micro_batch", "so_far"].map(|over| distance(over, accumulation).0);
        assert!(alone > 1e-4 && so_far > 1e-5, "{accumulation}: {alone} {so_far}");
    }
}
