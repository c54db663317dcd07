//! Sources other than text files: tables of the reference implementation, mixtures, documents apart.

mod common;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use common::{Workshop, bits, metrics};
use moebius_train::data::documents::Pieces;
use moebius_train::{Event, Recipe, Silent, Start};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The documents of one source.
fn texts(source: &str) -> Result<Vec<String>, String> {
    let text =
        format!("[model]\npreset = 'dense-nano'\n[data]\ntrain = [{source}]\nvalid = ['v']\n[train]\nsteps = 9\n");
    let recipe = Recipe::parse("x.toml", Path::new(""), &text).map_err(|error| error.to_string())?;
    let pieces = Pieces::of(&recipe, &recipe.data.train).map_err(|error| error.to_string())?;
    pieces.map(|piece| piece.map(|piece| piece.text).map_err(|error| error.to_string())).collect()
}

#[test]
fn tables_of_pyarrow_are_read() {
    for name in ["snappy.parquet", "zstd.parquet", "plain.parquet", "file.arrow", "stream.arrow", "view.feather"] {
        let path = fixture(name);
        let path = path.display();
        assert_eq!(texts(&format!("'{path}'")).unwrap(), ["first row", "zweite Zeile: schön", "last\nrow"], "{name}");
        let missing = texts(&format!("{{ path = '{path}', key = 'story' }}")).unwrap_err();
        assert!(missing.contains("wanted a column `story`, found `id`, `text`, `nested`"), "{missing}");
        for key in ["id", "nested"] {
            let other = texts(&format!("{{ path = '{path}', key = '{key}' }}")).unwrap_err();
            assert!(other.contains(&format!("column `{key}`: wanted texts, found")), "{other}");
        }
    }
}

/// Tables with bytes changed and cut: texts or one line that names the file, never a panic that reaches the caller.
#[test]
fn damaged_tables_are_refused_or_read() {
    std::panic::set_hook(Box::new(|_| {}));
    let folder = tempfile::tempdir().unwrap();
    let mut state = 1_u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % below
    };
    for name in ["snappy.parquet", "plain.parquet", "file.arrow", "stream.arrow"] {
        let sound = std::fs::read(fixture(name)).unwrap();
        for round in 0..150 {
            let mut bytes = sound.clone();
            match round % 3 {
                0 => bytes.truncate(random(bytes.len())),
                _ => (0..1 + round % 4).for_each(|_| {
                    let at = random(bytes.len());
                    bytes[at] = random(256) as u8;
                }),
            }
            let path = folder.path().join(name);
            std::fs::write(&path, &bytes).unwrap();
            if let Err(message) = texts(&format!("'{}'", path.display())) {
                assert!(message.contains(name) && !message.contains('\n'), "{message}");
            }
        }
    }
}

/// The workshop's text as JSON lines, a line a document.
fn write_lines(workshop: &Workshop, from: &str, to: &str) {
    let text = std::fs::read_to_string(workshop.path(from)).unwrap();
    let lines = text.lines().map(|line| serde_json::json!({ "story": format!("{line}\n") }).to_string() + "\n");
    std::fs::write(workshop.path(to), lines.collect::<String>()).unwrap();
}

