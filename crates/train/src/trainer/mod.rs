//! The run itself: steps, validations, checkpoints, the final model.
//!
//! One step, exactly: the next `accumulation` micro-batches of `sequences` windows are taken from the sampler, in its
//! order. Each gives its mean loss and that loss's gradient. The gradients are added in the order of the micro-batches,
//! `((g1 + g2) + g3) ...`, in f32; the sum is multiplied once by `1 / accumulation` and by the clipping factor, inside
//! the optimiser. So a step over A micro-batches has the bits of adding A separately computed gradients, and a step over
//! the same micro-batch twice has the bits of a step over it once.
//!
//! [`prepare`](Trainer::prepare) begins or resumes, `validation` measures and keeps the best, `recovery` deals with loss
//! spikes.

mod prepare;
mod recovery;
mod validation;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use moebius_kernels::parallel::with_team;
use moebius_model::{Counted, Model};
use moebius_tensor::{Gradients, Param};

use crate::checkpoint::{self, Best, Learner, TrainState};
use crate::data::corpus::Corpus;
use crate::data::sampler::MixedSampler;
use crate::learn::{self, LoadCounts, Losses};
use crate::metrics::{MetricsLog, Record, StepRecord};
use crate::optimizer::{Optimizer, StepSettings, clip_factor};
use crate::progress::{Event, Progress, RunFacts};
use crate::recipe::BalanceOver;
use crate::run_folder::RunFolder;
use crate::samples::SampleWriter;
use crate::schedule::Schedule;
use crate::tensorboard::EventFile;
use crate::{Recipe, Result, TrainError, collapse, plot, report, spikes};

/// A run that is ready to take steps.
pub struct Trainer {
    recipe: Recipe,
    folder: RunFolder,
    corpus: Corpus,
    schedule: Schedule,
    learner: Learner,
    sampler: MixedSampler,
    state: TrainState,
    gradients: Gradients,
    /// The gradient of one micro-batch after the first.
    addend: Gradients,
    log: MetricsLog,
    /// The same records for TensorBoard.
    events: Option<EventFile>,
    samples: Option<Box<dyn SampleWriter>>,
}

/// How a call of [`Trainer::run`] ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Whether nothing is left to do; otherwise the stop flag was seen, and `--resume` goes on.
    pub finished: bool,
    /// Whether it ended early, for want of improvement.
    pub early: bool,
    /// Steps done.
    pub step: u64,
    /// The lowest validation loss so far.
    pub best: Option<Best>,
}

/// What the gradients of a step are, before they are applied.
struct Computed {
    begun: Instant,
    losses: Losses,
    /// Of the mean gradient, before clipping.
    gradient_norm: f64,
    load: LoadCounts,
}

impl Trainer {
    /// Lends the run something that writes its samples.
    #[must_use]
    pub fn with_samples(self, writer: Box<dyn SampleWriter>) -> Self {
        Self { samples: Some(writer), ..self }
    }

    /// Takes the steps that are left, unless `stop` is set: then the step under way is finished and saved.
    ///
    /// # Errors
    /// A loss that is no number, more spikes than are allowed, a full disk; checkpoints written before stay usable.
    pub fn run(&mut self, stop: &AtomicBool, progress: &mut dyn Progress) -> Result<Outcome> {
        let steps = self.recipe.train.steps;
        progress.event(&Event::Started(&self.facts()));
        let mut saved = self.state.step;
        while self.state.step < steps && !self.is_stale() && !stop.load(Ordering::Relaxed) {
            if !self.try_step(progress)? {
                saved = self.state.step;
                continue;
            }
            let due = |every: u64| self.state.step.is_multiple_of(every) || self.state.step == steps;
            let (validate, save) = (due(self.recipe.train.validate_every), due(self.recipe.train.save_every));
            self.write_samples(progress)?;
            if validate {
                self.validate(progress)?;
            }
            if save {
                self.save(progress)?;
                saved = self.state.step;
            }
        }
        if saved != self.state.step {
            self.save(progress)?;
        }
        let early = self.is_stale() && self.state.step < steps;
        let finished = early || self.state.step >= steps;
        if early {
            progress.event(&Event::EarlyStop { step: self.state.step });
        }
        if finished {
            self.export(progress)?;
        }
        Ok(Outcome { finished, early, step: self.state.step, best: self.state.best })
    }

    /// Whether validation has not improved for as long as the recipe has patience.
    fn is_stale(&self) -> bool {
        self.recipe.train.patience.is_some_and(|patience| self.state.stale >= patience)
    }

