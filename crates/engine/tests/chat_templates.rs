//! Chat templates render as in transformers, whose words `fixtures/make.py` has written down; hostile ones end.

use std::path::Path;
use std::time::Instant;

use moebius_engine::{ChatTemplate, Conversation, Message};
use serde_json::{Value, json};

fn render(source: &str, messages: &[Message]) -> Result<String, String> {
    let template = ChatTemplate::new(source, "model/chat_template.jinja").map_err(|error| error.to_string())?;
    template.render(&Conversation { messages, ..Conversation::default() }).map_err(|error| error.to_string())
}

#[test]
fn features_render_as_in_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates.json");
    let templates: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(templates.len() > 10);
    let mut different = Vec::new();
    for entry in &templates {
        let name = entry["name"].as_str().unwrap();
        let mut template = ChatTemplate::from_json(&entry["template"], name).unwrap();
        for (token, text) in entry["special"].as_object().unwrap() {
            template = template.with_special(token, text.as_str().unwrap());
        }
        for (at, case) in entry["cases"].as_array().unwrap().iter().enumerate() {
            let messages = case["messages"].as_array().unwrap().iter().cloned();
            let messages: Vec<Message> = messages.map(|message| Message::from_json(message).unwrap()).collect();
            let found = template.render(&Conversation {
                messages: &messages,
                tools: case["tools"].as_array().map(Vec::as_slice).unwrap_or_default(),
                add_generation_prompt: case["add_generation_prompt"] == true,
                variables: case["variables"].as_object().cloned().unwrap_or_default(),
            });
            let same = match (&found, case["wanted"].as_str()) {
                (Ok(found), Some(wanted)) => found == wanted,
                (Err(_), None) => true,
                _ => false,
            };
            if !same {
                different.push(format!("{name} {at}: wanted {}\n  found {found:?}", case["wanted"]));
            }
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
}

#[test]
fn errors_name_file_and_line() {
    let hello = [Message::text("user", "Hello")];
    for (source, line, reason) in [
        ("a\nb\n{% if %}", 3, "unexpected"),
        ("{{ 1 }}\n{{ raise_exception('Only questions, please') }}", 2, "Only questions, please"),
        ("\n\n{{ messages[0].content.fly() }}", 3, "fly"),
        ("{{ messages[0].content | undo }}", 1, "undo"),
        ("{% include 'secret' %}", 1, ""),
        ("{{ strftime_now('%Q%') }}", 1, "strftime_now"),
        ("{{ messages | tojson(indent=1000000000) }}", 1, "indent"),
    ] {
        let message = render(source, &hello).unwrap_err();
        let start = format!("model/chat_template.jinja, line {line} of the template: chat template: ");
        assert!(message.starts_with(&start) && message.contains(reason) && !message.contains('\n'), "{message}");
    }
}

#[test]
fn hostile_templates_end_soon() {
    let messages: Vec<Message> = (0..20).map(|_| Message::text("user", "Hello")).collect();
    let started = Instant::now();
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='0123456789') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{% set n = namespace(x=[]) %}{% for a in range(90000) %}{% for b in range(90000) %}{% set n.x = [n.x] %}{% endfor %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=[1]) %}{% for a in range(999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}",
        "{{ 'x' * 999999999999 }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ [1] * 99999999999 }}",
    ] {
        let result = render(source, &messages);
        assert!(result.is_err(), "{source} gave {} bytes", result.unwrap().len());
    }
    let deep = format!("{}1{}", "(".repeat(5000), ")".repeat(5000));
    assert!(render(&format!("{{{{ {deep} }}}}"), &messages).is_err());
    assert!(render(&"x".repeat(2 << 20), &messages).unwrap_err().contains("wanted at most"));
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
}

#[test]
fn long_conversations_have_the_steps_they_need() {
    let messages: Vec<Message> =
        (0..20_000).map(|_| Message::text("user", "Hello there, this is one of many")).collect();
    let source = "{% for m in messages %}{% if m.role == 'user' and loop.index0 % 1 == 0 %}<{{ m.role }}>\
                  {{ m.content.strip() | trim }}{% endif %}{% endfor %}";
    assert!(render(source, &messages).unwrap().len() > 700_000);
}

#[test]
fn templates_are_found_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let show = |tools: &[Value]| {
        let template = ChatTemplate::from_folder(folder.path()).unwrap().expect("a template");
        let messages = [Message::text("user", "Hi")];
        template.render(&Conversation { messages: &messages, tools, ..Conversation::default() }).unwrap()
    };
    assert!(ChatTemplate::from_folder(folder.path()).unwrap().is_none());
    write("tokenizer_config.json", r#"{"bos_token": {"content": "<b>"}, "eos_token": "<e>"}"#);
    assert!(ChatTemplate::from_folder(folder.path()).unwrap().is_none());
    write("chat_template.json", r#"{"chat_template": "old {{ bos_token }}"}"#);
    assert_eq!(show(&[]), "old <b>");
    let named = json!({"bos_token": "<b>", "chat_template": [
        {"name": "default", "template": "plain {{ messages[0].content }}{{ bos_token }}"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"}]});
    write("tokenizer_config.json", &named.to_string());
    assert_eq!((show(&[]), show(&[json!({})])), ("plain Hi<b>".into(), "1 tools".into()));
    write("chat_template.jinja", "own {{ messages[0].role }}");
    assert_eq!(show(&[]), "own user");
    write("chat_template.jinja", "{{ }}");
    let message = ChatTemplate::from_folder(folder.path()).unwrap_err().to_string();
    assert!(message.contains("chat_template.jinja, line 1"), "{message}");
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    write("tokenizer_config.json", r#"{"chat_template": 5}"#);
    let message = ChatTemplate::from_folder(folder.path()).unwrap_err().to_string();
    assert!(message.contains("tokenizer_config.json: chat template: wanted a text or a list"), "{message}");
}
