//! How the server is set up.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use moebius_engine::SchedulerOptions;

/// Everything that can be chosen.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Where to listen. Port 0 takes a free one.
    pub address: SocketAddr,
    /// The model's name towards clients.
    pub model_name: String,
    /// Keys of which every request needs one; empty: no key is asked for.
    pub api_keys: Vec<String>,
    /// Web pages (their origins, or `*`) that may call the server from a browser; empty: none but its own.
    pub allowed_origins: Vec<String>,
    /// The largest body that is read.
    pub most_body_bytes: usize,
    /// How long a body may take to arrive.
    pub body_timeout: Duration,
    /// How long the head of a request may take, and a connection may be idle.
    pub head_timeout: Duration,
    /// How long a client may let its answer lie.
    pub write_timeout: Duration,
    /// Connections at once.
    pub most_connections: usize,
    /// How long what runs may go on after the server was asked to end.
    pub grace: Duration,
    /// The scheduler's part.
    pub scheduler: SchedulerOptions,
    /// Experts' loads stand one by one among the metrics if there are at most so many, over all layers.
    pub most_expert_series: usize,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            address: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080),
            model_name: "moebius".into(),
            api_keys: Vec::new(),
            allowed_origins: Vec::new(),
            most_body_bytes: 8 << 20,
            body_timeout: Duration::from_secs(30),
            head_timeout: Duration::from_secs(20),
            write_timeout: Duration::from_secs(60),
            most_connections: 1024,
            grace: Duration::from_secs(60),
            scheduler: SchedulerOptions::default(),
            most_expert_series: 512,
        }
    }
}
