//! Bad clients: what each sends, and what a sound server answers.

use std::time::Duration;

use anyhow::{Context, anyhow};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::client::Target;
use super::prompts::streamed;

/// A kind of bad client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Asks, and leaves before the answer begins.
    LeavesAtOnce,
    /// Leaves in the middle of a streamed answer.
    LeavesMidway,
    /// Reads a streamed answer a few bytes at a time.
    ReadsSlowly,
    /// Half a header, then silence, then gone.
    StopsInTheHeader,
    /// A body that is announced but never comes whole.
    StopsInTheBody,
    /// Bytes that are no HTTP.
    NoHttp,
    /// JSON that ends in the middle.
    BrokenJson,
    /// JSON nested ten thousand deep.
    DeepJson,
    /// A body of 64 MiB with its length announced.
    GiantBody,
    /// The same in chunks, without a length.
    GiantChunks,
    /// Bytes that are no UTF-8 inside a text.
    InvalidUtf8,
    /// Fields that nobody knows.
    UnknownFields,
    /// Fields of the wrong type.
    WrongTypes,
    /// Numbers out of range.
    WrongNumbers,
    /// A JSON schema of a hundred levels.
    DeepSchema,
    /// A pattern that would make an automaton of a million states.
    HugePattern,
    /// A path that is not there.
    NoSuchPath,
    /// A method that the path does not take.
    WrongMethod,
}

/// What a server may do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// Nobody listens for an answer.
    Anything,
    /// Status 4xx and the OpenAI error object.
    Refusal,
    /// Success or a refusal: a matter of taste, but never a 5xx.
    Either,
    /// Status 4xx or the end of the connection.
    Close,
}

/// All kinds; each request draws one.
pub const ALL: [Fault; 18] = [
    Fault::LeavesAtOnce,
    Fault::BrokenJson,
    Fault::LeavesMidway,
    Fault::InvalidUtf8,
    Fault::ReadsSlowly,
    Fault::UnknownFields,
    Fault::WrongTypes,
    Fault::StopsInTheHeader,
    Fault::DeepJson,
    Fault::NoSuchPath,
    Fault::NoHttp,
    Fault::DeepSchema,
    Fault::WrongNumbers,
    Fault::GiantBody,
    Fault::HugePattern,
    Fault::StopsInTheBody,
    Fault::GiantChunks,
    Fault::WrongMethod,
];

/// A body larger than any server should take.
const GIANT: usize = 64 << 20;
/// An answer to a bad request is short; more of it is not read.
const LONGEST_REFUSAL: usize = 1 << 20;
const SLOW_PAUSE: Duration = Duration::from_millis(20);
const SILENCE: Duration = Duration::from_millis(500);

impl Fault {
    fn expect(self) -> Expect {
        match self {
            Self::LeavesAtOnce | Self::LeavesMidway | Self::StopsInTheHeader | Self::StopsInTheBody => Expect::Anything,
            Self::NoHttp => Expect::Close,
            Self::ReadsSlowly | Self::UnknownFields | Self::DeepSchema | Self::HugePattern => Expect::Either,
            _ => Expect::Refusal,
        }
    }

    /// Plays this client once. `body` is a good request.
    ///
    /// # Errors
    /// What the server did that a sound one does not, in words.
    pub async fn play(self, target: &Target, path: &str, body: &Value) -> anyhow::Result<()> {
        let talk = tokio::time::timeout(target.timeout, self.talk(target, path, body));
        let answer = talk.await.unwrap_or_else(|_| Err(anyhow!("no answer in time")));
        let judged = match self.expect() {
            Expect::Anything => return answer.map(|_| ()),
            Expect::Close if answer.is_err() => return Ok(()),
            expected => answer.and_then(|answer| judge(&answer, expected)),
        };
        judged.with_context(|| format!("{self:?}"))
    }

    /// Sends what this client sends; gives the bytes of the answer.
    async fn talk(self, target: &Target, path: &str, body: &Value) -> anyhow::Result<Vec<u8>> {
        match self {
            Self::LeavesAtOnce | Self::LeavesMidway | Self::StopsInTheHeader | Self::StopsInTheBody => {
                self.leave(target, path, body).await
            }
            Self::ReadsSlowly => read_slowly(target, path, body).await,
            Self::GiantBody | Self::GiantChunks => giant(target, path, self == Self::GiantChunks).await,
            _ => exchange(target, &self.request(target, path, body)).await,
        }
    }

