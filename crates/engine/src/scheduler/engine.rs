//! The loop: takes who waits, runs a step, hands out what came of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use moebius_kernels::parallel::{for_each_chunk, with_team};
use moebius_model::{Batch, ExpertUse, Model, Observer};
use moebius_moe::{LoadStatistics, Routing};

use super::memory::{Memory, Share};
use super::queue::Waiting;
use super::request::{Dropped, News};
use super::sequence::Sequence;
use super::{Inbox, Scheduler, Stop};
use crate::session::Given;
use crate::{EngineError, ExpertTrace, Finish, Reading, Session, Tokenizer};

/// Looks for requests that waited too long, while nothing else happens, at least this often.
const LOOK: std::time::Duration = std::time::Duration::from_millis(500);

pub(super) struct Engine<'e> {
    scheduler: &'e Scheduler,
    model: &'e Model,
    tokenizer: &'e Tokenizer,
    memory: Memory<'e>,
    /// In the order in which they began.
    running: Vec<Sequence<'e>>,
}

/// What one sequence made of a step.
struct Turn<'s, 'e> {
    sequence: &'s mut Sequence<'e>,
    share: Share,
    first_row: usize,
    given: &'s [f32],
    drawn: usize,
    result: Result<Option<Finish>, EngineError>,
}

impl<'e> Engine<'e> {
    pub(super) fn new(scheduler: &'e Scheduler, model: &'e Model, tokenizer: &'e Tokenizer) -> Self {
        let shared = &scheduler.0;
        let memory = Memory::new(model, &shared.options, shared.limits.page_bytes, &shared.gauge);
        Self { scheduler, model, tokenizer, memory, running: Vec::new() }
    }

    pub(super) fn run(&mut self) {
        while self.take_requests() {
            self.drop_the_gone();
            if self.running.is_empty() {
                continue;
            }
            // A panic is a fault of ours: those of this step hear of it, the others go on.
            let step = catch_unwind(AssertUnwindSafe(|| with_team(|| self.step())));
            if step.is_err() {
                self.memory.clear();
                for sequence in std::mem::take(&mut self.running) {
                    self.scheduler.inbox().queue.ended(sequence.client);
                    sequence.fail(EngineError::Internal("a step of the computation panicked".into()));
                }
            }
        }
        self.memory.clear();
    }

    /// Takes requests that can begin, and waits for one where nothing runs; false when all is over.
    fn take_requests(&mut self) -> bool {
        let scheduler = self.scheduler;
        let mut inbox = scheduler.inbox();
        loop {
            self.drop_the_late(&mut inbox);
            if inbox.stop == Some(Stop::Now) || (inbox.stop.is_some() && self.running.is_empty()) {
                drop(inbox);
                self.drop_running();
                return false;
            }
            if inbox.queue.len() == 0 && self.running.is_empty() {
                let wait = scheduler.0.wake.wait_timeout(inbox, LOOK);
                inbox = wait.unwrap_or_else(std::sync::PoisonError::into_inner).0;
                continue;
            }
            break;
        }
        let patience = scheduler.0.options.longest_wait / 2;
        while self.running.len() < scheduler.0.options.most_running.max(1) {
            let Some(client) = inbox.queue.next(patience) else { break };
            let Some(Waiting { request, .. }) = inbox.queue.peek(client) else { break };
            let shares = Sequence::may_share(&request.task);
            let Some(paged) = self.memory.admit(&self.running, request.tenant, &request.prompt, shares) else { break };
            let Some(waiting) = inbox.queue.pop(client) else { break };
            let cached = paged.session.position();
            inbox.queue.charge(client, waiting.request.prompt.len() - cached);
            match Sequence::new(waiting, paged, self.tokenizer) {
                Ok(mut sequence) => {
                    let _ = sequence.begin();
                    self.running.push(sequence);
                    scheduler.statistics(|statistics| {
                        statistics.prefix_hits += u64::from(cached > 0);
                        statistics.prefix_tokens += cached as u64;
                    });
                }
                Err((mut receiver, error)) => {
                    inbox.queue.ended(client);
                    let _ = receiver.news(News::Failed(error));
                }
            }
        }
        true
    }

