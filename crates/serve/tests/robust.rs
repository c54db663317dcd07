//! Load, limits, bad requests and the end: every good request gets the text that it gets alone.

mod common;

use std::io::{Read, Write};
use std::time::Duration;

use common::{Running, chat, head, options};
use serde_json::{Value, json};

#[test]
fn under_load_every_text_is_the_one_written_alone() {
    let common =
        "In the beginning there was a prompt that all of them share, and it is longer than a page or two. ".repeat(3);
    let requests: Vec<Value> = (0..32)
        .map(|i| {
            let text = if i % 3 == 0 { format!("{common}{i}") } else { "word ".repeat(i) };
            let mut fields = json!({"seed": i, "max_tokens": 10 + i, "temperature": 0.9, "top_p": 0.95});
            match i % 5 {
                1 => fields["logprobs"] = json!(true),
                2 => fields["presence_penalty"] = json!(0.5),
                3 => fields["response_format"] = json!({"type": "json_object"}),
                _ => {}
            }
            chat(&text, fields)
        })
        .collect();
    let choice =
        |server: &Running, request: &Value| server.post("/v1/chat/completions", request).ok()["choices"].clone();
    let mut alone = options();
    alone.scheduler.share_prefixes = false;
    let alone = Running::start(alone);
    let wanted: Vec<Value> = requests.iter().map(|request| choice(&alone, request)).collect();
    let mut busy = options();
    // Little memory, so that sequences are taken out and come back.
    busy.scheduler.cache_bytes = 1 << 20;
    busy.scheduler.step_tokens = 100;
    busy.scheduler.most_running = 12;
    let busy = Running::start(busy);
    std::thread::scope(|scope| {
        let bad = scope.spawn(|| {
            for i in 0..40 {
                let bodies: [&[u8]; 4] = [b"{", b"\xff\xfe", br#"{"model": "small", "messages": 7}"#, b"[[[["];
                let answer = busy.post_bytes("/v1/chat/completions", bodies[i % 4]);
                assert_eq!((answer.status, answer.error()["type"].as_str()), (400, Some("invalid_request_error")));
                // One who leaves in the middle.
                let mut request = requests[i % requests.len()].clone();
                request["stream"] = json!(true);
                request["max_tokens"] = json!(400);
                let body = request.to_string();
                let mut stream = busy.connect();
                stream.write_all(head("/v1/chat/completions", body.len(), "").as_bytes()).unwrap();
                stream.write_all(body.as_bytes()).unwrap();
                let _ = stream.read(&mut [0; 100]);
            }
        });
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let (busy, requests, wanted) = (&busy, &requests, &wanted);
                scope.spawn(move || {
                    for round in 0..2 {
                        for i in 0..requests.len() {
                            let i = (i * 7 + thread * 5 + round) % requests.len();
                            assert_eq!(choice(busy, &requests[i]), wanted[i], "request {i}");
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        bad.join().unwrap();
    });
    // All that is left is what is kept for later, and it is within the budget.
    for _ in 0..100 {
        if busy.get("/v1/moebius/stats").ok()["running"] == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let stats = busy.get("/v1/moebius/stats").ok();
    assert_eq!((&stats["running"], &stats["waiting"]), (&json!(0), &json!(0)));
    assert!(stats["cache"]["bytes_used"].as_u64() <= stats["cache"]["bytes_budget"].as_u64());
}

#[test]
fn bad_requests_get_the_error_object() {
    let mut options = options();
    options.most_body_bytes = 100_000;
    let server = Running::start(options);
    let messages = json!([{"role": "user", "content": "x"}]);
    let cases: Vec<(Value, u16, Option<&str>)> = vec![
        (json!({"model": "small"}), 400, None),
        (json!({"model": "other", "messages": messages}), 404, Some("model")),
        (json!({"model": "small", "messages": []}), 400, Some("messages")),
        (json!({"model": "small", "messages": [{"content": "x"}]}), 400, Some("messages[0]")),
        (json!({"model": "small", "messages": [{"role": "user", "content": 7}]}), 400, Some("messages[0].content")),
        (json!({"model": "small", "messages": messages, "colour": "red"}), 400, Some("colour")),
        (json!({"model": "small", "messages": messages, "temperature": 3}), 400, Some("temperature")),
        (json!({"model": "small", "messages": messages, "temperature": "hot"}), 400, Some("temperature")),
        (json!({"model": "small", "messages": messages, "top_p": -0.1}), 400, Some("top_p")),
        (json!({"model": "small", "messages": messages, "n": 0}), 400, Some("n")),
        (json!({"model": "small", "messages": messages, "n": 1000}), 400, Some("n")),
        (json!({"model": "small", "messages": messages, "max_tokens": 0}), 400, Some("max_tokens")),
        (json!({"model": "small", "messages": messages, "max_tokens": -1}), 400, Some("max_tokens")),
        (json!({"model": "small", "messages": messages, "logit_bias": {"9999": 1}}), 400, Some("logit_bias")),
        (json!({"model": "small", "messages": messages, "logit_bias": {"7": 101}}), 400, Some("logit_bias")),
        (json!({"model": "small", "messages": messages, "top_logprobs": 2}), 400, Some("top_logprobs")),
        (json!({"model": "small", "messages": messages, "functions": []}), 400, Some("functions")),
        (json!({"model": "small", "messages": messages, "tools": [{"type": "magic"}]}), 400, Some("tools[0].type")),
        (json!({"model": "small", "messages": messages, "tool_choice": "required"}), 400, Some("tool_choice")),
        (json!({"model": "small", "messages": messages, "stream_options": {}}), 400, Some("stream_options")),
        (
            json!({"model": "small", "messages": messages, "response_format": {"type": "regex", "regex": "("}}),
            400,
            Some("response_format"),
        ),
        (json!({"model": "small", "messages": [{"role": "user", "content": "x".repeat(2000)}]}), 400, Some("messages")),
    ];
    for (body, status, param) in cases {
        let answer = server.post("/v1/chat/completions", &body);
        let error = answer.error();
        assert_eq!((answer.status, error["param"].as_str()), (status, param), "{body}: {error}");
    }
    let mut nested = json!({"type": "string"});
    for _ in 0..70 {
        nested = json!({"type": "array", "items": nested});
    }
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": nested}});
    let deep = server.chat("x", json!({"response_format": format}));
    assert_eq!(deep.status, 400, "{}", deep.body);
    for (body, status) in
        [(vec![b'['; 50_000], 400), (vec![b' '; 200_000], 413), (b"\xc3\x28".to_vec(), 400), (Vec::new(), 400)]
    {
        let answer = server.post_bytes("/v1/chat/completions", &body);
        answer.error();
        assert_eq!(answer.status, status);
    }
    assert_eq!(server.get("/nowhere").status, 404);
    assert_eq!(server.get("/nowhere").error()["code"], "unknown_url");
    assert_eq!(server.get("/v1/chat/completions").status, 405);
    server.get("/v1/chat/completions").error();
    assert_eq!(server.get("/v1/models/other").status, 404);
    let text = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\n";
    assert_eq!(server.send(text, b"{}").status, 415);
    assert_eq!(server.post("/v1/messages", &json!({"model": "small"})).json()["type"], "error");
    server.chat("still here", json!({})).ok();
}

#[test]
fn keys_are_asked_for() {
    let mut options = options();
    options.api_keys = vec!["secret".into()];
    options.allowed_origins = vec!["https://example.org".into()];
    let server = Running::start(options);
    let refused = server.chat("x", json!({}));
    assert_eq!((refused.status, refused.error()["code"].as_str()), (401, Some("invalid_api_key")));
    assert_eq!(server.get("/v1/models").status, 401);
    assert_eq!(server.get("/health").status, 200);
    let body = chat("x", json!({})).to_string();
    let origin = "authorization: Bearer secret\r\norigin: https://example.org\r\n";
    let answer = server.send(&head("/v1/chat/completions", body.len(), origin), body.as_bytes());
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("access-control-allow-origin: https://example.org"));
    let other = "authorization: Bearer secret\r\norigin: https://example.com\r\n";
    let answer = server.send(&head("/v1/chat/completions", body.len(), other), body.as_bytes());
    assert!(!answer.head.contains("access-control-allow-origin"));
}

#[test]
fn too_many_requests_are_told_to_come_back() {
    let mut options = options();
    options.scheduler.most_running = 1;
    options.scheduler.most_waiting = 2;
    let server = Running::start(options);
    let statuses: Vec<(u16, String)> = std::thread::scope(|scope| {
        let ask = || {
            let answer = server.chat("x", json!({"max_tokens": 300, "ignore_eos": true}));
            (answer.status, answer.head)
        };
        let threads: Vec<_> = (0..12).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(statuses.iter().any(|(status, _)| *status == 200));
    let refused: Vec<_> = statuses.iter().filter(|(status, _)| *status == 429).collect();
    assert!(!refused.is_empty() && refused.iter().all(|(_, head)| head.contains("retry-after: ")), "{statuses:?}");
    assert!(statuses.iter().all(|(status, _)| [200, 429].contains(status)));
}

#[test]
fn what_runs_is_finished_before_the_end() {
    let mut server = Running::start(options());
    let wanted = server.chat("x", json!({"seed": 1, "max_tokens": 600, "ignore_eos": true})).content();
    let body = chat("x", json!({"seed": 1, "max_tokens": 600, "ignore_eos": true, "stream": true})).to_string();
    let mut stream = server.connect();
    stream.write_all(head("/v1/chat/completions", body.len(), "").as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let mut first = [0; 2000];
    let read = stream.read(&mut first).unwrap();
    server.end();
    let mut rest = String::from_utf8(first[..read].to_vec()).unwrap();
    stream.read_to_string(&mut rest).unwrap();
    let content: String = rest
        .lines()
        .filter_map(|line| line.strip_prefix("data: {"))
        .filter_map(|data| serde_json::from_str::<Value>(&format!("{{{data}")).ok())
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_string))
        .collect();
    assert!(rest.contains("[DONE]"));
    assert_eq!(content, wanted);
    assert!(std::net::TcpStream::connect(server.address).is_err(), "nobody listens any more");
}

#[test]
fn who_says_nothing_is_shown_out() {
    let mut options = options();
    options.head_timeout = Duration::from_millis(200);
    options.body_timeout = Duration::from_millis(200);
    let server = Running::start(options);
    let silent: Vec<_> = (0..50).map(|_| server.connect()).collect();
    server.chat("x", json!({})).ok();
    for mut stream in silent {
        // Closed, perhaps with a word.
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
    }
    let slow = server.send(&head("/v1/chat/completions", 100, ""), b"{");
    assert_eq!(slow.status, 408);
    slow.error();
}
