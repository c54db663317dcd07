//! Many sequences at once: whoever decodes and whoever still reads a prompt go through the model together.
//!
//! A step is one pass over the weights: a token of every sequence that decodes, and as many tokens of prompts as fill the
//! rest of the step. In a mixture of experts that is where the gain lies: an expert's weights are read once for all rows that
//! were sent to it, so the bytes read for a token fall with the number of rows, and a chunk of a prompt, which meets nearly
//! every expert anyway, lets the decoding rows have theirs for nothing.
//!
//! A token's bits do not depend on its neighbours in the step, so a request's text is the same alone and under load. That also
//! makes it harmless to take a sequence's memory away when it runs short and to read its tokens again later.
//!
//! Reading order: `request` says what may be asked and what is told, `queue` who waits, `pages` and `prefix` how keys and values
//! are counted and shared, `sequence` how one sequence goes on, `memory` and `engine` what a step consists of, `statistics` what
//! is remembered of it all.

mod engine;
mod memory;
mod pages;
mod prefix;
mod queue;
mod request;
mod sequence;
mod statistics;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use moebius_kernels::gemm::Precision;
use moebius_model::Model;

use crate::{EngineError, Session, Tokenizer};
use engine::Engine;
use pages::{Gauge, pages_for};
use queue::Queue;

pub use request::{Dropped, Generate, News, Outcome, Piece, Pooling, Receiver, Request, Task, TokenScore};
pub use statistics::{Load, STEP_SIZES, Statistics};

/// How much is done at once, and what is too much.
#[derive(Clone, Debug)]
pub struct SchedulerOptions {
    /// Precision of matrix products.
    pub precision: Precision,
    /// Tokens that go through the model in a step.
    pub step_tokens: usize,
    /// Sequences that run at once.
    pub most_running: usize,
    /// Requests that may wait; the next is refused.
    pub most_waiting: usize,
    /// Bytes for keys and values, those kept for their beginnings included.
    pub cache_bytes: usize,
    /// Whether beginnings that were read are kept for requests to come.
    pub share_prefixes: bool,
    /// A request that waits longer is dropped; after half of it, it goes before all that came later.
    pub longest_wait: Duration,
    /// A request that runs longer ends with what it has.
    pub longest_run: Duration,
}

impl Default for SchedulerOptions {
    fn default() -> Self {
        Self {
            precision: Precision::Bf16,
            step_tokens: 512,
            most_running: 64,
            most_waiting: 256,
            cache_bytes: 1 << 30,
            share_prefixes: true,
            longest_wait: Duration::from_secs(120),
            longest_run: Duration::from_secs(1800),
        }
    }
}

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Too many wait already.
    #[error("{waiting} requests are waiting, more are not taken: try again in {} s", retry_after.as_secs())]
    Full {
        /// Requests that wait.
        waiting: usize,
        /// When there may be room.
        retry_after: Duration,
    },
    /// The server ends.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// It could never be answered.
    #[error(transparent)]
    Impossible(#[from] EngineError),
}

/// Takes requests from any thread; one thread runs them.
#[derive(Clone)]
pub struct Scheduler(Arc<Shared>);

struct Shared {
    options: SchedulerOptions,
    limits: Limits,
    gauge: Gauge,
    inbox: Mutex<Inbox>,
    /// Something came into the inbox.
    wake: Condvar,
    statistics: Mutex<Statistics>,
}

/// What of the model decides whether a request is possible.
struct Limits {
    vocabulary: usize,
    context: usize,
    page_bytes: usize,
}

#[derive(Default)]
struct Inbox {
    queue: Queue,
    stop: Option<Stop>,
}

/// How a scheduler ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// What runs is finished, what waits is dropped.
    WhenDone,
    /// What runs is dropped too.
    Now,
}

impl Scheduler {
    /// A scheduler for a model; [`Scheduler::run`] sets it to work.
    pub fn new(model: &Model, options: SchedulerOptions) -> Self {
        let page_bytes = Session::page_bytes(model, options.precision);
        let limits = Limits { vocabulary: model.config.vocab_size, context: model.config.max_positions, page_bytes };
        Self(Arc::new(Shared {
            options,
            limits,
            gauge: Gauge::default(),
            inbox: Mutex::default(),
            wake: Condvar::new(),
            statistics: Mutex::new(Statistics::new()),
        }))
    }

    /// Takes requests, all of them or none.
    ///
    /// # Errors
    /// [`Refusal`]: too many wait, the server ends, a prompt that is empty, too long, too large for the cache, or has tokens
    /// that the model lacks, a sampling option outside its range.
    pub fn submit(&self, requests: Vec<Request>) -> Result<(), Refusal> {
        for request in &requests {
            self.check(request)?;
        }
        let mut inbox = self.inbox();
        if inbox.stop.is_some() {
            return Err(Refusal::ShuttingDown);
        }
        let waiting = inbox.queue.len();
        if waiting + requests.len() > self.0.options.most_waiting {
            let retry_after = self.statistics(|statistics| statistics.expected_wait(waiting));
            return Err(Refusal::Full { waiting, retry_after });
        }
        requests.into_iter().for_each(|request| inbox.queue.push(request));
        self.0.wake.notify_one();
        Ok(())
    }

    fn check(&self, request: &Request) -> Result<(), EngineError> {
        let Limits { vocabulary, context, page_bytes } = self.0.limits;
        let found = request.prompt.len();
        // A text that is only embedded may fill the context.
        let room = match &request.task {
            Task::Embed(_) => context + 1,
            Task::Generate(generate) => {
                generate.sampling.validate()?;
                context
            }
        };
        if found == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        if found >= room {
            return Err(EngineError::PromptTooLong { found, context });
        }
        if let Some(position) = request.prompt.iter().position(|&token| token as usize >= vocabulary) {
            let token = request.prompt[position];
            return Err(moebius_model::ModelError::Token { token, position, vocabulary }.into());
        }
        let (needed, budget) = (pages_for(found) * page_bytes, self.0.options.cache_bytes);
        if needed > budget {
            return Err(EngineError::CacheTooSmall { tokens: found, needed, budget });
        }
        Ok(())
    }

    /// Computes until [`Scheduler::stop`] is called and nothing is left to do. To be called by one thread, best by one of the
    /// pool that the kernels compute with.
    pub fn run(&self, model: &Model, tokenizer: &Tokenizer) {
        Engine::new(self, model, tokenizer).run();
    }

    /// Takes no more requests; [`Scheduler::run`] returns when what runs is finished, or at once.
    pub fn stop(&self, how: Stop) {
        let mut inbox = self.inbox();
        inbox.stop = inbox.stop.max(Some(how));
        self.0.wake.notify_all();
    }

    /// Whether no more requests are taken.
    pub fn is_stopping(&self) -> bool {
        self.inbox().stop.is_some()
    }

    /// Requests that wait now.
    pub fn waiting(&self) -> usize {
        self.inbox().queue.len()
    }

    /// Bytes of keys and values in use, and those there are.
    pub fn cache_bytes(&self) -> (usize, usize) {
        (self.0.gauge.bytes(), self.0.options.cache_bytes)
    }

    /// Bytes of keys and values that a token takes.
    pub fn bytes_per_token(&self) -> usize {
        self.0.limits.page_bytes / Session::BLOCK
    }

    /// The options it was made with.
    pub fn options(&self) -> &SchedulerOptions {
        &self.0.options
    }

    /// Looks at what was counted.
    pub fn statistics<R>(&self, look: impl FnOnce(&mut Statistics) -> R) -> R {
        look(&mut self.0.statistics.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