    /// One step with its log, or, if its loss was a spike that the recipe wants undone, the way back to the last
    /// checkpoint: then the answer is false.
    fn try_step(&mut self, progress: &mut dyn Progress) -> Result<bool> {
        let computed = self.compute()?;
        if let Some(spike) = self.spike(&computed)
            && !self.pass(spike, &computed, progress)?
        {
            return Ok(false);
        }
        let record = self.apply(&computed);
        progress.event(&Event::Step(&record));
        self.judge_loads(&record, progress)?;
        self.record(Record::Step(record))?;
        Ok(true)
    }

    /// One optimiser step, as the head of this file defines it. Neither logs nor saves, and takes spikes as they come.
    ///
    /// # Errors
    /// The model's; a loss or gradient that is no number, before it reaches the weights.
    pub fn step(&mut self) -> Result<StepRecord> {
        let computed = self.compute()?;
        self.check_finite(&computed)?;
        Ok(self.apply(&computed))
    }

    fn check_finite(&self, computed: &Computed) -> Result<()> {
        let losses = &computed.losses;
        let loss = losses.cross_entropy + losses.balance + losses.z + losses.method;
        for (what, value) in [("loss", loss), ("gradient norm", computed.gradient_norm)] {
            if !value.is_finite() {
                return Err(TrainError::Diverged { step: self.state.step + 1, what, value });
            }
        }
        Ok(())
    }

    /// Computes the gradients of the next step.
    fn compute(&mut self) -> Result<Computed> {
        let begun = Instant::now();
        let mut load = LoadCounts::default();
        let losses = self.accumulate(&mut load)?;
        let gradient_norm = with_team(|| self.gradients.norm()) / self.recipe.train.accumulation as f64;
        Ok(Computed { begun, losses, gradient_norm, load })
    }

    /// Moves the weights.
    fn apply(&mut self, computed: &Computed) -> StepRecord {
        let step = self.state.step + 1;
        let rate = self.schedule.rate(step);
        let Learner { model, optimizer, average } = &mut self.learner;
        let clip = clip_factor(computed.gradient_norm, self.recipe.optimizer.clip_norm);
        let gradient_scale = clip / self.recipe.train.accumulation as f64;
        let moving = Instant::now();
        let settings = StepSettings { step, rate, gradient_scale };
        with_team(|| optimizer.step(model.params_mut(), &mut self.gradients, &settings));
        self.gradients.clear();
        let optimizer_seconds = moving.elapsed().as_secs_f64();
        model.after_step(&computed.load.counts());
        if let Some(average) = average {
            average.update(&model.params(), step);
        }
        self.state.step = step;
        self.state.tokens += self.recipe.tokens_per_step() as u64;
        self.state.positions = self.sampler.positions();
        let losses = &computed.losses;
        spikes::remember(&mut self.state.watch.losses, losses.cross_entropy, self.recipe.spikes.window);
        let load = computed.load.statistics();
        collapse::add(&mut self.state.watch.loads, &load);
        StepRecord {
            step,
            loss: losses.cross_entropy,
            balance_loss: losses.balance,
            z_loss: losses.z,
            method_loss: losses.method,
            dropped: computed.load.dropped(),
            learning_rate: rate,
            gradient_norm: computed.gradient_norm,
            tokens: self.state.tokens,
            seconds: computed.begun.elapsed().as_secs_f64(),
            optimizer_seconds,
            load,
        }
    }

    /// Leaves the sum of the micro-batches' gradients in `self.gradients`; returns their mean losses.
    fn accumulate(&mut self, load: &mut LoadCounts) -> Result<Losses> {
        let train = &self.recipe.train;
        let model = &self.learner.model;
        let mut mean = Losses::default();
        self.gradients.clear();
        let numbers = |_| (0..train.sequences).map(|_| self.sampler.next_window()).collect::<Vec<_>>();
        let micro_batches: Vec<_> = (0..train.accumulation).map(numbers).collect();
        // Each micro-batch of a run has its own, the same again after a resumption.
        let seed_of = |micro_batch: usize| {
            let number = self.state.step * train.accumulation as u64 + micro_batch as u64;
            train.seed ^ (number + 1).rotate_left(32)
        };
        let over = if train.accumulation == 1 { BalanceOver::MicroBatch } else { self.recipe.balance.over };
        let mut counted = LoadCounts::default();
        for (micro_batch, numbers) in micro_batches.iter().enumerate().filter(|_| over == BalanceOver::Step) {
            let batch = self.corpus.train_windows(train.sequence_length, numbers);
            learn::count(model, &batch, &self.recipe, seed_of(micro_batch), &mut counted)?;
        }
        for (micro_batch, numbers) in micro_batches.iter().enumerate() {
            let batch = self.corpus.train_windows(train.sequence_length, numbers);
            let target = if micro_batch == 0 { &mut self.gradients } else { &mut self.addend };
            target.clear();
            let loads = if over == BalanceOver::SoFar { load.loads() } else { counted.loads() };
            let counted = match over {
                BalanceOver::MicroBatch => Counted::Batch,
                BalanceOver::SoFar => Counted::Since(&loads),
                BalanceOver::Step => Counted::All(&loads),
            };
            let losses = learn::gradients(model, &batch, &self.recipe, seed_of(micro_batch), target, counted, load)?;
            mean.add(&losses, 1.0 / train.accumulation as f64);
            if micro_batch > 0 {
                add_gradients(&mut self.gradients, &self.addend, &model.params());
            }
        }
        self.addend.clear();
        Ok(mean)
    }

