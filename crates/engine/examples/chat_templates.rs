//! Compares rendered chat templates with what transformers made of them.
//!
//! `chat_templates FILE` reads what `bench/chat_templates.py` has written and prints how many conversations of each
//! template give the same text. It exits with 1 if one does not.

use std::process::ExitCode;

use moebius_engine::{ChatTemplate, Conversation, Message};
use serde_json::Value;

fn main() -> ExitCode {
    let Some(file) = std::env::args().nth(1) else {
        eprintln!("usage: chat_templates FILE");
        return ExitCode::from(2);
    };
    let templates: Vec<Value> =
        serde_json::from_slice(&std::fs::read(&file).expect("a file")).expect("a list of templates");
    let mut all = true;
    for entry in &templates {
        let name = entry["name"].as_str().unwrap_or_default();
        let cases = entry["cases"].as_array().map(Vec::as_slice).unwrap_or_default();
        let same = match ChatTemplate::from_json(&entry["template"], name) {
            Ok(template) => cases.iter().filter(|case| agrees(&template, entry, case)).count(),
            Err(error) => {
                println!("{error}");
                0
            }
        };
        all &= same == cases.len();
        println!("{name:<24} {same} of {}", cases.len());
    }
    if all { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Renders a conversation; shows what differs.
fn agrees(template: &ChatTemplate, entry: &Value, case: &Value) -> bool {
    let messages = case["messages"].as_array().into_iter().flatten().cloned();
    let messages: Vec<Message> = messages.filter_map(Message::from_json).collect();
    let special = entry["special"].as_object().into_iter().flatten();
    let template = special.fold(template.clone(), |template, (name, token)| {
        template.with_special(name, token.as_str().unwrap_or_default())
    });
    let conversation = Conversation {
        messages: &messages,
        tools: case["tools"].as_array().map(Vec::as_slice).unwrap_or_default(),
        add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap_or(false),
        variables: case["variables"].as_object().cloned().unwrap_or_default(),
    };
    match (template.render(&conversation), case["wanted"].as_str()) {
        (Ok(found), Some(wanted)) if found == wanted => true,
        (Err(_), None) => true,
        (found, wanted) => {
            println!("    wanted {wanted:?}{}\n    found  {found:?}", case["refused"]);
            false
        }
    }
}
