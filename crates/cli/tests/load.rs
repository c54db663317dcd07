//! `moebius load` against small servers made here: a sound one, a busy one, and ones that do wrong.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{assert_fails, run};
use serde_json::{Value, json};

/// How a server behaves.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Sound,
    /// Every third stream is put off.
    Busy,
    /// Forgets the answer's end.
    Breaks,
    /// Answers change after the first few streams.
    Forgetful,
    /// Bad requests get status 500.
    Clumsy,
}

static STREAMS: [AtomicUsize; 5] = [const { AtomicUsize::new(0) }; 5];

/// Starts a server on a port of its own; it lives as long as the test.
fn server(manner: Manner) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || stream.and_then(|stream| answer(stream, manner)));
        }
    });
    format!("http://{address}")
}

fn answer(mut stream: TcpStream, manner: Manner) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut first, mut length, mut line) = (String::new(), Some(0), String::new());
    reader.read_line(&mut first)?;
    while reader.read_line(&mut line)? > 2 {
        if let Some(value) = line.to_lowercase().strip_prefix("content-length: ") {
            length = value.trim().parse().ok();
        } else if line.to_lowercase().starts_with("transfer-encoding") {
            length = None;
        }
        line.clear();
    }
    let small = length.filter(|&length: &usize| length < 1 << 20);
    let mut body = vec![0; small.unwrap_or(0)];
    reader.read_exact(&mut body)?;
    let body: Option<Value> = serde_json::from_slice(&body).ok();
    match (&first[..], body) {
        (line, _) if line.starts_with("GET /v1/models ") => reply(&mut stream, 200, &json!({"data": [{"id": "m"}]})),
        (line, Some(body)) if line.starts_with("POST /v1/chat/completions ") && is_good(&body) => {
            chat(stream, &body, manner)
        }
        _ => {
            let status = if manner == Manner::Clumsy { 500 } else { 400 };
            reply(&mut stream, status, &json!({"error": {"message": "no", "type": "invalid_request_error"}}))
        }
    }
}

fn is_good(body: &Value) -> bool {
    body["messages"][0]["content"].is_string() && body["max_tokens"].is_u64()
}

fn reply(stream: &mut TcpStream, status: u16, body: &Value) -> std::io::Result<()> {
    let body = body.to_string();
    let retry = if status == 429 { "retry-after: 0\r\n" } else { "" };
    let length = body.len();
    let answer = format!("HTTP/1.1 {status} X\r\n{retry}content-length: {length}\r\nconnection: close\r\n\r\n{body}");
    stream.write_all(answer.as_bytes())?;
    // A socket that is closed with something left to read resets the connection, and the reset may overtake the answer.
    stream.shutdown(std::net::Shutdown::Write)?;
    std::io::copy(stream, &mut std::io::sink()).map(drop)
}