    /// Writes a record down.
    fn record(&mut self, record: Record) -> Result<()> {
        self.log.append(&record)?;
        match &mut self.events {
            Some(events) => events.append(&record),
            None => Ok(()),
        }
    }

    /// Opens the log at the step and the rollbacks that `self.state` has, and writes TensorBoard's file anew.
    fn open_log(&mut self) -> Result<()> {
        self.log = MetricsLog::open(&self.folder.metrics(), self.state.step, self.state.watch.rollbacks)?;
        self.open_events()
    }

    fn open_events(&mut self) -> Result<()> {
        if self.recipe.train.tensorboard {
            let records = MetricsLog::read(&self.folder.metrics())?;
            let events = EventFile::create(&self.folder.tensorboard(), &records, self.recipe.tokens_per_step())?;
            self.events = Some(events);
        }
        Ok(())
    }

    /// Every so many steps, names the layers whose experts have collapsed.
    fn judge_loads(&mut self, record: &StepRecord, progress: &mut dyn Progress) -> Result<()> {
        if !record.step.is_multiple_of(collapse::WINDOW) {
            return Ok(());
        }
        let loads = std::mem::take(&mut self.state.watch.loads);
        for found in collapse::find(&loads, record.step, &self.recipe) {
            progress.event(&Event::Collapse(&found));
            self.record(Record::Collapse(found))?;
        }
        Ok(())
    }

    /// Writes a checkpoint, the plot and the page, and deletes what is no longer wanted.
    ///
    /// # Errors
    /// The system's; the checkpoints before stay as they were.
    pub fn save(&mut self, progress: &mut dyn Progress) -> Result<()> {
        self.log.sync()?;
        let path = self.folder.checkpoint(self.state.step);
        checkpoint::save(&path, &self.state, &self.learner, &self.corpus.tokenizer)?;
        let best_of = |path: &std::path::Path| checkpoint::read_state(path).ok()?.best.map(|best| best.step);
        let train = &self.recipe.train;
        self.folder.prune(train.keep, train.save_every, best_of)?;
        progress.event(&Event::Saved { step: self.state.step, path: &path });
        self.plot()
    }

    /// Draws `plot.svg` and writes `report.html` from the log.
    ///
    /// # Errors
    /// The system's.
    pub fn plot(&self) -> Result<()> {
        let name = self.folder.root().file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let records = MetricsLog::read(&self.folder.metrics())?;
        plot::write_plot(&self.folder.plot(), &name, &records)?;
        report::write_report(&self.folder.report(), &name, &self.recipe, &self.facts(), &records)
    }

    fn facts(&self) -> RunFacts {
        let count = self.learner.model.count_params();
        RunFacts {
            total_parameters: count.total,
            active_parameters: count.active,
            step: self.state.step,
            steps: self.recipe.train.steps,
            tokens_per_step: self.recipe.tokens_per_step(),
            experts: self.recipe.model.experts_per_token.zip(self.recipe.model.experts),
        }
    }

    /// The weights as they stand.
    pub fn model(&self) -> &Model {
        &self.learner.model
    }

    /// The optimiser's moments as they stand.
    pub fn optimizer(&self) -> &Optimizer {
        &self.learner.optimizer
    }

    /// Everything that learns.
    pub fn learner(&self) -> &Learner {
        &self.learner
    }

    /// Step, position in the data, best validation.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// The recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }
}

/// Adds to `sum` what each of `params` has in `addend`.
fn add_gradients(sum: &mut Gradients, addend: &Gradients, params: &[&Param]) {
    for param in params {
        if let Some(addend) = addend.get(param.id()) {
            let sum = sum.get_mut(param.id(), addend.len());
            sum.iter_mut().zip(addend).for_each(|(sum, addend)| *sum += addend);
        }
    }
}
