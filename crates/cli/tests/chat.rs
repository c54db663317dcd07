//! `moebius chat` through a pipe: turns, commands, what is read again and what is not, and models that cannot chat.

mod common;

use std::path::Path;

use common::{assert_fails, run, run_with_input, stderr, stdout, text, write_model};

/// Each message between its role and a full stop; the assistant's turn is open at the end.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}.{% endfor %}\
                        {% if add_generation_prompt %}a:{% endif %}";

fn chat(model: &Path, more: &[&str], input: &str) -> (String, String) {
    let fixed = ["chat", "--model", text(model), "--temperature", "0", "--max-tokens", "4", "--figures"];
    let output = run_with_input(&[&fixed[..], more].concat(), input.as_bytes());
    assert!(output.status.success(), "{}", stderr(&output));
    (stdout(&output), stderr(&output))
}

/// (tokens of the conversation, kept from before) of each answer.
fn kept(figures: &str) -> Vec<(usize, usize)> {
    let lines = figures.lines().filter_map(|line| line.strip_prefix("conversation: "));
    let number = |text: &str| text.trim().split(' ').next().unwrap().parse().unwrap();
    lines
        .map(|line| {
            let mut parts = line.split(", ");
            (number(parts.next().unwrap()), number(parts.next().unwrap()))
        })
        .collect()
}

fn model_with_template(folder: &Path) -> std::path::PathBuf {
    let model = write_model(folder);
    std::fs::write(model.join("chat_template.jinja"), TEMPLATE).unwrap();
    model
}

#[test]
fn turns_keep_what_the_model_has_read() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_with_template(folder.path());
    let (answers, figures) = chat(&model, &[], "Hello\nAnd?\n");
    assert!(!answers.is_empty());
    let turns = kept(&figures);
    assert_eq!(turns.len(), 2, "{figures}");
    assert_eq!(turns[0], ("u:Hello.a:".len(), 0));
    // The tiny model's answer is bytes, some of them no text, so that what it wrote may read otherwise.
    assert!(turns[1].1 >= "u:Hello.a:".len() && turns[1].1 < turns[1].0, "{turns:?}");

    // The same turn after another beginning gives the same answer as alone: nothing old shines through.
    let (alone, _) = chat(&model, &["--system", "Be kind"], "Sun\n");
    let (after, figures) = chat(&model, &[], "Hello\n/system Be kind\nSun\n/reset\nSun\n");
    assert!(after.ends_with(&format!("{alone}{alone}")), "{after:?} {alone:?}");
    let turns = kept(&figures);
    assert_eq!((turns[1].1, turns[2].1), (0, turns[2].0 - 1), "{turns:?}");
}

#[test]
fn commands_answer_on_standard_error_and_quit_leaves() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_with_template(folder.path());
    let (answers, notes) = chat(&model, &[], "/help\n\n/dance now\n/quit\nHello\n");
    assert_eq!(answers, "");
    assert!(notes.contains("/reset") && notes.contains("/dance is no command"), "{notes}");
}

#[test]
fn a_full_context_and_a_refusal_are_said_and_the_conversation_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_with_template(folder.path());
    let long = "x".repeat(100);
    let (answers, notes) = chat(&model, &[], &format!("{long}\nHi\n"));
    assert!(notes.contains("the conversation is full") && !answers.is_empty(), "{notes}");
    assert_eq!(kept(&notes), [("u:Hi.a:".len(), 0)]);

    let strict = folder.path().join("strict.jinja");
    std::fs::write(&strict, "{% if 'x' in messages[-1].content %}{{ raise_exception('no x') }}{% endif %}?").unwrap();
    let (_, notes) = chat(&model, &["--template", text(&strict)], "x\ny\n");
    assert!(notes.contains("strict.jinja, line 1 of the template: chat template: no x"), "{notes}");
    assert_eq!(kept(&notes).len(), 1, "{notes}");
}

#[test]
fn models_that_cannot_chat_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_model(folder.path());
    let output = run(&["chat", "--model", text(&model)]);
    assert_fails("no template", &output, &[text(&model), "has no chat template", "--template FILE"]);
    assert_fails("shipped", &run(&["chat"]), &["the model inside this binary has no chat template", "--model DIR"]);
    let output = run(&["chat", "--model", text(&model), "--template", "/nowhere/t.jinja"]);
    assert_fails("missing", &output, &["/nowhere/t.jinja"]);
    std::fs::write(model.join("chat_template.jinja"), "{% for %}").unwrap();
    assert_fails("broken", &run(&["chat", "--model", text(&model)]), &["chat_template.jinja, line 1 of the template"]);
}
