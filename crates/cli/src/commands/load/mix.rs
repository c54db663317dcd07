//! Good requests among bad clients: every good one must get the text that it gets alone.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::Value;
use tokio::net::TcpStream;

use super::arguments::LoadArguments;
use super::client::{Outcome, Target};
use super::faults::{ALL, Fault};
use super::pace::{self, Pace};
use super::prompts::{Prompts, streamed};
use super::report::{Memory, Report};
use crate::memory;

/// A good request that the server puts off comes again this often.
const MOST_TRIES: usize = 1000;
/// The server has this long to come to rest before its memory is read.
const REST: Duration = Duration::from_secs(3);

/// What a mixed load showed.
#[derive(Debug, Serialize)]
pub struct MixReport {
    /// The good requests.
    pub good: Report,
    /// Good requests that got another text than alone.
    pub different: usize,
    /// Times that a good request was put off with status 429, and came again.
    pub put_off: usize,
    /// Bad clients of each kind.
    pub bad: BTreeMap<String, usize>,
    /// What the server did wrong, counted.
    pub violations: BTreeMap<String, usize>,
    /// Connections that said nothing, of those asked for.
    pub silent: usize,
    /// Whether the answers alone were the same before and after.
    pub same_afterwards: bool,
}

/// One request's end.
enum Ended {
    Good { outcome: Outcome, different: bool },
    Bad { fault: Fault, violation: Option<String> },
}

struct Mix {
    target: Target,
    path: &'static str,
    bodies: Vec<Value>,
    alone: Vec<String>,
    put_off: AtomicUsize,
    ended: AtomicUsize,
    halfway: AtomicU64,
}

/// Runs the load.
///
/// # Errors
/// A server that cannot be reached or does not answer when it has nothing else to do.
pub async fn run(
    arguments: &LoadArguments,
    target: Target,
    prompts: &Prompts,
    pace: Pace,
) -> anyhow::Result<MixReport> {
    let path = arguments.endpoint.path();
    let bodies: Vec<Value> = (0..arguments.distinct.get()).map(|index| seeded(prompts.get(index), index)).collect();
    let alone = answers_alone(&target, path, &bodies).await?;
    let silent = open_silent(&target, arguments.silent).await;
    let counters = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicU64::new(0));
    let mix = Mix { target, path, bodies, alone, put_off: counters.0, ended: counters.1, halfway: counters.2 };
    let mix = Arc::new(mix);
    let resident = || arguments.pid.and_then(memory::resident_of);
    let before = resident();
    let requests = arguments.requests.get();
    let (seed, share, pid) = (arguments.seed, arguments.fault_share, arguments.pid);
    let started = Instant::now();
    let job = |index, begin| {
        let mix = mix.clone();
        async move {
            let ended = mix.request(index, begin, seed, share).await;
            if mix.ended.fetch_add(1, Ordering::Relaxed) == requests / 2 {
                mix.halfway.store(pid.and_then(memory::resident_of).unwrap_or(0), Ordering::Relaxed);
            }
            ended
        }
    };
    let ended = pace::run(pace, requests, seed, job).await;
    let wall = started.elapsed();
    let open = silent.len();
    drop(silent);
    tokio::time::sleep(REST).await;
    let halfway = mix.halfway.load(Ordering::Relaxed);
    let memory = arguments.pid.zip(before).zip(resident());
    let memory = memory.map(|((pid, before), after)| Memory { pid, before, halfway, after });
    let same_afterwards = answers_alone(&mix.target, path, &mix.bodies).await? == mix.alone;
    Ok(summary(ended, wall, memory, open, same_afterwards, mix.put_off.load(Ordering::Relaxed)))
}

/// The same request always gives the same text: a seed where it has none, and sampling that uses it.
fn seeded(mut body: Value, index: usize) -> Value {
    if body.get("seed").is_none() {
        body["seed"] = (1000 + index).into();
    }
    if body.get("temperature").is_none() {
        body["temperature"] = 0.8.into();
    }
    body
}