    /// Drops who waited too long, or is no longer there.
    fn drop_the_late(&mut self, inbox: &mut Inbox) {
        let (longest, stopping) = (self.scheduler.0.options.longest_wait, inbox.stop.is_some());
        let gone = inbox.queue.remove(|waiting| {
            stopping || waiting.since.elapsed() > longest || !waiting.request.receiver.is_listening()
        });
        let count = gone.len() as u64;
        for mut waiting in gone {
            let why = if stopping { Dropped::ShuttingDown } else { Dropped::WaitedTooLong };
            let _ = waiting.request.receiver.news(News::Dropped(why));
        }
        if count > 0 {
            self.scheduler.statistics(|statistics| statistics.dropped += count);
        }
    }

    fn drop_running(&mut self) {
        for mut sequence in std::mem::take(&mut self.running) {
            self.scheduler.inbox().queue.ended(sequence.client);
            sequence.drop_for(Dropped::ShuttingDown);
        }
    }

    /// Ends sequences to which nobody listens, and those that ran too long.
    fn drop_the_gone(&mut self) {
        let longest = self.scheduler.0.options.longest_run;
        for index in (0..self.running.len()).rev() {
            let sequence = &self.running[index];
            if !sequence.is_listening() {
                self.end(index, Finish::Cancelled);
            } else if sequence.ran() > longest {
                self.end(index, Finish::TimeLimit);
            }
        }
    }

    fn end(&mut self, index: usize, finish: Finish) {
        let sequence = self.running.remove(index);
        self.memory.keep(&sequence);
        self.scheduler.inbox().queue.ended(sequence.client);
        let ran = sequence.ran();
        self.scheduler.statistics(|statistics| {
            statistics.ran(ran);
            statistics.running = self.running.len();
        });
        sequence.finish(finish);
    }

    /// One pass over the weights.
    fn step(&mut self) {
        let started = Instant::now();
        let step = self.memory.compose(&mut self.running);
        if let Some(index) = step.full {
            return self.end(index, Finish::ContextFull);
        }
        let wants_trace = step.shares.iter().any(|share| self.running[share.index].traces());
        let mut watch = Watch::new(wants_trace);
        let mut batch = Vec::new();
        let (given, model_time) = {
            let mut readings = Vec::with_capacity(step.shares.len());
            let mut shares = step.shares.iter().peekable();
            for (index, sequence) in self.running.iter_mut().enumerate() {
                if let Some(share) = shares.next_if(|share| share.index == index) {
                    let first = sequence.paged.session.position();
                    let tokens = &sequence.tokens[first..first + share.tokens];
                    batch.push((tokens.to_vec(), first));
                    readings.push(Reading { session: &mut sequence.paged.session, tokens, wanted: share.wanted });
                }
            }
            let before = Instant::now();
            (Session::read_step(&mut readings, &mut watch), before.elapsed())
        };
        let given = match given {
            Ok(Some(given)) => given,
            Ok(None) => return,
            Err(error) => return self.fail_step(&step.shares, &error),
        };
        let ended = self.hand_out(&step.shares, &given, &watch);
        self.scheduler.statistics(|statistics| {
            statistics.yielded += step.yielded as u64;
            statistics.prefix_tokens += step.adopted as u64;
            statistics.steps += 1;
            statistics.model_seconds += model_time.as_secs_f64();
            watch.count(self.model, self.scheduler, &batch, statistics);
        });
        for (index, result) in ended.into_iter().rev() {
            match result {
                Ok(finish) => self.end(index, finish),
                Err(error) => {
                    let sequence = self.running.remove(index);
                    self.scheduler.inbox().queue.ended(sequence.client);
                    sequence.fail(error);
                }
            }
        }
        self.scheduler.statistics(|statistics| {
            statistics.running = self.running.len();
            statistics.step_seconds += started.elapsed().as_secs_f64();
        });
    }

