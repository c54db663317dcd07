//! A run that was stopped and resumed gives the bits of one that was not.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{Workshop, bits, metrics};
use moebius_train::{Event, Recipe, Silent, Start, Trainer};

/// Runs until `stop_at` steps are done, then sets the stop flag as ctrl-C does.
fn run_until(trainer: &mut Trainer, stop_at: u64) -> bool {
    let stop = AtomicBool::new(false);
    let mut watch = |event: &Event<'_>| {
        if let Event::Step(record) = event {
            stop.store(record.step >= stop_at, Ordering::Relaxed);
        }
    };
    trainer.run(&stop, &mut watch).expect("steps").finished
}

/// Every method with a state of its own: what a checkpoint must carry.
#[test]
fn stopped_and_resumed_equals_unbroken() {
    for changes in [
        vec![],
        vec![("accumulation = 1", "accumulation = 3"), ("sequences = 4", "sequences = 2")],
        vec![("keep = 2", "keep = 2\naverage = 0.9\nexport = 'average'")],
        vec![("warmup_steps = 3", "warmup_steps = 3\nkind = 'muon'\nschedule = 'wsd'\ndecay_steps = 4")],
        vec![
            ("warmup_steps = 3", "warmup_steps = 3\nkind = 'sgd'\nschedule = 'linear'"),
            ("valid = ['valid.txt']", "valid = ['valid.txt']\neval.other = ['other.txt']"),
        ],
    ] {
        let workshop = Workshop::new();
        let recipe = workshop.recipe(&changes);
        let mut unbroken = workshop.trainer(&recipe, "unbroken", Start::Fresh);
        assert!(run_until(&mut unbroken, u64::MAX));

        for stop_at in [1, 4, 7] {
            let out = format!("broken-{stop_at}");
            let mut first = workshop.trainer(&recipe, &out, Start::Fresh);
            assert!(!run_until(&mut first, stop_at));
            drop(first);
            let mut second = workshop.trainer(&recipe, &out, Start::Resume);
            assert_eq!(second.state().step, stop_at);
            assert!(run_until(&mut second, u64::MAX));
            assert!(bits(&second) == bits(&unbroken), "stopped at {stop_at}");
            assert_eq!(second.state(), unbroken.state());
            assert_eq!(metrics(&workshop.path(&out)), metrics(&workshop.path("unbroken")));
            let model = |out: &str| std::fs::read(workshop.path(out).join("model/model.safetensors")).unwrap();
            assert!(model(&out) == model("unbroken"));
        }
    }
}

/// What SIGKILL leaves: a checkpoint some steps back, a longer log with a torn line, an unfinished folder, best weights of
/// a step that the checkpoint does not know.
#[test]
fn resuming_after_a_kill_forgets_what_came_after_the_checkpoint() {
    let workshop = Workshop::new();
    let recipe = workshop.recipe(&[]);
    let mut unbroken = workshop.trainer(&recipe, "unbroken", Start::Fresh);
    run_until(&mut unbroken, u64::MAX);

    let out = workshop.path("killed");
    let mut killed = workshop.trainer(&recipe, "killed", Start::Fresh);
    run_until(&mut killed, 9);
    std::fs::remove_dir_all(out.join("checkpoints/step-9")).unwrap();
    std::fs::create_dir_all(out.join("checkpoints/step-9.unfinished")).unwrap();
    std::fs::write(out.join("checkpoints/step-9.unfinished/model.safetensors"), "torn").unwrap();
    let log = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    std::fs::write(out.join("metrics.jsonl"), format!("{log}{{\"kind\":\"ste")).unwrap();

    let mut resumed = workshop.trainer(&recipe, "killed", Start::Resume);
    assert_eq!(resumed.state().step, 5);
    run_until(&mut resumed, u64::MAX);
    assert!(bits(&resumed) == bits(&unbroken));
    assert_eq!(metrics(&out), metrics(&workshop.path("unbroken")));
    let mut left =
        std::fs::read_dir(out.join("checkpoints")).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    left.sort();
    assert_eq!(left, ["step-10", "step-12"]);
}

