//! A run that was stopped and resumed gives the bits of one that was not.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{Workshop, bits, metrics};
use moebius_train::{Event, Silent, Start, Trainer};

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

#[test]
fn stopped_and_resumed_equals_unbroken() {
    for changes in [vec![], vec![("accumulation = 1", "accumulation = 3"), ("sequences = 4", "sequences = 2")]] {
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
