//! `moebius load`: requests at a given rate or concurrency, and what came back, as percentiles.

pub mod arguments;
mod client;
mod faults;
mod mix;
mod pace;
mod prompts;
mod report;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::anyhow;

use arguments::LoadArguments;
use client::Target;
use pace::Pace;
use prompts::{Prompts, streamed};
use report::{Memory, Report};

use crate::{memory, output};

/// Runs the command; the exit status is 1 when a request failed or, with faults, the server did anything wrong.
///
/// # Errors
/// A URL, prompts or JSON that cannot be used, a server that cannot be reached.
pub fn execute(arguments: &LoadArguments) -> anyhow::Result<ExitCode> {
    // One thread: the load should take little from a server on the same machine.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(load(arguments))
}

async fn load(arguments: &LoadArguments) -> anyhow::Result<ExitCode> {
    let key = std::env::var(&arguments.key_variable).ok();
    let target = Target::new(&arguments.url, arguments.allow_remote, key, Duration::from_secs_f64(arguments.timeout))?;
    let model = match &arguments.model {
        Some(name) => name.clone(),
        None => first_model(&target).await?,
    };
    let prompts = Prompts::new(arguments, &target, &model).await?;
    let pace = arguments.rate.map_or(Pace::Together(arguments.concurrency.get()), Pace::PerSecond);
    let (sound, text) = if arguments.faults {
        let report = mix::run(arguments, target, &prompts, pace).await?;
        (report.sound(), shown(arguments.json, &report, report.lines())?)
    } else {
        let report = measure(arguments, target, prompts, pace).await;
        (report.failed.is_empty(), shown(arguments.json, &report, report.lines())?)
    };
    output::print(&text)?;
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn shown(json: bool, report: &impl serde::Serialize, lines: String) -> anyhow::Result<String> {
    if json { Ok(format!("{}\n", serde_json::to_string(report)?)) } else { Ok(lines) }
}

async fn first_model(target: &Target) -> anyhow::Result<String> {
    let list = target.get("/v1/models").await?;
    let name = list["data"][0]["id"].as_str().map(Into::into);
    name.ok_or_else(|| anyhow!("{}: /v1/models lists none; --model names one", target.authority))
}

async fn measure(arguments: &LoadArguments, target: Target, prompts: Prompts, pace: Pace) -> Report {
    let path = arguments.endpoint.path();
    let (requests, pid) = (arguments.requests.get(), arguments.pid);
    let resident = move || pid.and_then(memory::resident_of);
    let shared = Arc::new((target, prompts, AtomicUsize::new(0), AtomicU64::new(0)));
    let before = resident();
    let started = Instant::now();
    let job = |index, begin| {
        let shared = shared.clone();
        async move {
            let (target, prompts, ended, halfway) = &*shared;
            let outcome = target.stream(path, &streamed(prompts.get(index)), begin).await;
            if ended.fetch_add(1, Ordering::Relaxed) == requests / 2 {
                halfway.store(resident().unwrap_or(0), Ordering::Relaxed);
            }
            outcome
        }
    };
    let outcomes = pace::run(pace, requests, arguments.seed, job).await;
    let wall = started.elapsed();
    let halfway = shared.3.load(Ordering::Relaxed);
    let memory = pid.zip(before).zip(resident()).map(|((pid, before), after)| Memory { pid, before, halfway, after });
    Report::new(&outcomes, wall, memory)
}