    /// Draws tokens and tells the receivers, several sequences at once; gives those that ended, by their places.
    fn hand_out(
        &mut self,
        shares: &[Share],
        given: &Given,
        watch: &Watch,
    ) -> Vec<(usize, Result<Finish, EngineError>)> {
        let model = self.model;
        let mut shares = shares.iter().copied().enumerate().peekable();
        let (mut turns, mut first_row) = (Vec::new(), 0);
        for (index, sequence) in self.running.iter_mut().enumerate() {
            if let Some((place, share)) = shares.next_if(|(_, share)| share.index == index) {
                let given = given.of(place);
                turns.push(Turn { sequence, share, first_row, given, drawn: 0, result: Ok(None) });
                first_row += share.tokens;
            }
        }
        for_each_chunk(&mut turns, 1, 1, |_, turns| {
            for turn in turns {
                let trace = turn.sequence.traces().then_some((&watch.trace, turn.first_row));
                let before = turn.sequence.tokens.len();
                turn.result = turn.sequence.advance(model, turn.share.tokens, turn.given, trace);
                turn.drawn = turn.sequence.tokens.len() - before;
            }
        });
        let (mut ended, mut charges, mut prompt_tokens) = (Vec::new(), Vec::new(), 0);
        for turn in turns {
            charges.push((turn.sequence.client, turn.drawn));
            prompt_tokens += if turn.sequence.is_in_prompt() { turn.share.tokens } else { 0 };
            if turn.sequence.is_in_prompt() || turn.share.tokens > 1 {
                self.memory.keep(turn.sequence);
            }
            match turn.result {
                Ok(None) => {}
                Ok(Some(finish)) => ended.push((turn.share.index, Ok(finish))),
                Err(error) => ended.push((turn.share.index, Err(error))),
            }
        }
        let drawn = charges.iter().map(|(_, drawn)| drawn).sum();
        let mut inbox = self.scheduler.inbox();
        charges.into_iter().for_each(|(client, drawn)| inbox.queue.charge(client, drawn));
        drop(inbox);
        self.scheduler.statistics(|statistics| {
            statistics.generated(drawn);
            statistics.prompt_tokens += prompt_tokens as u64;
        });
        ended
    }

    /// The model refused a step. Requests are checked before, so it is nobody's fault, and all of the step hear of it.
    fn fail_step(&mut self, shares: &[Share], error: &EngineError) {
        for share in shares.iter().rev() {
            let sequence = self.running.remove(share.index);
            self.scheduler.inbox().queue.ended(sequence.client);
            sequence.fail(EngineError::Internal(error.to_string()));
        }
    }
}

/// Listens to the routers of a step.
struct Watch {
    trace: ExpertTrace,
    experts: ExpertUse,
    loads: Vec<(usize, LoadStatistics)>,
}

impl Watch {
    fn new(trace: bool) -> Self {
        Self { trace: ExpertTrace::new(trace), experts: ExpertUse::default(), loads: Vec::new() }
    }

    /// Adds what the routers chose to the statistics.
    fn count(
        &self,
        model: &Model,
        scheduler: &Scheduler,
        batch: &[(Vec<u32>, usize)],
        statistics: &mut super::Statistics,
    ) {
        for (layer, load) in &self.loads {
            let counts = &mut statistics.experts.entry(*layer).or_default().counts;
            counts.resize(load.counts.len(), 0);
            counts.iter_mut().zip(&load.counts).for_each(|(sum, count)| *sum += count);
        }
        if !self.loads.is_empty() {
            let (sequences, batch) = (batch.len(), Batch::continuing_together(batch));
            let numerics = scheduler.0.options.numerics;
            let cost = |experts| model.cost(numerics, &batch, 0, experts).weight_bytes;
            let bytes = cost(&self.experts) - cost(&ExpertUse::default());
            statistics.read_experts(sequences, batch.tokens.len(), bytes);
        }
    }
}

impl Observer for Watch {
    fn routing(&mut self, layer: usize, routing: &Routing) {
        self.trace.routing(layer, routing);
        self.experts.routing(layer, routing);
        let mut load = LoadStatistics::default();
        load.add(&routing.plan);
        self.loads.push((layer, load));
    }
}
