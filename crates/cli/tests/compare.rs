//! `moebius compare` as its users use it: two recipes, two seeds, a second call, a third recipe.

mod common;

use std::path::{Path, PathBuf};

use common::{assert_fails, run, stderr, succeed, text, write_recipe};

/// Two recipes on the same texts: sparse, and dense with the same active size.
fn recipes(folder: &Path) -> [PathBuf; 2] {
    let sparse = write_recipe(folder, 40);
    let written = std::fs::read_to_string(&sparse).unwrap();
    let dense = written.replace("ffn = 48\nexperts = 4\nexperts_per_token = 2\n", "ffn = 96\n");
    let (dense, _) = dense.split_once("[balance]").expect("a section");
    let path = folder.join("dense.toml");
    std::fs::write(&path, dense).unwrap();
    [path, sparse]
}

/// The time of a run's last change.
fn changed(path: &Path) -> std::time::SystemTime {
    path.metadata().unwrap().modified().unwrap()
}

#[test]
fn runs_are_made_once_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let [dense, sparse] = recipes(folder.path());
    let out = folder.path().join("out");
    let arguments = ["compare", text(&dense), text(&sparse), "--seeds", "1,2", "--out", text(&out)];
    let output = succeed(&arguments);
    for part in ["at equal steps: 40 steps", "at equal arithmetic", "at equal time", "at equal total parameters", "±"]
    {
        assert!(output.contains(part), "{part}: {output}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(out.join("compare.json")).unwrap()).unwrap();
    let row = &json["budgets"][0]["rows"][1];
    assert_eq!(row["name"], "recipe");
    assert_eq!(row["differences"].as_array().unwrap().len(), 2);
    let html = std::fs::read_to_string(out.join("compare.html")).unwrap();
    assert!(html.starts_with("<!doctype html>") && html.matches("<svg").count() >= 2);

    // The same seed gives both recipes the same tokens in the same order, and the same number to validate on.
    let runs = std::fs::read_dir(out.join("runs")).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    assert_eq!(runs.len(), 4);
    let positions = runs.iter().map(|run| {
        let state = std::fs::read_to_string(run.join("checkpoints/step-40/trainer.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&state).unwrap()["state"]["positions"].clone()
    });
    let positions = positions.collect::<Vec<_>>();
    assert!(positions.iter().all(|position| *position == positions[0]));

    // Nothing is made twice: neither by the same call nor where one recipe changes.
    let before = runs.iter().map(|run| changed(&run.join("metrics.jsonl"))).collect::<Vec<_>>();
    let again = run(&arguments);
    assert_eq!(common::stdout(&again), output, "{}", stderr(&again));
    let slower = std::fs::read_to_string(&sparse).unwrap().replace("learning_rate = 3e-3", "learning_rate = 2e-3");
    std::fs::write(&sparse, slower).unwrap();
    succeed(&arguments);
    assert_eq!(runs.iter().map(|run| changed(&run.join("metrics.jsonl"))).collect::<Vec<_>>(), before);
    assert_eq!(std::fs::read_dir(out.join("runs")).unwrap().count(), 6);

    // A run that lost its end goes on instead of starting anew, to the same bits.
    let (finished, weights) = (runs[0].join("compared.json"), runs[0].join("checkpoints/step-40/model.safetensors"));
    let (told, bits) = (std::fs::read(&finished).unwrap(), std::fs::read(&weights).unwrap());
    std::fs::remove_file(&finished).unwrap();
    std::fs::remove_dir_all(runs[0].join("checkpoints/step-40")).unwrap();
    std::fs::write(&sparse, std::fs::read_to_string(&sparse).unwrap().replace("rate = 2e-3", "rate = 3e-3")).unwrap();
    succeed(&arguments);
    assert!(std::fs::read(&weights).unwrap() == bits);
    assert_eq!(
        String::from_utf8_lossy(&told).lines().count(),
        std::fs::read_to_string(&finished).unwrap().lines().count()
    );
}

#[test]
fn what_cannot_be_compared_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let [dense, sparse] = recipes(folder.path());
    let out = folder.path().join("out");
    let fails = |what: &str, recipes: &[&Path], parts: &[&str]| {
        let paths = recipes.iter().map(|path| text(path)).collect::<Vec<_>>();
        assert_fails(what, &run(&[&["compare"], &paths[..], &["--out", text(&out)]].concat()), parts);
        assert!(!out.exists(), "{what}: nothing may be written");
    };
    fails("one recipe", &[&dense], &["two recipes"]);
    fails("the same twice", &[&dense, &dense], &["dense twice"]);
    let other = std::fs::read_to_string(&sparse).unwrap().replace("sequences = 8", "sequences = 4");
    std::fs::write(&sparse, other).unwrap();
    fails("other batches", &[&dense, &sparse], &["256 tokens a step in the one, 128 in the other"]);
}