    /// The whole request of a client that waits for its answer.
    fn request(self, target: &Target, path: &str, body: &Value) -> Vec<u8> {
        let post = |bytes: &[u8]| request(target, "POST", path, bytes);
        let with = |fields: Value| {
            let mut body = body.clone();
            for (name, value) in fields.as_object().into_iter().flatten() {
                body[name] = value.clone();
            }
            post(body.to_string().as_bytes())
        };
        let schema = |schema: Value| {
            let format = json!({"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}});
            with(json!({"response_format": format, "max_tokens": 4}))
        };
        match self {
            Self::NoHttp => b"\x16\x03\x01\x02\x00 this is no HTTP\r\n\r\n".to_vec(),
            Self::BrokenJson => {
                let text = body.to_string();
                post(&text.as_bytes()[..text.len() / 2])
            }
            Self::DeepJson => post(format!("{}{}", "[".repeat(10_000), "]".repeat(10_000)).as_bytes()),
            Self::InvalidUtf8 => {
                let marked = with_text(body, "\u{1}");
                let bytes = marked.to_string().replace("\\u0001", "\u{1}").into_bytes();
                post(&bytes.into_iter().map(|byte| if byte == 1 { 0xff } else { byte }).collect::<Vec<_>>())
            }
            Self::UnknownFields => with(json!({"frobnicate": {"deep": [1, null, "x"]}, "max_tokens": 2})),
            Self::WrongTypes => with(json!({"max_tokens": "many", "temperature": [], "messages": 7, "prompt": {}})),
            Self::WrongNumbers => with(json!({"max_tokens": -5, "temperature": -1e300, "top_p": 7})),
            Self::DeepSchema => schema(deep_schema(30)),
            Self::HugePattern => schema(json!({"type": "string", "pattern": "^((a|b)*c{1,1000}){1000}$"})),
            Self::NoSuchPath => request(target, "POST", "/v1/frobnicate", body.to_string().as_bytes()),
            _ => request(target, "DELETE", path, b""),
        }
    }

    /// Clients that never hear the end of an answer.
    async fn leave(self, target: &Target, path: &str, body: &Value) -> anyhow::Result<Vec<u8>> {
        let whole = request(target, "POST", path, streamed(body.clone()).to_string().as_bytes());
        let header = whole.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or(0) + 4;
        let sent = match self {
            Self::StopsInTheHeader => header / 2,
            Self::StopsInTheBody => header + (whole.len() - header) / 2,
            _ => whole.len(),
        };
        let mut stream = TcpStream::connect(target.address).await?;
        stream.write_all(&whole[..sent]).await?;
        let mut answer = vec![0; 512];
        let mut read = 0;
        if self == Self::LeavesMidway {
            read = stream.read(&mut answer).await?;
            tokio::time::sleep(SLOW_PAUSE).await;
        } else if sent < whole.len() {
            tokio::time::sleep(SILENCE).await;
        }
        answer.truncate(read);
        Ok(answer)
    }
}

/// The body with another text in the place of its prompt.
fn with_text(body: &Value, text: &str) -> Value {
    let mut body = body.clone();
    if body.get("messages").is_some() {
        body["messages"] = json!([{"role": "user", "content": text}]);
    } else {
        body["prompt"] = text.into();
    }
    body
}

/// A schema of objects in arrays in objects.
fn deep_schema(levels: usize) -> Value {
    (0..levels).fold(json!({"type": "integer"}), |inner, _| {
        let object =
            json!({"type": "object", "properties": {"a": inner}, "required": ["a"], "additionalProperties": false});
        json!({"anyOf": [object, {"type": "null"}]})
    })
}

/// An HTTP request after whose answer the server closes the connection.
fn request(target: &Target, method: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = head(target, method, path, &format!("content-length: {}", body.len())).into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

fn head(target: &Target, method: &str, path: &str, length: &str) -> String {
    let key = target.key.as_ref().map_or(String::new(), |key| format!("authorization: Bearer {key}\r\n"));
    let (base, host) = (&target.base, &target.authority);
    format!(
        "{method} {base}{path} HTTP/1.1\r\nhost: {host}\r\n{key}content-type: application/json\r\nconnection: close\r\n{length}\r\n\r\n"
    )
}

/// Sends bytes and reads to the end of the answer.
async fn exchange(target: &Target, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(target.address).await.context("no connection")?;
    stream.write_all(bytes).await?;
    let mut answer = Vec::new();
    stream.take(LONGEST_REFUSAL as u64).read_to_end(&mut answer).await?;
    Ok(answer)
}

/// Reads a streamed answer through a small window and with pauses.
async fn read_slowly(target: &Target, path: &str, body: &Value) -> anyhow::Result<Vec<u8>> {
    let socket = if target.address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_recv_buffer_size(1024)?;
    let mut stream = socket.connect(target.address).await?;
    stream.write_all(&request(target, "POST", path, streamed(body.clone()).to_string().as_bytes())).await?;
    let mut answer = Vec::new();
    let mut piece = [0; 512];
    loop {
        match stream.read(&mut piece).await? {
            0 => return Ok(answer),
            read => answer.extend_from_slice(&piece[..read]),
        }
        tokio::time::sleep(SLOW_PAUSE).await;
    }
}

/// Sends a giant body until the server answers, which it should do long before the end.
async fn giant(target: &Target, path: &str, chunked: bool) -> anyhow::Result<Vec<u8>> {
    let stream = TcpStream::connect(target.address).await.context("no connection")?;
    let (mut reader, mut writer) = stream.into_split();
    let length = if chunked { "transfer-encoding: chunked".into() } else { format!("content-length: {GIANT}") };
    let head = head(target, "POST", path, &length);
    let send = async move {
        writer.write_all(head.as_bytes()).await?;
        let block = vec![b' '; 1 << 16];
        for _ in 0..GIANT / block.len() {
            if chunked {
                writer.write_all(b"10000\r\n").await?;
            }
            writer.write_all(&block).await?;
            if chunked {
                writer.write_all(b"\r\n").await?;
            }
        }
        if chunked {
            writer.write_all(b"0\r\n\r\n").await?;
        }
        anyhow::Ok(writer)
    };
    let sending = tokio::spawn(send);
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    let read = loop {
        match reader.read(&mut piece).await {
            Ok(0) => break Ok(answer),
            Ok(read) => answer.extend_from_slice(&piece[..read]),
            // The server hung up on the rest of the body; what it said before that counts.
            Err(_) if !answer.is_empty() => break Ok(answer),
            Err(error) => break Err(error.into()),
        }
    };
    sending.abort();
    read
}

/// Whether an answer is what a sound server gives.
fn judge(answer: &[u8], expected: Expect) -> anyhow::Result<()> {
    let text = String::from_utf8_lossy(answer);
    let status = text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse::<u16>().ok());
    let start: String = text.chars().take(200).collect();
    match status {
        Some(200..300) if expected == Expect::Either => Ok(()),
        Some(status @ 400..500) => {
            // Chunks of a chunked answer are short lines around the one JSON object.
            let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
            let json = body.find('{').zip(body.rfind('}')).map(|(from, to)| &body[from..=to]);
            let object: Option<Value> = json.and_then(|json| serde_json::from_str(json).ok());
            let error = object.as_ref().map(|object| &object["error"]);
            let whole = error.is_some_and(|error| error["message"].is_string() && error["type"].is_string());
            if whole || expected == Expect::Close {
                Ok(())
            } else {
                Err(anyhow!("status {status} without the error object: {start:?}"))
            }
        }
        Some(status) => Err(anyhow!("status {status}: {start:?}")),
        None => Err(anyhow!("no HTTP status in the answer: {start:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        let error = "HTTP/1.1 400 Bad Request\r\na: b\r\n\r\n{\"error\": {\"message\": \"m\", \"type\": \"t\"}}";
        let bare = "HTTP/1.1 400 Bad Request\r\n\r\nno";
        let good = "HTTP/1.1 200 OK\r\n\r\n{}";
        let cases = [
            (error, Expect::Refusal, true),
            (error, Expect::Either, true),
            (bare, Expect::Refusal, false),
            (bare, Expect::Close, true),
            (good, Expect::Refusal, false),
            (good, Expect::Either, true),
            ("HTTP/1.1 500 Oops\r\n\r\n{\"error\": {\"message\": \"m\", \"type\": \"t\"}}", Expect::Either, false),
            ("", Expect::Refusal, false),
        ];
        for (answer, expected, sound) in cases {
            assert_eq!(judge(answer.as_bytes(), expected).is_ok(), sound, "{answer} {expected:?}");
        }
    }

    #[test]
    fn what_bad_clients_send() {
        let target = Target::new("http://127.0.0.1:1", false, Some("k".into()), Duration::from_secs(1)).unwrap();
        let body = json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3});
        let sent = |fault: Fault| fault.request(&target, "/v1/chat/completions", &body);
        let of = |bytes: &[u8]| {
            let at = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
            let length = format!("content-length: {}\r\n", bytes.len() - at);
            assert!(String::from_utf8_lossy(&bytes[..at]).contains(&length));
            bytes[at..].to_vec()
        };
        assert!(String::from_utf8_lossy(&sent(Fault::BrokenJson)).contains("authorization: Bearer k\r\n"));
        assert!(serde_json::from_slice::<Value>(&of(&sent(Fault::BrokenJson))).is_err());
        assert!(std::str::from_utf8(&of(&sent(Fault::InvalidUtf8))).is_err());
        assert_eq!(of(&sent(Fault::DeepJson)).len(), 20_000);
        let schema: Value = serde_json::from_slice(&of(&sent(Fault::DeepSchema))).unwrap();
        assert_eq!(schema["response_format"]["type"], "json_schema");
        assert_eq!(schema["messages"], body["messages"]);
        assert!(sent(Fault::WrongMethod).starts_with(b"DELETE "));
    }
}
