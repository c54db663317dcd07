//! `moebius train` as its users use it: a run, a broken run, an interrupted run.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{assert_fails, moebius, run, stderr, succeed, text, write_recipe};

/// Every file of a run's last checkpoint and of its model, by name, with its bytes.
fn results(out: &Path, steps: usize) -> Vec<(String, Vec<u8>)> {
    let checkpoint = out.join(format!("checkpoints/step-{steps}"));
    let files = [
        checkpoint.join("model.safetensors"),
        checkpoint.join("optimizer.safetensors"),
        out.join("model/model.safetensors"),
        out.join("model/tokenizer.json"),
    ];
    files.iter().map(|path| (path.display().to_string(), std::fs::read(path).expect("a result"))).collect()
}

fn assert_same_results(wanted: &Path, found: &Path, steps: usize) {
    for ((name, wanted), (_, found)) in results(wanted, steps).iter().zip(&results(found, steps)) {
        assert!(wanted == found, "{name} differs from the unbroken run's");
    }
}

fn train(recipe: &Path, out: &Path, more: &[&str]) {
    succeed(&[&["train", text(recipe), "--out", text(out)][..], more].concat());
}

/// Starts a run and waits until it has saved step 10 or a later one.
fn start(recipe: &Path, out: &Path) -> Child {
    let mut command = moebius();
    command.args(["train", text(recipe), "--out", text(out)]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the command starts");
    let begun = Instant::now();
    while last_step(out).is_none_or(|step| step < 10) {
        assert!(child.try_wait().expect("a child").is_none(), "the run ended before its first checkpoint");
        assert!(begun.elapsed() < Duration::from_secs(60), "no checkpoint in a minute");
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

/// The number of the last checkpoint.
fn last_step(out: &Path) -> Option<usize> {
    let names = std::fs::read_dir(out.join("checkpoints")).ok()?.map(|entry| Some(entry.ok()?.file_name()));
    names.flatten().filter_map(|name| name.to_str()?.strip_prefix("step-")?.parse().ok()).max()
}

/// What stands in a run's folder that a finished run does not leave: temporary files.
fn leftovers(out: &Path) -> Vec<PathBuf> {
    let paths = std::fs::read_dir(out).expect("the folder").map(|entry| entry.expect("an entry").path());
    paths.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().contains("tmp"))).collect()
}

#[test]
fn a_run_leaves_a_model_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path(), 40);
    let out = folder.path().join("out");
    let output = run(&["train", text(&recipe), "--out", text(&out)]);
    assert!(output.status.success(), "{}", stderr(&output));
    let lines = stderr(&output);
    for part in ["model: ", "active a token", "step 20: validation loss", "step 40/40", "tokens/s", "load "] {
        assert!(lines.contains(part), "{part:?} is missing in {lines}");
    }
    assert!(!lines.contains('\x1b'), "plain lines in a pipe: {lines:?}");
    assert!(out.join("metrics.jsonl").exists());
    let model = out.join("model");
    let written = succeed(&["run", "the sea", "--model", text(&model), "--max-tokens", "10"]);
    assert!(!written.trim().is_empty());
    let valid = folder.path().join("valid.txt");
    let json = succeed(&["eval", "--model", text(&model), "--text", text(&valid), "--json"]);
    let score: serde_json::Value = serde_json::from_str(&json).unwrap();
    // 300 tokens by chance cost 5.7 nats.
    assert!(score["loss"].as_f64().unwrap() < 5.0, "{json}");

    let again = run(&["train", text(&recipe), "--out", text(&out)]);
    assert_fails("a second run", &again, &[text(&out), "--resume", "--force"]);
    train(&recipe, &out, &["--force", "--threads", "1"]);
    assert!(out.join("model/model.safetensors").exists());
}