/// Mixed sources and documents apart: a run that was stopped anywhere goes on to the same bits.
#[test]
fn a_mixture_resumes_exactly() {
    let workshop = Workshop::new();
    write_lines(&workshop, "train.txt", "train.jsonl");
    let sources = "train = [{ path = 'train.jsonl', key = 'story', weight = 3 }, { path = 'other.txt', weight = 1 }]";
    let recipe = workshop
        .recipe(&[("train = ['train.txt']", &format!("{sources}\ndocuments = 'apart'")), ("steps = 12", "steps = 40")]);
    let run = |out: &str, start: Start, stop_at: u64| {
        let mut trainer = workshop.trainer(&recipe, out, start);
        let stop = AtomicBool::new(false);
        let mut watch = |event: &Event<'_>| {
            if let Event::Step(record) = event {
                stop.store(record.step == stop_at, std::sync::atomic::Ordering::Relaxed);
            }
        };
        trainer.run(&stop, &mut watch).unwrap();
        trainer
    };
    let unbroken = run("unbroken", Start::Fresh, 0);
    // 160 windows: 120 and 40 of them, the short text several times over.
    let taken = |at: usize| unbroken.state().positions[at];
    assert_eq!(unbroken.state().positions.len(), 2);
    assert!(taken(1).epoch >= 1 || taken(1).taken == 40, "{:?}", unbroken.state().positions);
    for stop_at in [1, 17] {
        let out = format!("broken-{stop_at}");
        drop(run(&out, Start::Fresh, stop_at));
        let resumed = run(&out, Start::Resume, 0);
        assert!(bits(&resumed) == bits(&unbroken), "stopped at {stop_at}");
        assert_eq!(resumed.state(), unbroken.state());
        assert_eq!(metrics(&workshop.path(&out)), metrics(&workshop.path("unbroken")));
    }
}

/// With documents apart, what stands before a separator does not reach what stands behind it: two corpora that differ in
/// their first documents alone give the same losses on the windows of the last.
#[test]
fn attention_keeps_to_its_document() {
    use moebius_train::data::corpus::Corpus;
    let workshop = Workshop::new();
    write_lines(&workshop, "train.txt", "train.jsonl");
    let windows = |documents: &str| {
        let sources = format!("train = [{{ path = 'train.jsonl', key = 'story' }}]\ndocuments = '{documents}'");
        let recipe = workshop.recipe(&[("train = ['train.txt']", &sources)]);
        let corpus = Corpus::prepare(&recipe, &workshop.path(documents), &mut Silent).unwrap();
        corpus.train_windows(16, &[(0, 0), (0, 3)])
    };
    let (joined, apart) = (windows("joined"), windows("apart"));
    assert_eq!((&joined.tokens, &joined.targets), (&apart.tokens, &apart.targets));
    assert_eq!(joined.starts, [0, 16]);
    let separators = (0..32).filter(|&at| at % 16 != 0 && apart.tokens[at] == 0).collect::<Vec<_>>();
    assert!(!separators.is_empty(), "a line is shorter than a window");
    let mut wanted = [vec![0, 16], separators].concat();
    wanted.sort_unstable();
    assert_eq!(apart.starts, wanted);
    let sequences = apart.sequences();
    assert_eq!(sequences.concat(), apart.tokens);
    assert!(sequences.iter().all(|sequence| !sequence[1..].contains(&0)), "a separator begins a sequence");
}

/// However texts come, as one file, as a folder, as JSON lines with a line a document, the shards are those of the texts.
#[test]
fn the_same_documents_give_the_same_tokens() {
    use moebius_train::data::corpus::Corpus;
    let workshop = Workshop::new();
    write_lines(&workshop, "train.txt", "train.jsonl");
    let text = std::fs::read_to_string(workshop.path("train.txt")).unwrap();
    std::fs::create_dir(workshop.path("folder")).unwrap();
    for (at, line) in text.lines().enumerate() {
        std::fs::write(workshop.path(&format!("folder/{at:05}.txt")), format!("{line}\n")).unwrap();
    }
    let tokens = |source: &str, out: &str| {
        let recipe = workshop.recipe(&[("train = ['train.txt']", &format!("train = [{source}]"))]);
        let corpus = Corpus::prepare(&recipe, &workshop.path(out), &mut Silent).unwrap();
        let mut tokens = Vec::new();
        corpus.train[0].copy(0, corpus.train[0].len(), &mut tokens);
        (tokens, corpus.digest())
    };
    assert_eq!(tokens("{ path = 'train.jsonl', key = 'story' }", "lines"), tokens("'folder'", "folders"));
}
