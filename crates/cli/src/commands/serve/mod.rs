//! `moebius serve`: the HTTP server.

pub mod arguments;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use moebius_engine::{ChatTemplate, SchedulerOptions};
use moebius_model::Numerics;
use moebius_serve::{ServeOptions, ServedModel, Server};
use tracing_subscriber::EnvFilter;

use crate::arguments::RunPrecision;
use crate::models::Source;
use crate::{memory, output};
use arguments::{LogFormat, ServeArguments, Settings};

/// Memory for keys and values, if the system does not say how much is free.
const USUAL_CACHE: u64 = 1 << 30;
/// The least that is taken by itself.
const LEAST_CACHE: u64 = 256 << 20;

/// Runs the command.
///
/// # Errors
/// A configuration, model or address that cannot be used.
pub fn execute(arguments: &ServeArguments) -> anyhow::Result<ExitCode> {
    let mut settings = arguments.settings.clone();
    settings.model.clone_from(&arguments.model);
    if let Some(path) = &arguments.config {
        settings = settings.or(read(path)?);
    }
    start_log(&settings)?;
    let source = Source::new(settings.model.as_deref());
    let name = settings.name.clone().unwrap_or_else(|| name(&source));
    let options = options(&settings, name, arguments.precision.numerics())?;
    let served = served(&source, &settings, &arguments.precision)?;
    let template = served.template.is_some();
    let card = format!("{} ({}, {})", options.model_name, served.model.config.family, served.weights);
    let server = Server::new(served, options)?;
    let address = server.address();
    if arguments.check {
        let template = if template { "a chat template" } else { "no chat template" };
        output::print(&format!("in order: {card}, {template}, {address} is free\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    server.end_on_signals();
    tracing::info!(model = card, %address, "serving");
    output::note(&format!("serving {card} at http://{address}"));
    server.run();
    tracing::info!("ended");
    Ok(ExitCode::SUCCESS)
}

/// The file of `--config`.
fn read(path: &Path) -> anyhow::Result<Settings> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let read: Result<Settings, toml::de::Error> = toml::from_str(&text);
    read.map_err(|error| {
        let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1));
        anyhow::anyhow!("{}, line {line}: {}", path.display(), error.message().replace('\n', " "))
    })
}

fn start_log(settings: &Settings) -> anyhow::Result<()> {
    let filter = settings.log.as_deref().unwrap_or("info");
    let filter = EnvFilter::try_new(filter).with_context(|| format!("--log {filter}"))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match settings.log_format.unwrap_or_default() {
        LogFormat::Text => log.with_ansi(output::colours()).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("log: {error}"))
}

fn name(source: &Source) -> String {
    let (Source::Folder(path) | Source::Gguf(path)) = source else { return "moebius".into() };
    // `.` and `..` have no name of their own.
    let path = path.canonicalize().unwrap_or_else(|_| path.clone());
    let name = if path.is_file() { path.file_stem() } else { path.file_name() };
    name.map_or("model".into(), |name| name.to_string_lossy().into_owned())
}

fn options(settings: &Settings, model_name: String, numerics: Numerics) -> anyhow::Result<ServeOptions> {
    let usual = ServeOptions::default();
    let scheduler = SchedulerOptions::default();
    let seconds = |given: Option<u64>, usual: Duration| given.map_or(usual, Duration::from_secs);
    let size = |flag: &str, given: &Option<String>, usual: u64| match given {
        None => Ok(usual),
        Some(text) => bytes(text).with_context(|| format!("--{flag} {text}: wanted a size such as 512MiB or 4GiB")),
    };
    let free = memory::available().map_or(USUAL_CACHE, |free| (free / 4).max(LEAST_CACHE));
    let host = settings.host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    Ok(ServeOptions {
        address: SocketAddr::new(host, settings.port.unwrap_or(usual.address.port())),
        model_name,
        api_keys: keys(settings)?,
        allowed_origins: settings.cors.clone(),
        most_body_bytes: size("max-body", &settings.max_body, usual.most_body_bytes as u64)? as usize,
        most_connections: settings.max_connections.unwrap_or(usual.most_connections),
        grace: seconds(settings.grace, usual.grace),
        scheduler: SchedulerOptions {
            numerics,
            step_tokens: settings.step_tokens.unwrap_or(scheduler.step_tokens),
            most_running: settings.max_running.unwrap_or(scheduler.most_running),
            most_waiting: settings.max_waiting.unwrap_or(scheduler.most_waiting),
            cache_bytes: size("cache-memory", &settings.cache_memory, free)? as usize,
            share_prefixes: !settings.no_prefix_sharing.unwrap_or(false),
            longest_wait: seconds(settings.max_wait, scheduler.longest_wait),
            longest_run: seconds(settings.max_time, scheduler.longest_run),
        },
        ..usual
    })
}

/// The keys of flags, environment and file together.
fn keys(settings: &Settings) -> anyhow::Result<Vec<String>> {
    let mut keys = settings.api_key.clone();
    if let Some(path) = &settings.api_key_file {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let before = keys.len();
        keys.extend(lines.map(str::to_string));
        if keys.len() == before {
            bail!("{}: no key in it: a server that was to ask for one would let everybody in", path.display());
        }
    }
    if keys.iter().any(|key| key.trim().is_empty()) {
        bail!("an API key is empty");
    }
    Ok(keys)
}

/// A number of bytes: plain, or with kB, MB, GB, KiB, MiB or GiB.
fn bytes(text: &str) -> Option<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
    let number: f64 = text[..digits].parse().ok()?;
    let unit = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    Some((number * unit) as u64)
}

fn served(source: &Source, settings: &Settings, precision: &RunPrecision) -> anyhow::Result<ServedModel> {
    let own = source.chat_template()?;
    let template = match &settings.template {
        None => own,
        Some(path) => {
            let name = path.display().to_string();
            let text =
                output::utf8(std::fs::read(path).with_context(|| name.clone())?).with_context(|| name.clone())?;
            let template = ChatTemplate::new(&text, &name)?;
            Some(own.iter().fold(template, |template, own| template.with_specials_of(own)))
        }
    };
    let (defaults, format) = (source.generation_defaults()?, precision.dtype.weights());
    let (tokenizer, model) = source.tokenizer_and_model(precision.weights, format)?;
    let weights = precision.weights.unwrap_or(format).to_string();
    Ok(ServedModel { model, tokenizer, template, defaults, weights })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_words() {
        assert_eq!(bytes("17"), Some(17));
        assert_eq!((bytes("2KiB"), bytes("2 kB"), bytes("0.5GiB")), (Some(2048), Some(2000), Some(1 << 29)));
        assert!([bytes(""), bytes("GiB"), bytes("2 parsecs"), bytes("-1")].iter().all(Option::is_none));
    }

    #[test]
    fn flags_go_before_the_file() {
        let file: Settings =
            toml::from_str("port = 1\nname = \"file\"\napi_key = [\"a\"]\nlog_format = \"json\"").unwrap();
        let flags = Settings { port: Some(2), ..Settings::default() };
        let both = flags.or(file);
        assert_eq!((both.port, both.name.as_deref(), both.log_format), (Some(2), Some("file"), Some(LogFormat::Json)));
        assert_eq!(keys(&both).unwrap(), ["a"]);
        assert!(toml::from_str::<Settings>("prt = 1").is_err());
    }
}
