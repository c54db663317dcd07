//! `moebius run` as its users use it, and the rules that hold for every command.

mod common;

use std::process::Stdio;

use common::{assert_fails, moebius, run, run_with_input, stderr, stdout, succeed, text, write_model};

#[test]
fn the_shipped_model_writes_and_ends_with_figures() {
    let output = run(&["run", "Once upon a", "--max-tokens", "12"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!stdout(&output).trim().is_empty());
    let figures = stderr(&output);
    assert_eq!(figures.lines().count(), 1, "{figures}");
    for part in
        ["prompt: ", "tokens/s; text: ", " generated, ", " tokens/s; parameters: ", " in all, ", " active a token"]
    {
        assert!(figures.contains(part), "{part:?} is missing in {figures:?}");
    }
}

#[test]
fn text_does_not_depend_on_threads_and_follows_the_seed() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(folder.path());
    for [flag, value] in [["--dtype", "f32"], ["--dtype", "bf16"], ["--cache", "q8"]] {
        let write = |threads: &str, seed: &str| {
            let rest = ["--temperature", "1.2", "--max-tokens", "60", "--seed", seed, flag, value];
            succeed(&[&["run", "The old sea", "--model", text(&model), "--threads", threads][..], &rest].concat())
        };
        let one = write("1", "5");
        assert_eq!(one, write("2", "5"), "{value}");
        assert_eq!(one, write("3", "5"), "{value}");
        assert_ne!(one, write("2", "6"), "{value}");
    }
}

#[test]
fn the_prompt_comes_from_standard_input_too() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(folder.path());
    let options = ["--model", text(&model), "--temperature", "0", "--max-tokens", "20"];
    let wanted = succeed(&[&["run", "The sea"][..], &options].concat());
    for (arguments, input) in [(&["run"][..], &b"The sea\n"[..]), (&["run", "-"], b"The sea")] {
        let output = run_with_input(&[arguments, &options].concat(), input);
        assert_eq!(stdout(&output), wanted, "{}", stderr(&output));
    }
    let empty = run_with_input(&[&["run"][..], &options].concat(), b"\n");
    assert_fails("empty", &empty, &["the prompt is empty"]);
    let foreign = run_with_input(&[&["run"][..], &options].concat(), b"The \xc3( sea");
    assert_fails("no UTF-8", &foreign, &["standard input", "UTF-8", "0xc3", "offset 4"]);
}

#[test]
fn a_stop_text_ends_the_text_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(folder.path());
    let options =
        ["run", "The sea", "--model", text(&model), "--seed", "3", "--max-tokens", "80", "--temperature", "1"];
    let whole = succeed(&options);
    let whole = whole.trim_end_matches('\n');
    let letters: Vec<char> = whole.chars().collect();
    assert!(letters.len() > 20, "{whole:?}");
    let stop: String = letters[10..12].iter().collect();
    let stopped = succeed(&[&options[..], &["--stop", "never in it", "--stop", &stop]].concat());
    let before = whole.find(&stop).unwrap();
    assert_eq!(stopped, format!("{}\n", &whole[..before]));
}

#[test]
fn experts_are_shown_for_every_token_of_prompt_and_text() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(folder.path());
    let arguments =
        ["run", "abc", "--model", text(&model), "--max-tokens", "5", "--show-experts", "--temperature", "0"];
    let table = succeed(&arguments);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>(), ["token", "L0", "L1"]);
    assert_eq!(lines.len(), 1 + 3 + 5, "{table}");
    assert!(lines[1].starts_with("> \"a\"") && lines[4].starts_with("  \""), "{table}");
    assert!(!table.contains('\x1b'), "no colours in a pipe");
    for line in &lines[1..] {
        let experts: Vec<u32> = line.split_whitespace().rev().take(4).map(|id| id.parse().expect(line)).collect();
        assert!(experts.iter().all(|&expert| expert < 4) && experts[0] != experts[1] && experts[2] != experts[3]);
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(folder.path());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = moebius();
    command.args(["run", "The sea", "--model", text(&model), "--max-tokens", "80"]).stdout(writer);
    let output = command.stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(stderr(&output), "");
}

#[test]
fn an_output_without_room_is_named() {
    let mut command = moebius();
    command.args(["run", "Once", "--max-tokens", "3"]).stdout(std::fs::File::create("/dev/full").unwrap());
    let output = command.stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    assert_fails("full disk", &output, &["standard output", "No space left"]);
}

#[test]
fn help_suffices_and_wrong_usage_is_2() {
    for command in ["run", "train", "eval", "logits", "check"] {
        let help = succeed(&[command, "--help"]);
        assert!(help.contains("Example") && help.contains(&format!("moebius {command} ")), "{help}");
    }
    let help = succeed(&["--help"]);
    for command in ["run", "train", "eval", "logits", "check", "--threads"] {
        assert!(help.contains(command), "{help}");
    }
    let wrong: [&[&str]; 8] = [
        &[],
        &["sing"],
        &["run", "--temprature", "1", "x"],
        &["run", "x", "--max-tokens", "many"],
        &["run", "x", "--dtype", "f64"],
        &["run", "x", "--threads", "0"],
        &["train", "recipe.toml"],
        &["train", "recipe.toml", "--out", "x", "--resume", "--force"],
    ];
    for arguments in wrong {
        assert_eq!(run(arguments).status.code(), Some(2), "{arguments:?}");
    }
    let ranges: [(&[&str], &str); 4] = [
        (&["--temperature", "-1"], "temperature must be 0 or a positive number, found -1"),
        (&["--top-p", "1.5"], "top-p must be above 0 and at most 1, found 1.5"),
        (&["--min-p", "2"], "min-p must be from 0 to 1, found 2"),
        (&["--repetition-penalty", "0"], "repetition penalty must be a positive number, found 0"),
    ];
    for (flags, message) in ranges {
        assert_fails(message, &run(&[&["run", "x"], flags].concat()), &[message]);
    }
}