/// A text in which a stretch is noise: the batch that holds it is a spike.
fn recipe_with_noise(workshop: &Workshop, action: &str) -> Recipe {
    let mut text = std::fs::read_to_string(workshop.path("train.txt")).unwrap();
    let noise = "Z%7~q]K^Wx@*J!u{8=Y&_G}9".repeat(4);
    text.insert_str(text.len() / 3, &noise);
    std::fs::write(workshop.path("train.txt"), text).unwrap();
    let spikes = format!("[spikes]\naction = '{action}'\nwindow = 8\ndeviations = 5\nrise = 0.4\n\n[balance]");
    workshop.recipe(&[("[balance]", &spikes), ("steps = 12", "steps = 150"), ("keep = 2", "keep = 1")])
}

fn spikes(out: &std::path::Path) -> Vec<serde_json::Value> {
    metrics(out).into_iter().filter(|record| record["kind"] == "spike").collect()
}

#[test]
fn a_spike_is_named_and_rolled_back_and_the_way_back_survives_a_kill() {
    let workshop = Workshop::new();
    let recipe = recipe_with_noise(&workshop, "log");
    let mut logging = workshop.trainer(&recipe, "logging", Start::Fresh);
    assert!(run_until(&mut logging, u64::MAX));
    let named = spikes(&workshop.path("logging"));
    assert!(!named.is_empty(), "the noise is seen within an epoch");
    assert!(named.iter().all(|spike| spike["back_to"].is_null()));

    let recipe = recipe_with_rollback(&recipe);
    let mut unbroken = workshop.trainer(&recipe, "unbroken", Start::Fresh);
    assert!(run_until(&mut unbroken, u64::MAX));
    let undone = spikes(&workshop.path("unbroken"));
    let (step, back_to) = (undone[0]["step"].as_u64().unwrap(), undone[0]["back_to"].as_u64().unwrap());
    assert_eq!(Some(step), named[0]["step"].as_u64());
    assert_eq!(back_to, (step - 1) / 5 * 5, "the last checkpoint before the spike");
    assert_eq!(unbroken.state().watch.rollbacks, undone.len() as u64);
    assert_eq!(unbroken.state().step, 150);
    // The data of the lost steps are skipped, not seen again.
    assert_ne!(unbroken.state().positions, logging.state().positions);
    let steps = metrics(&workshop.path("unbroken")).into_iter().filter(|record| record["kind"] == "step");
    let steps = steps.map(|record| record["step"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(steps, (1..=150).collect::<Vec<_>>(), "each step once");

    // Stopped right after the rollback, stopped a step later, and killed later still.
    for (round, stop_at) in [step - 1, back_to + 1, step + 7].into_iter().enumerate() {
        let is_first = round == 0;
        let out = format!("broken-{round}");
        let mut first = workshop.trainer(&recipe, &out, Start::Fresh);
        let mut seen = false;
        let stop = AtomicBool::new(false);
        let mut watch = |event: &Event<'_>| match event {
            Event::Spike(_) => {
                seen = true;
                stop.store(is_first, Ordering::Relaxed);
            }
            Event::Step(record) => stop.store(seen && record.step >= stop_at, Ordering::Relaxed),
            _ => {}
        };
        assert!(!first.run(&stop, &mut watch).unwrap().finished);
        drop(first);
        let mut second = workshop.trainer(&recipe, &out, Start::Resume);
        assert!(run_until(&mut second, u64::MAX));
        assert!(metrics(&workshop.path(&out)) == metrics(&workshop.path("unbroken")), "stopped at {stop_at}");
        assert!(bits(&second) == bits(&unbroken), "stopped at {stop_at}");
        assert_eq!(second.state(), unbroken.state());
    }
}

/// The same recipe with rollbacks instead of names.
fn recipe_with_rollback(recipe: &Recipe) -> Recipe {
    let text = recipe.text().replace("action = 'log'", "action = 'rollback'\nrollbacks = 20");
    Recipe::parse("workshop.toml", &recipe.resolve("".as_ref()), &text).unwrap()
}

/// A rate that grows beyond all bounds: rollbacks run out, and the error says what to do.
#[test]
fn rollbacks_run_out() {
    let workshop = Workshop::new();
    let spikes = "[spikes]\naction = 'rollback'\nwindow = 8\ndeviations = 1\nrise = 0\nrollbacks = 2\n\n[balance]";
    let recipe = workshop.recipe(&[
        ("[balance]", spikes),
        ("learning_rate = 1e-2", "learning_rate = 9"),
        ("steps = 12", "steps = 150"),
    ]);
    let mut trainer = workshop.trainer(&recipe, "run", Start::Fresh);
    let error = trainer.run(&AtomicBool::new(false), &mut Silent).unwrap_err().to_string();
    assert!(error.contains("a loss spike after 2 rollbacks; lower optimizer.learning_rate"), "{error}");
}

/// A model that learns nothing more: the run ends early, and stays ended when it is resumed.
#[test]
fn patience_ends_a_run_that_does_not_improve() {
    let workshop = Workshop::new();
    // A rate of nearly nothing: every validation gives the same loss.
    let recipe = workshop.recipe(&[
        ("learning_rate = 1e-2", "learning_rate = 1e-12"),
        ("minimum_learning_rate = 1e-3", "minimum_learning_rate = 0"),
        ("keep = 2", "keep = 2\npatience = 2"),
        ("steps = 12", "steps = 100"),
        ("validate_every = 4", "validate_every = 1"),
    ]);
    let mut trainer = workshop.trainer(&recipe, "run", Start::Fresh);
    let outcome = trainer.run(&AtomicBool::new(false), &mut Silent).unwrap();
    assert!(outcome.finished && outcome.early && outcome.step < 100, "{outcome:?}");
    assert!(workshop.path("run/model/config.json").is_file());
    let mut again = workshop.trainer(&recipe, "run", Start::Resume);
    assert_eq!(again.run(&AtomicBool::new(false), &mut Silent).unwrap(), outcome);
    let patient =
        Recipe::parse("x", &workshop.path(""), &recipe.text().replace("patience = 2", "patience = 90")).unwrap();
    let mut longer = workshop.trainer(&patient, "run", Start::Resume);
    assert_eq!(longer.state().step, outcome.step);
    assert!(!run_until(&mut longer, outcome.step + 1) && longer.state().step == outcome.step + 1);
}

#[test]
fn another_recipe_texts_or_folder_is_refused() {
    let workshop = Workshop::new();
    let recipe = workshop.recipe(&[]);
    let mut trainer = workshop.trainer(&recipe, "run", Start::Fresh);
    run_until(&mut trainer, 5);
    let out = workshop.path("run");
    let refusal =
        |recipe, start| Trainer::prepare(recipe, &out, start, &mut Silent).err().expect("refused").to_string();

    let changed = workshop.recipe(&[("learning_rate = 1e-2", "learning_rate = 2e-2")]);
    let message = refusal(changed, Start::Resume);
    assert!(
        message.ends_with("step-5: cannot resume: optimizer.learning_rate was 0.01, the recipe now says 0.02"),
        "{message}"
    );
    let message = refusal(recipe.clone(), Start::Fresh);
    assert!(
        message.ends_with("run: already holds a run (at step 5); use --resume to go on, --force to start anew"),
        "{message}"
    );
    let shorter = workshop.recipe(&[("steps = 12", "steps = 4")]);
    let message = refusal(shorter, Start::Resume);
    assert!(message.ends_with("wanted train.steps of at least 5, found 4"), "{message}");

    let text = std::fs::read_to_string(workshop.path("train.txt")).unwrap();
    std::fs::write(workshop.path("train.txt"), text.replacen("amber", "ember", 1)).unwrap();
    let message = refusal(recipe.clone(), Start::Resume);
    assert!(message.ends_with("the texts have changed since the run began: tokens differ"), "{message}");
    std::fs::write(workshop.path("train.txt"), text).unwrap();

    let weights = out.join("checkpoints/step-5/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    let message = refusal(recipe.clone(), Start::Resume);
    assert!(message.contains("step-5/model.safetensors: checkpoint: wanted fingerprint "), "{message}");
    std::fs::remove_file(&weights).unwrap();
    assert!(refusal(recipe.clone(), Start::Resume).contains("step-5/model.safetensors: cannot read: "));

    let mut anew = workshop.trainer(&recipe, "run", Start::Force);
    assert_eq!(anew.state().step, 0);
    assert!(run_until(&mut anew, u64::MAX));
}

/// A longer run goes on where a finished one ended.
#[test]
fn more_steps_may_be_asked_for() {
    let workshop = Workshop::new();
    let mut short = workshop.trainer(&workshop.recipe(&[]), "run", Start::Fresh);
    assert!(run_until(&mut short, u64::MAX));
    let mut long = workshop.trainer(&workshop.recipe(&[("steps = 12", "steps = 14")]), "run", Start::Resume);
    assert!(run_until(&mut long, u64::MAX));
    assert_eq!(long.state().step, 14);
}
