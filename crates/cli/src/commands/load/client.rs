//! One HTTP request and its answer, whole or as a stream of server-sent events.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// An answer larger than this is cut off.
const LARGEST_ANSWER: usize = 64 << 20;

/// Where requests go.
#[derive(Clone, Debug)]
pub struct Target {
    /// The address that the name stands for.
    pub address: SocketAddr,
    /// Host and port as the URL writes them.
    pub authority: String,
    /// What stands before `/v1` in the URL.
    pub base: String,
    /// The API key.
    pub key: Option<String>,
    /// How long a request may take.
    pub timeout: Duration,
}

/// A streamed answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// All text of it.
    pub text: String,
    /// When each piece of text came, counted from the request's begin.
    pub times: Vec<Duration>,
    /// Tokens of the prompt, by the server's count.
    pub prompt_tokens: Option<u64>,
    /// Tokens of the answer, by the server's count.
    pub completion_tokens: Option<u64>,
    /// When the stream ended.
    pub ended: Duration,
}

/// What became of a request that was sent in good order.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// An answer.
    Answered(Answer),
    /// The server has too much to do: try again after so long.
    Refused(Duration),
    /// Anything else, in words.
    Failed(String),
}

impl Target {
    /// Reads `http://host:port/path`.
    ///
    /// # Errors
    /// Another scheme, a name that stands for no address, a host that is not this machine unless `remote` allows it.
    pub fn new(url: &str, remote: bool, key: Option<String>, timeout: Duration) -> anyhow::Result<Self> {
        let Some(rest) = url.strip_prefix("http://") else {
            bail!("{url}: wanted http://HOST:PORT, without TLS");
        };
        let (authority, base) = rest.split_once('/').map_or((rest, ""), |(host, path)| (host, path));
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let with_port = if has_port { authority.to_string() } else { format!("{authority}:80") };
        let base = base.trim_end_matches('/');
        let base = base.strip_suffix("v1").unwrap_or(base).trim_end_matches('/');
        let base = if base.is_empty() { String::new() } else { format!("/{base}") };
        let addresses = std::net::ToSocketAddrs::to_socket_addrs(&with_port).with_context(|| url.to_string())?;
        let addresses = addresses.collect::<Vec<_>>();
        let address = *addresses.first().ok_or_else(|| anyhow!("{url}: no address of that name"))?;
        if !remote && !addresses.iter().all(|address| address.ip().is_loopback()) {
            bail!("{url}: {} is not this machine; --allow-remote sends load there all the same", address.ip());
        }
        Ok(Self { address, authority: authority.to_string(), base, key, timeout })
    }

    /// GET of a JSON document.
    ///
    /// # Errors
    /// No connection, another status than success, no JSON.
    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.whole("GET", path, None).await
    }

    /// POST with an answer in one piece.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.whole("POST", path, Some(body)).await
    }

    async fn whole(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let name = format!("http://{}{}{path}", self.authority, self.base);
        let talk = async {
            let response = self.send(method, path, body).await?;
            let status = response.status();
            let bytes = read_all(response.into_body()).await?;
            if !status.is_success() {
                bail!("{}", refusal(status, &bytes));
            }
            serde_json::from_slice(&bytes).context("the answer is no JSON")
        };
        let answer = tokio::time::timeout(self.timeout, talk).await;
        answer.unwrap_or_else(|_| Err(anyhow!("no answer in time"))).context(name)
    }

    /// POST with a streamed answer; times are counted from `begun`.
    pub async fn stream(&self, path: &str, body: &Value, begun: Instant) -> Outcome {
        match tokio::time::timeout(self.timeout, self.try_stream(path, body, begun)).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => Outcome::Failed(format!("{error:#}")),
            Err(_) => Outcome::Failed(format!("no end after {} s", self.timeout.as_secs_f64())),
        }
    }

    async fn try_stream(&self, path: &str, body: &Value, begun: Instant) -> anyhow::Result<Outcome> {
        let response = self.send("POST", path, Some(body)).await?;
        let status = response.status();
        if status == StatusCode::TOO_MANY_REQUESTS {
            let after = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            return Ok(Outcome::Refused(Duration::from_secs(after.unwrap_or(1).min(60))));
        }
        if !status.is_success() {
            return Ok(Outcome::Failed(refusal(status, &read_all(response.into_body()).await?)));
        }
        read_events(response.into_body(), begun).await.map(Outcome::Answered)
    }

    async fn send(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Response<Incoming>> {
        let stream = TcpStream::connect(self.address).await.context("no connection")?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends by itself when the answer is read or dropped; an error of it is also the request's.
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(header::HOST, &self.authority)
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let bytes = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        Ok(sender.send_request(request.body(Full::new(bytes))?).await?)
    }
}

async fn read_all(mut body: Incoming) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        bytes.extend_from_slice(frame?.data_ref().unwrap_or(&Bytes::new()));
        if bytes.len() > LARGEST_ANSWER {
            bail!("an answer of more than {LARGEST_ANSWER} bytes");
        }
    }
    Ok(bytes)
}

/// Status and the server's words for it.
fn refusal(status: StatusCode, body: &[u8]) -> String {
    let words = serde_json::from_slice::<Value>(body).ok();
    let message = words.as_ref().and_then(|body| body["error"]["message"].as_str()).unwrap_or_default();
    format!("status {} {message}", status.as_u16()).trim_end().to_string()
}

