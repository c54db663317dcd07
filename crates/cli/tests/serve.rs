//! `moebius serve` as a process: its check, its configuration, its end.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

fn serve(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moebius"));
    command.arg("serve").args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Standard output and error, and whether it went well.
fn run(arguments: &[&str]) -> (bool, String, String) {
    let output = serve(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_check_says_whether_all_is_in_order() {
    let (good, out, _) = run(&["--check", "--port", "0", "--cache-memory", "64MiB", "--log", "error"]);
    assert!(good && out.starts_with("in order: moebius (") && out.contains("127.0.0.1:"), "{out}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("serve.toml");
    let path = file.to_str().unwrap();
    for (text, message) in [
        ("prt = 8000\n", "serve.toml, line 1: unknown field `prt`"),
        ("port = 0\ncache_memory = \"much\"\n", "wanted a size"),
        ("port = 0\napi_key_file = \"/nowhere/keys\"\n", "/nowhere/keys"),
        ("model = \"/nowhere/model\"\n", "/nowhere/model"),
        ("log = \"a=b=c\"\n", "--log"),
    ] {
        std::fs::write(&file, text).unwrap();
        let (good, _, error) = run(&["--check", "--config", path]);
        assert!(!good && error.contains(message) && error.trim_end().lines().count() == 1, "{text}: {error}");
    }
    std::fs::write(&file, "port = 0\nname = \"by file\"\n").unwrap();
    let (good, out, error) = run(&["--check", "--config", path]);
    assert!(good && out.contains("by file"), "{out}{error}");
    let (_, out, _) = run(&["--check", "--config", path, "--name", "by flag"]);
    assert!(out.contains("by flag"), "{out}");
}

/// A server, and the address that it says it listens on.
fn start() -> (Child, String) {
    let mut child = serve(&["--port", "0", "--cache-memory", "64MiB", "--log-format", "json"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let address = loop {
        let line = lines.next().unwrap().unwrap();
        if let Some((_, address)) = line.split_once(" at http://") {
            break address.trim().to_string();
        }
    };
    // What it says later must not fill the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    (child, address)
}

#[cfg(unix)]
#[test]
fn a_signal_lets_it_finish_and_end() {
    let (mut child, address) = start();
    let body =
        r#"{"model": "moebius", "prompt": "Once upon a", "max_tokens": 100, "ignore_eos": true, "stream": true}"#;
    let mut stream = TcpStream::connect(&address).unwrap();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut first = [0; 200];
    let read = stream.read(&mut first).unwrap();
    assert!(String::from_utf8_lossy(&first[..read]).starts_with("HTTP/1.1 200"));
    let signalled = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(signalled.success());
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert!(child.wait().unwrap().success());
}
