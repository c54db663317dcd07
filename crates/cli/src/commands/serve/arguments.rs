//! The flags of `moebius serve`. Each may also stand in the environment, and most in a file.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::arguments::RunPrecision;

const EXAMPLES: &str = "\
Examples:
  moebius serve --model DIR
  moebius serve --model DIR --port 8000 --api-key-file keys.txt --weights q4_k
  moebius serve --config serve.toml --check

The server speaks OpenAI's interface under /v1, and shows the model's experts at /. It listens on this machine only unless \
--host says otherwise. A flag goes before its variable in the environment (MOEBIUS_PORT for --port, and so on), that before \
the file of --config, a TOML file whose keys are the flags' names with `_`:

  model = \"DIR\"
  port = 8000
  api_key_file = \"keys.txt\"
  cache_memory = \"4GiB\"

SIGTERM or ctrl-C: no more requests are taken, those that run are finished; a second one ends them. \
docs/serving.md tells more.";

/// `moebius serve`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ServeArguments {
    /// A folder in Hugging Face's layout, a packed one, or a GGUF file [default: the model inside this binary]
    #[arg(long, value_name = "DIR", env = "MOEBIUS_MODEL")]
    pub model: Option<PathBuf>,

    /// A TOML file with what is not given otherwise
    #[arg(long, value_name = "FILE", env = "MOEBIUS_CONFIG")]
    pub config: Option<PathBuf>,

    /// Look whether everything is in order (configuration, model, address), say so, and end
    #[arg(long)]
    pub check: bool,

    /// What may stand in the file too
    #[command(flatten)]
    pub settings: Settings,

    /// What the model is run in
    #[command(flatten)]
    pub precision: RunPrecision,
}

/// What may stand in flags, environment and file.
#[derive(Clone, Debug, Default, Args, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// In the file only: the model, as by --model
    #[arg(skip)]
    pub model: Option<PathBuf>,

    /// The address to listen on [default: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS", env = "MOEBIUS_HOST")]
    pub host: Option<IpAddr>,

    /// The port; 0 takes a free one [default: 8080]
    #[arg(long, value_name = "N", env = "MOEBIUS_PORT")]
    pub port: Option<u16>,

    /// The model's name towards clients [default: that of its folder or file]
    #[arg(long, value_name = "NAME", env = "MOEBIUS_NAME")]
    pub name: Option<String>,

    /// A Jinja chat template to use instead of the model's
    #[arg(long, value_name = "FILE", env = "MOEBIUS_TEMPLATE")]
    pub template: Option<PathBuf>,

    /// A key that requests must bring; may be given several times. Other users of this machine can see flags
    #[arg(long, value_name = "KEY", env = "MOEBIUS_API_KEY", hide_env_values = true)]
    #[serde(default)]
    pub api_key: Vec<String>,

    /// A file with keys, one a line
    #[arg(long, value_name = "FILE", env = "MOEBIUS_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,

    /// The origin of a web page that may call the server, or `*` for any; may be given several times
    #[arg(long, value_name = "ORIGIN", env = "MOEBIUS_CORS")]
    #[serde(default)]
    pub cors: Vec<String>,

    /// Memory for keys and values, as 512MiB or 4GiB [default: a quarter of what is free]
    #[arg(long, value_name = "SIZE", env = "MOEBIUS_CACHE_MEMORY")]
    pub cache_memory: Option<String>,

    /// Read every prompt anew, also where its beginning is known
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", env = "MOEBIUS_NO_PREFIX_SHARING")]
    pub no_prefix_sharing: Option<bool>,

    /// Tokens that go through the model in a step [default: 512]
    #[arg(long, value_name = "N", env = "MOEBIUS_STEP_TOKENS")]
    pub step_tokens: Option<usize>,

    /// Sequences that run at once [default: 64]
    #[arg(long, value_name = "N", env = "MOEBIUS_MAX_RUNNING")]
    pub max_running: Option<usize>,

    /// Requests that may wait; the next gets 429 [default: 256]
    #[arg(long, value_name = "N", env = "MOEBIUS_MAX_WAITING")]
    pub max_waiting: Option<usize>,

    /// Seconds that a request may wait before it gets 503 [default: 120]
    #[arg(long, value_name = "SECONDS", env = "MOEBIUS_MAX_WAIT")]
    pub max_wait: Option<u64>,

    /// Seconds after which an answer ends with what it has [default: 1800]
    #[arg(long, value_name = "SECONDS", env = "MOEBIUS_MAX_TIME")]
    pub max_time: Option<u64>,

    /// The largest request body, as 8MiB [default: 8MiB]
    #[arg(long, value_name = "SIZE", env = "MOEBIUS_MAX_BODY")]
    pub max_body: Option<String>,

    /// Connections at once [default: 1024]
    #[arg(long, value_name = "N", env = "MOEBIUS_MAX_CONNECTIONS")]
    pub max_connections: Option<usize>,

    /// Seconds that what runs may go on when the server ends [default: 60]
    #[arg(long, value_name = "SECONDS", env = "MOEBIUS_GRACE")]
    pub grace: Option<u64>,

    /// What the log tells: error, warn, info, debug, or by target as tracing's filters have it [default: info]
    #[arg(long, value_name = "FILTER", env = "MOEBIUS_LOG")]
    pub log: Option<String>,

    /// How the log is written, to standard error [default: text]
    #[arg(long, value_enum, value_name = "FORMAT", env = "MOEBIUS_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

impl Settings {
    /// These, and where they say nothing, those.
    pub fn or(self, other: Self) -> Self {
        let several = |own: Vec<String>, other: Vec<String>| if own.is_empty() { other } else { own };
        Self {
            model: self.model.or(other.model),
            host: self.host.or(other.host),
            port: self.port.or(other.port),
            name: self.name.or(other.name),
            template: self.template.or(other.template),
            api_key: several(self.api_key, other.api_key),
            api_key_file: self.api_key_file.or(other.api_key_file),
            cors: several(self.cors, other.cors),
            cache_memory: self.cache_memory.or(other.cache_memory),
            no_prefix_sharing: self.no_prefix_sharing.or(other.no_prefix_sharing),
            step_tokens: self.step_tokens.or(other.step_tokens),
            max_running: self.max_running.or(other.max_running),
            max_waiting: self.max_waiting.or(other.max_waiting),
            max_wait: self.max_wait.or(other.max_wait),
            max_time: self.max_time.or(other.max_time),
            max_body: self.max_body.or(other.max_body),
            max_connections: self.max_connections.or(other.max_connections),
            grace: self.grace.or(other.grace),
            log: self.log.or(other.log),
            log_format: self.log_format.or(other.log_format),
        }
    }
}