async fn answers_alone(target: &Target, path: &str, bodies: &[Value]) -> anyhow::Result<Vec<String>> {
    let mut texts = Vec::new();
    for body in bodies {
        match target.stream(path, &streamed(body.clone()), Instant::now()).await {
            Outcome::Answered(answer) => texts.push(answer.text),
            other => bail!("{}: alone, a good request got {other:?}", target.authority),
        }
    }
    Ok(texts)
}

async fn open_silent(target: &Target, wanted: usize) -> Vec<TcpStream> {
    let mut open = Vec::new();
    for _ in 0..wanted {
        match TcpStream::connect(target.address).await {
            Ok(stream) => open.push(stream),
            // This process or the server has no more room; the report says how many there were.
            Err(_) => break,
        }
    }
    open
}

impl Mix {
    async fn request(&self, index: usize, begin: Instant, seed: u64, share: f64) -> Ended {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(index as u64);
        let which = random.random_range(0..self.bodies.len());
        let body = &self.bodies[which];
        if random.random_range(0.0..1.0) < share {
            let fault = ALL[random.random_range(0..ALL.len())];
            let played = fault.play(&self.target, self.path, body).await;
            return Ended::Bad { fault, violation: played.err().map(|error| format!("{error:#}")) };
        }
        let body = streamed(body.clone());
        for _ in 0..MOST_TRIES {
            match self.target.stream(self.path, &body, begin).await {
                Outcome::Refused(wait) => {
                    self.put_off.fetch_add(1, Ordering::Relaxed);
                    // Spread out, or all come back at the same moment.
                    let factor = random.random_range(0.5..1.5);
                    tokio::time::sleep(wait.mul_f64(factor)).await;
                }
                outcome => {
                    let text = if let Outcome::Answered(answer) = &outcome { Some(&answer.text) } else { None };
                    let different = text.is_some_and(|text| *text != self.alone[which]);
                    return Ended::Good { outcome, different };
                }
            }
        }
        let reason = anyhow!("put off {MOST_TRIES} times").to_string();
        Ended::Good { outcome: Outcome::Failed(reason), different: false }
    }
}

fn summary(
    ended: Vec<Ended>,
    wall: Duration,
    memory: Option<Memory>,
    silent: usize,
    same_afterwards: bool,
    put_off: usize,
) -> MixReport {
    let (mut outcomes, mut wrong) = (Vec::new(), 0);
    let (mut bad, mut violations) = (BTreeMap::new(), BTreeMap::new());
    for end in ended {
        match end {
            Ended::Good { outcome, different } => {
                outcomes.push(outcome);
                wrong += usize::from(different);
            }
            Ended::Bad { fault, violation } => {
                *bad.entry(format!("{fault:?}")).or_insert(0) += 1;
                if let Some(violation) = violation {
                    *violations.entry(violation).or_insert(0) += 1;
                }
            }
        }
    }
    let good = Report::new(&outcomes, wall, memory);
    MixReport { good, different: wrong, put_off, bad, violations, silent, same_afterwards }
}

impl MixReport {
    /// Whether the server did all that it should.
    pub fn sound(&self) -> bool {
        let all_answered = self.good.answered == self.good.requests;
        all_answered && self.different == 0 && self.violations.is_empty() && self.same_afterwards
    }

    /// The report as lines.
    pub fn lines(&self) -> String {
        let mut text = self.good.lines();
        let kinds: Vec<String> = self.bad.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        let _ = writeln!(text, "\nbad clients: {}; {} silent connections", kinds.join(", "), self.silent);
        let _ = writeln!(
            text,
            "{} good answers differ from the answer alone; {} times put off and asked again",
            self.different, self.put_off
        );
        let wrong: usize = self.violations.values().sum();
        let _ = writeln!(text, "{wrong} bad clients were treated wrongly");
        for (what, count) in self.violations.iter().take(20) {
            let _ = writeln!(text, "  {count} x {what}");
        }
        let _ =
            writeln!(text, "answers alone afterwards: {}", if self.same_afterwards { "the same" } else { "DIFFERENT" });
        text
    }
}