async fn read_events(mut body: Incoming, begun: Instant) -> anyhow::Result<Answer> {
    let mut answer = Answer::default();
    let mut events = Events::default();
    let mut ended = false;
    while let Some(frame) = body.frame().await {
        let frame = frame.context("the stream broke off")?;
        let now = begun.elapsed();
        for data in events.push(frame.data_ref().unwrap_or(&Bytes::new()))? {
            ended |= data == "[DONE]";
            if data != "[DONE]" {
                answer.take(&serde_json::from_str(&data).context("an event is no JSON")?, now)?;
            }
        }
    }
    if !ended {
        bail!("the stream ended without [DONE]");
    }
    answer.ended = begun.elapsed();
    Ok(answer)
}

impl Answer {
    /// Adds what one event says.
    fn take(&mut self, event: &Value, now: Duration) -> anyhow::Result<()> {
        if let Some(message) = event["error"]["message"].as_str() {
            bail!("the stream broke off: {message}");
        }
        let choice = &event["choices"][0];
        let delta = &choice["delta"];
        let pieces = [&delta["content"], &delta["reasoning_content"], &choice["text"]];
        let before = self.text.len();
        self.text.extend(pieces.iter().filter_map(|piece| piece.as_str()));
        if self.text.len() > before {
            self.times.push(now);
        }
        let usage = &event["usage"];
        self.prompt_tokens = usage["prompt_tokens"].as_u64().or(self.prompt_tokens);
        self.completion_tokens = usage["completion_tokens"].as_u64().or(self.completion_tokens);
        Ok(())
    }
}

/// Server-sent events put together from pieces (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).
#[derive(Debug, Default)]
struct Events {
    held: Vec<u8>,
    data: Option<String>,
}

impl Events {
    /// The data of all events that are complete with these bytes.
    fn push(&mut self, bytes: &[u8]) -> anyhow::Result<Vec<String>> {
        let mut found = Vec::new();
        self.held.extend_from_slice(bytes);
        let mut start = 0;
        while let Some(end) = self.held[start..].iter().position(|&byte| byte == b'\n') {
            let line = &self.held[start..start + end];
            start += end + 1;
            let line = std::str::from_utf8(line).context("the stream is no UTF-8")?.trim_end_matches('\r');
            if line.is_empty() {
                found.extend(self.data.take());
            } else if let Some(value) = line.strip_prefix("data:") {
                let value = value.strip_prefix(' ').unwrap_or(value);
                self.data = Some(self.data.take().map_or(value.into(), |data| format!("{data}\n{value}")));
            }
        }
        self.held.drain(..start);
        if self.held.len() > LARGEST_ANSWER {
            bail!("a line of more than {LARGEST_ANSWER} bytes in the stream");
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(url: &str) -> anyhow::Result<Target> {
        Target::new(url, false, None, Duration::from_secs(1))
    }

    #[test]
    fn addresses() {
        let plain = target("http://127.0.0.1:8080").unwrap();
        assert_eq!((plain.address.port(), &plain.base[..]), (8080, ""));
        assert_eq!(target("http://127.0.0.1:1/v1/").unwrap().base, "");
        assert_eq!(target("http://[::1]:7/api/v1").unwrap().base, "/api");
        assert_eq!(target("http://127.0.0.1").unwrap().address.port(), 80);
        for (url, part) in
            [("https://127.0.0.1", "http://"), ("127.0.0.1:80", "http://"), ("http://10.1.2.3:80", "--allow-remote")]
        {
            let error = target(url).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(url), "{error}");
        }
        assert!(Target::new("http://10.1.2.3:80", true, None, Duration::ZERO).is_ok());
    }

    #[test]
    fn events_in_any_pieces() {
        let text = "data: {\"a\":1}\r\n\r\n: note\n\nevent: x\ndata: one\ndata:two é\n\ndata: [DONE]\n\ndata: cut";
        let wanted = ["{\"a\":1}", "one\ntwo é", "[DONE]"];
        for size in [1, 2, 3, 7, 1000] {
            let mut events = Events::default();
            let found: Vec<String> =
                text.as_bytes().chunks(size).flat_map(|piece| events.push(piece).unwrap()).collect();
            assert_eq!(found, wanted, "pieces of {size}");
        }
        assert!(Events::default().push(b"data: \xff\n").is_err());
    }

    #[test]
    fn what_an_event_says() {
        let mut answer = Answer::default();
        let now = Duration::from_millis(5);
        for event in [
            serde_json::json!({"choices": [{"delta": {"role": "assistant"}}]}),
            serde_json::json!({"choices": [{"delta": {"content": "The "}}]}),
            serde_json::json!({"choices": [{"text": "sea"}], "usage": null}),
            serde_json::json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}),
        ] {
            answer.take(&event, now).unwrap();
        }
        assert_eq!((&answer.text[..], answer.times.len()), ("The sea", 2));
        assert_eq!((answer.prompt_tokens, answer.completion_tokens), (Some(3), Some(2)));
        let broken = answer.take(&serde_json::json!({"error": {"message": "no room"}}), now).unwrap_err();
        assert!(broken.to_string().contains("no room"));
    }
}