/// Samples are written on the way by the engine, the same each time; the log, the page and TensorBoard's file have them.
#[test]
fn samples_spikes_and_pages() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path(), 40);
    let more = "\n[samples]\nevery = 20\nprompts = [\"the sea\", \"old\"]\ntokens = 8\n\n[optimizer.groups.router]\nweight_decay = 0\n";
    std::fs::write(&recipe, std::fs::read_to_string(&recipe).unwrap() + more).unwrap();
    let samples = |out: &Path| {
        let log = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let is_sample = |line: &&str| line.starts_with("{\"kind\":\"sample\"");
        log.lines().filter(is_sample).map(str::to_owned).collect::<Vec<_>>()
    };
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let output = run(&["train", text(&recipe), "--out", text(&first)]);
    let lines = stderr(&output);
    for part in ["step 20: writes \"the sea", "step 40: writes \"old", "MaxVio", "router entropy", "dead "] {
        assert!(lines.contains(part), "{part:?} is missing in {lines}");
    }
    train(&recipe, &second, &["--threads", "1"]);
    assert_eq!(samples(&first).len(), 4);
    assert_eq!(samples(&first), samples(&second));
    let page = std::fs::read_to_string(first.join("report.html")).unwrap();
    assert!(page.contains("<b>the sea</b>") && page.contains("MaxVio"));
    let events = std::fs::read_dir(first.join("tensorboard")).unwrap().next().expect("a file").unwrap();
    assert!(events.file_name().to_string_lossy().starts_with("events.out.tfevents."));
}

#[test]
fn a_killed_run_goes_on_to_the_same_bits() {
    const STEPS: usize = 200;
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path(), STEPS);
    let (unbroken, broken) = (folder.path().join("unbroken"), folder.path().join("broken"));
    train(&recipe, &unbroken, &["--threads", "2"]);
    let mut child = start(&recipe, &broken);
    child.kill().expect("SIGKILL");
    child.wait().expect("the end");
    assert!(last_step(&broken).unwrap() < STEPS, "killed too late to show anything");
    train(&recipe, &broken, &["--resume", "--threads", "1"]);
    assert_same_results(&unbroken, &broken, STEPS);
    assert!(leftovers(&broken).is_empty(), "{:?}", leftovers(&broken));
    assert_eq!(
        std::fs::read_to_string(unbroken.join("metrics.jsonl")).unwrap().lines().count(),
        std::fs::read_to_string(broken.join("metrics.jsonl")).unwrap().lines().count(),
    );
}

#[test]
fn an_interrupted_run_ends_with_a_checkpoint_and_goes_on_to_the_same_bits() {
    const STEPS: usize = 200;
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path(), STEPS);
    let (unbroken, broken) = (folder.path().join("unbroken"), folder.path().join("broken"));
    train(&recipe, &unbroken, &[]);
    let child = start(&recipe, &broken);
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    assert!(killed.success());
    let output = child.wait_with_output().expect("the end");
    assert!(output.status.success(), "{}", stderr(&output));
    let stopped = last_step(&broken).unwrap();
    assert!(stopped < STEPS, "interrupted too late to show anything");
    assert!(common::stdout(&output).contains(&format!("stopped after step {stopped}")), "{}", common::stdout(&output));
    train(&recipe, &broken, &["--resume"]);
    assert_same_results(&unbroken, &broken, STEPS);
}

#[test]
fn what_a_run_cannot_do_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path(), 10);
    let out = folder.path().join("out");
    let good = std::fs::read_to_string(&recipe).unwrap();
    let fails = |what: &str, recipe_text: &str, parts: &[&str]| {
        let path = folder.path().join("bad.toml");
        std::fs::write(&path, recipe_text).unwrap();
        assert_fails(what, &run(&["train", text(&path), "--out", text(&out)]), parts);
        assert!(!out.exists(), "{what}: nothing may be written");
    };
    fails("unknown key", &good.replace("seed = 7", "seed = 7\nsped = 1"), &["bad.toml:20", "sped"]);
    fails("wrong type", &good.replace("steps = 10", "steps = \"ten\""), &["bad.toml:20", "steps"]);
    fails(
        "wrong range",
        &good.replace("experts_per_token = 2", "experts_per_token = 9"),
        &["bad.toml:8", "experts_per_token"],
    );
    fails("no TOML", "[model\n", &["bad.toml:1"]);
    fails("missing text", &good.replace("train.txt", "gone.txt"), &["gone.txt"]);
    let missing = run(&["train", "nowhere.toml", "--out", text(&out)]);
    assert_fails("missing recipe", &missing, &["nowhere.toml"]);
    let nothing = run(&["train", text(&recipe), "--out", text(&out), "--resume"]);
    assert_fails("nothing to resume", &nothing, &[text(&out), "resume"]);
    let unwritable = run(&["train", text(&recipe), "--out", "/proc/nowhere/out"]);
    assert_fails("unwritable", &unwritable, &["/proc/nowhere"]);

    std::fs::write(folder.path().join("train.txt"), b"the sea \xff\n").unwrap();
    fails("no UTF-8", &good, &["train.txt", "UTF-8", "0xff", "8"]);
}
