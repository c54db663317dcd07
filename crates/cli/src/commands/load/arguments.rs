//! The flags of `moebius load`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Load a server with requests and measure what comes back.
#[derive(Debug, Args)]
pub struct LoadArguments {
    /// The server, which speaks OpenAI's API: this one's, llama.cpp's or another
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    pub url: String,

    /// Send to hosts other than this machine: load on a server of somebody else is an attack
    #[arg(long)]
    pub allow_remote: bool,

    /// What is asked for
    #[arg(long, value_enum, default_value_t = Endpoint::Chat)]
    pub endpoint: Endpoint,

    /// The model's name in requests [default: the first that the server lists]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,

    /// Prompts: a JSON object a line with `messages` or `prompt`; its other fields are sent along
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_tokens")]
    pub prompts: Option<PathBuf>,

    /// Length of made-up prompts, by the server's own count
    #[arg(long, value_name = "N", default_value = "256")]
    pub prompt_tokens: NonZeroUsize,

    /// How many of a made-up prompt's tokens all prompts have in common
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub shared_prefix: usize,

    /// Longest answer
    #[arg(long, value_name = "N", default_value = "128")]
    pub max_tokens: NonZeroUsize,

    /// JSON object whose fields every request gets, such as '{"temperature": 0}'
    #[arg(long, value_name = "JSON")]
    pub extra: Option<String>,

    /// How many requests
    #[arg(long, value_name = "N", default_value = "64")]
    pub requests: NonZeroUsize,

    /// Requests under way at once
    #[arg(long, value_name = "N", default_value = "16", conflicts_with = "rate")]
    pub concurrency: NonZeroUsize,

    /// Requests a second, begun whether or not earlier ones have ended
    #[arg(long, value_name = "R", value_parser = positive)]
    pub rate: Option<f64>,

    /// Seed of prompts, arrival times and faults
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Seconds after which a request counts as failed
    #[arg(long, value_name = "S", default_value = "300", value_parser = positive)]
    pub timeout: f64,

    /// Environment variable that holds the API key
    #[arg(long, value_name = "NAME", default_value = "MOEBIUS_API_KEY")]
    pub key_variable: String,

    /// Mix bad clients in, and compare every good answer with the one that the server gives when it has nothing else to do
    #[arg(long)]
    pub faults: bool,

    /// Share of requests that are bad
    #[arg(long, value_name = "SHARE", default_value_t = 0.5, value_parser = share, requires = "faults")]
    pub fault_share: f64,

    /// Connections that say nothing, held while the load runs
    #[arg(long, value_name = "N", default_value_t = 100, requires = "faults")]
    pub silent: usize,

    /// Different prompts among the good requests
    #[arg(long, value_name = "N", default_value = "16", requires = "faults")]
    pub distinct: NonZeroUsize,

    /// The server's process, whose memory is reported before and after
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,

    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// The endpoint that is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Endpoint {
    /// /v1/chat/completions
    Chat,
    /// /v1/completions
    Completions,
}

impl Endpoint {
    /// Its path on the server.
    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }
}

fn positive(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "wanted a number".to_string())?;
    if number > 0.0 && number.is_finite() { Ok(number) } else { Err("wanted a number above 0".into()) }
}

fn share(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "wanted a number".to_string())?;
    if (0.0..=1.0).contains(&number) { Ok(number) } else { Err("wanted a number between 0 and 1".into()) }
}