/// Answers with the prompt's first words, as many as may be.
fn chat(mut stream: TcpStream, body: &Value, manner: Manner) -> std::io::Result<()> {
    let prompt = body["messages"][0]["content"].as_str().unwrap();
    let words: Vec<&str> = prompt.split(' ').collect();
    let made = words.len().min(body["max_tokens"].as_u64().unwrap() as usize);
    // A template of four tokens; a word is two.
    let usage = json!({"prompt_tokens": 4 + 2 * words.len(), "completion_tokens": made});
    if body["stream"] != true {
        return reply(&mut stream, 200, &json!({"choices": [], "usage": usage}));
    }
    let number = STREAMS[manner as usize].fetch_add(1, Ordering::SeqCst);
    if manner == Manner::Busy && number.is_multiple_of(3) {
        return reply(&mut stream, 429, &json!({"error": {"message": "busy", "type": "overloaded"}}));
    }
    write!(stream, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")?;
    for word in &words[..made] {
        let word = if manner == Manner::Forgetful && number >= 4 { "?" } else { word };
        write!(stream, "data: {}\n\n", json!({"choices": [{"delta": {"content": word}}]}))?;
        stream.flush()?;
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    write!(stream, "data: {}\n\n", json!({"choices": [], "usage": usage}))?;
    if manner == Manner::Breaks { Ok(()) } else { write!(stream, "data: [DONE]\n\n") }
}

fn load(manner: Manner, more: &[&str]) -> (bool, Value, String) {
    let url = server(manner);
    let mut arguments =
        vec!["load", "--url", &url, "--json", "--prompt-tokens", "44", "--max-tokens", "6", "--requests", "40"];
    arguments.extend(more);
    let output = run(&arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    (output.status.success(), serde_json::from_str(&text).unwrap_or(Value::Null), errors)
}

#[test]
fn figures_of_a_sound_server() {
    let pid = std::process::id().to_string();
    for pace in [["--concurrency", "8"], ["--rate", "400"]] {
        let (success, report, errors) = load(Manner::Sound, &[&pace[..], &["--pid", &pid]].concat());
        assert!(success, "{errors}");
        assert_eq!((&report["requests"], &report["answered"], &report["refused"]), (&json!(40), &json!(40), &json!(0)));
        // The wanted length is reached by the server's own count.
        assert_eq!((&report["prompt_tokens"], &report["answer_tokens"]), (&json!(44.0), &json!(6.0)));
        let at = |name: &str, share: &str| report[name][share].as_f64().unwrap();
        assert!(at("first_token_ms", "p50") > 0.0 && at("whole_ms", "p50") >= 5.0 && at("between_ms", "p50") >= 0.9);
        assert!(at("whole_ms", "p50") <= at("whole_ms", "p95") && at("whole_ms", "p99") <= at("whole_ms", "max"));
        assert!(report["memory"]["after"].as_u64().unwrap() > 1 << 20);
    }
}

#[test]
fn the_table_has_the_figures() {
    let url = server(Manner::Sound);
    let output = run(&["load", "--url", &url, "--prompt-tokens", "20", "--max-tokens", "3", "--requests", "5"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["5 answered", "20.0 prompt tokens and 3.0 answer tokens", "output tokens/s", "first token", "p95"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn a_busy_server_and_a_broken_one() {
    let (success, report, _) = load(Manner::Busy, &[]);
    assert!(success && report["refused"].as_u64().unwrap() > 5);
    assert_eq!(report["answered"].as_u64().unwrap() + report["refused"].as_u64().unwrap(), 40);
    let (success, report, _) = load(Manner::Breaks, &[]);
    assert!(!success);
    assert_eq!(report["failed"]["the stream ended without [DONE]"], 40);
}

#[test]
fn faults_and_what_they_show() {
    let mixed = ["--faults", "--silent", "5", "--distinct", "3"];
    let (success, report, errors) = load(Manner::Sound, &mixed);
    assert!(success, "{errors} {report}");
    let bad: u64 = report["bad"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    assert!(bad > 5 && bad + report["good"]["requests"].as_u64().unwrap() == 40);
    assert_eq!(
        (&report["different"], &report["silent"], &report["same_afterwards"]),
        (&json!(0), &json!(5), &json!(true))
    );

    let (success, report, _) = load(Manner::Forgetful, &mixed);
    assert!(!success && report["different"].as_u64().unwrap() > 5 && report["same_afterwards"] == false);

    let (success, report, _) = load(Manner::Clumsy, &mixed);
    let violations = report["violations"].as_object().unwrap();
    assert!(!success && violations.keys().any(|what| what.contains("status 500")), "{report}");
}

#[test]
fn wrong_use() {
    assert_fails("another host", &run(&["load", "--url", "http://192.0.2.1:80"]), &["192.0.2.1", "--allow-remote"]);
    assert_fails("TLS", &run(&["load", "--url", "https://127.0.0.1"]), &["https://127.0.0.1", "http://"]);
    let url = server(Manner::Sound);
    assert_fails("extra", &run(&["load", "--url", &url, "--extra", "[1]"]), &["--extra", "[1]"]);
    assert_fails("prefix", &run(&["load", "--url", &url, "--shared-prefix", "500"]), &["--shared-prefix 500", "256"]);
    let none = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_fails("nobody there", &run(&["load", "--url", &format!("http://{none}")]), &["no connection", "/v1/models"]);
}
