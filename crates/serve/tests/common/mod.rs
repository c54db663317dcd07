//! A server with a small model, and a client that writes every byte itself.

#![allow(dead_code)] // each test file uses its part

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use moebius_engine::{ChatTemplate, GenerationDefaults, Tokenizer};
use moebius_model::{Ffn, Model, UniformDecoder};
use moebius_serve::server::Ender;
use moebius_serve::{ServeOptions, ServedModel, Server};
use serde_json::{Value, json};

pub const CONTEXT: usize = 1500;
const TEMPLATE: &str = "{% if tools %}<tools>{{ tools | tojson }}{# <tool_call> #}{% endif %}\
    {% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>";

/// GPT-2's alphabet of bytes and an end token 256.
fn tokenizer() -> Tokenizer {
    let printable = |b: &u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut spare = 256..;
    let letters = (0..256u32).map(|b| if printable(&b) { b } else { spare.next().unwrap() });
    let vocab: serde_json::Map<String, Value> =
        letters.enumerate().map(|(id, letter)| (char::from_u32(letter).unwrap().to_string(), id.into())).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let end = json!({"id": 256, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    let file = json!({"version": "1.0", "added_tokens": [end], "pre_tokenizer": bytes, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    Tokenizer::from_bytes(file.to_string().as_bytes(), "test").unwrap()
}

fn model() -> Model {
    let config = UniformDecoder {
        family: "mixtral",
        vocab_size: 257,
        hidden: 32,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 8,
        max_positions: CONTEXT,
        ffn: Ffn::moe_of(4, 2, 24, true),
        ..UniformDecoder::default()
    }
    .config();
    let mut model = Model::new(&config, 3).unwrap();
    for param in model.params_mut().into_iter().filter(|param| !param.name().ends_with("norm")) {
        param.update(|weights| weights.iter_mut().for_each(|weight| *weight *= 12.0));
    }
    model
}

pub fn options() -> ServeOptions {
    let mut options = ServeOptions { model_name: "small".into(), ..ServeOptions::default() };
    options.address.set_port(0);
    options.scheduler.cache_bytes = 64 << 20;
    options
}

/// A server that runs until it is dropped.
pub struct Running {
    pub address: SocketAddr,
    pub ender: Ender,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub fn start(options: ServeOptions) -> Self {
        Self::with_template(options, TEMPLATE)
    }

    /// A server whose model has another template.
    pub fn with_template(options: ServeOptions, template: &str) -> Self {
        let tokenizer = tokenizer();
        let template = ChatTemplate::new(template, "template").unwrap().with_special("eos_token", "<|end|>");
        let defaults = GenerationDefaults::default();
        let served =
            ServedModel { model: model(), tokenizer, template: Some(template), defaults, weights: "f32".into() };
        let server = Server::new(served, options).unwrap();
        let (address, ender) = (server.address(), server.ender());
        let thread = Some(std::thread::spawn(|| server.run()));
        Self { address, ender, thread }
    }

    /// Asks it to end and waits until it has.
    pub fn end(&mut self) {
        self.ender.end();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send(&format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"), b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_bytes(path, body.to_string().as_bytes())
    }

    pub fn post_bytes(&self, path: &str, body: &[u8]) -> Answer {
        self.send(&head(path, body.len(), ""), body)
    }

    pub fn send(&self, head: &str, body: &[u8]) -> Answer {
        let mut stream = self.connect();
        // A server that refuses a body may close before it has all of it.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        Answer::read(stream)
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// A conversation of one message, with further fields.
    pub fn chat(&self, text: &str, fields: Value) -> Answer {
        self.post("/v1/chat/completions", &chat(text, fields))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

pub fn head(path: &str, length: usize, more: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n{more}\r\n"
    )
}

pub fn chat(text: &str, fields: Value) -> Value {
    let mut body = json!({"model": "small", "messages": [{"role": "user", "content": text}], "max_tokens": 24});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    fn read(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
                break;
            }
            head.push_str(&line.to_ascii_lowercase());
        }
        let mut raw = Vec::new();
        let _ = reader.read_to_end(&mut raw);
        let body = if head.contains("transfer-encoding: chunked") { unchunk(&raw) } else { raw };
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
        Self { status, head, body: String::from_utf8(body).unwrap() }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}\n{}", self.head, self.body))
    }

    /// A good answer.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// The error object of a bad one.
    pub fn error(&self) -> Value {
        let json = self.json();
        assert!(json["error"]["message"].is_string() && json["error"]["type"].is_string(), "{json}");
        json["error"].clone()
    }

    pub fn content(&self) -> String {
        self.ok()["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{}", self.body)).to_string()
    }

    /// The data of server-sent events.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        let data = self.body.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    /// The text of a streamed conversation.
    pub fn streamed(&self, choice: usize) -> String {
        let events = self.events();
        let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
        choices.filter(|c| c["index"] == choice).filter_map(|c| c["delta"]["content"].as_str()).collect()
    }
}

fn unchunk(mut raw: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(at) = raw.windows(2).position(|pair| pair == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&raw[..at]).unwrap().trim(), 16).unwrap();
        if size == 0 || raw.len() < at + 2 + size {
            break;
        }
        out.extend_from_slice(&raw[at + 2..at + 2 + size]);
        raw = &raw[(at + 4 + size).min(raw.len())..];
    }
    out
}
