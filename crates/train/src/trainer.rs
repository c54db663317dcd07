//! The run itself: steps, validations, checkpoints, the final model.
//!
//! One step, exactly: the next `accumulation` micro-batches of `sequences` windows are taken from the sampler, in its
//! order. Each gives its mean loss and that loss's gradient. The gradients are added in the order of the micro-batches,
//! `((g1 + g2) + g3) ...`, in f32; the sum is multiplied once by `1 / accumulation` and by the clipping factor, inside
//! AdamW. So a step over A micro-batches has the bits of adding A separately computed gradients, and a step over the
//! same micro-batch twice has the bits of a step over it once.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use moebius_model::Model;
use moebius_tensor::{Gradients, Param};

use crate::checkpoint::{self, Best, TrainState};
use crate::data::corpus::{Corpus, windows};
use crate::data::sampler::{WindowSampler, count_windows};
use crate::evaluate::{Evaluation, evaluate};
use crate::learn::{self, LoadCounts, Losses};
use crate::metrics::{MetricsLog, Record, StepRecord, ValidationRecord};
use crate::model_folder;
use crate::optimizer::{Optimizer, StepSettings, clip_factor};
use crate::progress::{Event, Progress, RunFacts};
use crate::recipe::Export;
use crate::run_folder::{RunFolder, Start};
use crate::schedule::Schedule;
use crate::{Recipe, Result, TrainError, files, plot};

/// A run that is ready to take steps.
pub struct Trainer {
    recipe: Recipe,
    folder: RunFolder,
    corpus: Corpus,
    schedule: Schedule,
    model: Model,
    optimizer: Optimizer,
    sampler: WindowSampler,
    state: TrainState,
    gradients: Gradients,
    /// The gradient of one micro-batch after the first.
    addend: Gradients,
    log: MetricsLog,
}

/// How a call of [`Trainer::run`] ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Whether all steps are done; otherwise the stop flag was seen, and `--resume` goes on.
    pub finished: bool,
    /// Steps done.
    pub step: u64,
    /// The lowest validation loss so far.
    pub best: Option<Best>,
}

impl Trainer {
    /// Checks everything, makes or finds the tokens, makes or loads the weights; writes a first checkpoint.
    ///
    /// # Errors
    /// Whatever is wrong with the recipe, the texts, the folder or the checkpoint; a run in the way.
    pub fn prepare(recipe: Recipe, out: &Path, start: Start, progress: &mut dyn Progress) -> Result<Self> {
        let is_new = !out.exists();
        Self::prepare_in(RunFolder::new(out), recipe, start, progress).inspect_err(|_| {
            if is_new {
                // Only where it is empty: texts that were tokenised are worth keeping.
                let _ = std::fs::remove_dir(out.join("data"));
                let _ = std::fs::remove_dir(out);
            }
        })
    }

    fn prepare_in(folder: RunFolder, recipe: Recipe, start: Start, progress: &mut dyn Progress) -> Result<Self> {
        folder.make_ready(start)?;
        if start == Start::Resume {
            return Self::resume(recipe, folder, progress);
        }
        let corpus = Corpus::prepare(&recipe, &folder.data(), progress)?;
        progress.event(&Event::Preparing("making the weights"));
        let model = Model::new(&learn::model_config(&recipe, corpus.tokenizer.vocab_size()), recipe.train.seed)?;
        let optimizer = Optimizer::new(&recipe.optimizer, &model.params());
        let state = TrainState::new(&recipe, corpus.digest());
        // With a checkpoint before the first step, a run can be resumed whenever it is killed.
        checkpoint::save(&folder.checkpoint(0), &state, &model, &optimizer, &corpus.tokenizer)?;
        Self::assemble(recipe, folder, corpus, model, optimizer, state)
    }

    /// The run as its latest checkpoint left it.
    fn resume(recipe: Recipe, folder: RunFolder, progress: &mut dyn Progress) -> Result<Self> {
        let latest = folder.latest()?;
        let state = checkpoint::read_state(&latest)?;
        if let Some((key, was, now)) = state.recipe.difference(&recipe) {
            return Err(TrainError::RecipeChanged { path: latest, key, was, now });
        }
        let refuse = |message: String| TrainError::Checkpoint { path: latest.clone(), message };
        if state.step > recipe.train.steps {
            let wanted = format!("wanted train.steps of at least {}, found {}", state.step, recipe.train.steps);
            return Err(refuse(wanted));
        }
        let corpus = Corpus::prepare(&recipe, &folder.data(), progress)?;
        if corpus.digest() != state.corpus {
            return Err(refuse("the texts have changed since the run began: tokens differ".to_owned()));
        }
        progress.event(&Event::Preparing("loading the checkpoint"));
        let (model, optimizer) =
            checkpoint::load(&latest, &learn::model_config(&recipe, corpus.tokenizer.vocab_size()), &recipe)?;
        let state = TrainState { recipe: recipe.clone(), ..state };
        Self::assemble(recipe, folder, corpus, model, optimizer, state)
    }

    fn assemble(
        recipe: Recipe,
        folder: RunFolder,
        corpus: Corpus,
        model: Model,
        optimizer: Optimizer,
        state: TrainState,
    ) -> Result<Self> {
        let count = count_windows(corpus.train.len(), recipe.train.sequence_length);
        files::write_whole(&folder.recipe(), recipe.text().as_bytes())?;
        let sampler = WindowSampler::new(recipe.train.seed, count, state.position);
        let log = MetricsLog::open(&folder.metrics(), state.step)?;
        let schedule = Schedule::of(&recipe);
        let (gradients, addend) = (Gradients::new(), Gradients::new());
        Ok(Self { recipe, folder, corpus, schedule, model, optimizer, sampler, state, gradients, addend, log })
    }

    /// Takes the steps that are left, unless `stop` is set: then the step under way is finished and saved.
    ///
    /// # Errors
    /// A loss that is no number, a full disk; checkpoints written before stay usable.
    pub fn run(&mut self, stop: &AtomicBool, progress: &mut dyn Progress) -> Result<Outcome> {
        let steps = self.recipe.train.steps;
        progress.event(&Event::Started(&self.facts()));
        let mut saved = self.state.step;
        while self.state.step < steps && !stop.load(Ordering::Relaxed) {
            let record = self.step()?;
            progress.event(&Event::Step(&record));
            self.log.append(&Record::Step(record))?;
            let due = |every: u64| self.state.step.is_multiple_of(every) || self.state.step == steps;
            let (validate, save) = (due(self.recipe.train.validate_every), due(self.recipe.train.save_every));
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
        let finished = self.state.step >= steps;
        if finished {
            self.export(progress)?;
        }
        Ok(Outcome { finished, step: self.state.step, best: self.state.best })
    }

    /// One optimiser step, as the head of this file defines it. Neither logs nor saves.
    ///
    /// # Errors
    /// The model's; a loss or gradient that is no number, before it reaches the weights.
    pub fn step(&mut self) -> Result<StepRecord> {
        let begun = Instant::now();
        let step = self.state.step + 1;
        let count = self.recipe.train.accumulation as f64;
        let mut load = LoadCounts::default();
        let losses = self.accumulate(&mut load)?;
        let finite = |what: &'static str, value: f64| match value.is_finite() {
            true => Ok(value),
            false => Err(TrainError::Diverged { step, what, value }),
        };
        finite("loss", losses.cross_entropy + losses.balance + losses.z)?;
        let gradient_norm = finite("gradient norm", self.gradients.norm() / count)?;
        let rate = self.schedule.rate(step);
        let gradient_scale = clip_factor(gradient_norm, self.recipe.optimizer.clip_norm) / count;
        self.optimizer.step(self.model.params_mut(), &mut self.gradients, &StepSettings { step, rate, gradient_scale });
        self.state.step = step;
        self.state.tokens += self.recipe.tokens_per_step() as u64;
        self.state.position = self.sampler.position();
        Ok(StepRecord {
            step,
            loss: losses.cross_entropy,
            balance_loss: losses.balance,
            z_loss: losses.z,
            learning_rate: rate,
            gradient_norm,
            tokens: self.state.tokens,
            seconds: begun.elapsed().as_secs_f64(),
            load: load.statistics(),
        })
    }

    /// Leaves the sum of the micro-batches' gradients in `self.gradients`; returns their mean losses.
    fn accumulate(&mut self, load: &mut LoadCounts) -> Result<Losses> {
        let train = &self.recipe.train;
        let mut mean = Losses::default();
        self.gradients.clear();
        for micro_batch in 0..train.accumulation {
            let numbers = (0..train.sequences).map(|_| self.sampler.next_window()).collect::<Vec<_>>();
            let batch = windows(&self.corpus.train, train.sequence_length, numbers);
            let target = if micro_batch == 0 { &mut self.gradients } else { &mut self.addend };
            target.clear();
            let losses = learn::gradients(&self.model, &batch, &self.recipe, target, load)?;
            mean.add(&losses, 1.0 / train.accumulation as f64);
            if micro_batch > 0 {
                add_gradients(&mut self.gradients, &self.addend, &self.model.params());
            }
        }
        Ok(mean)
    }

    /// Measures the loss on the held-back text, logs it, and keeps the weights if none were better.
    ///
    /// # Errors
    /// The model's or the system's.
    pub fn validate(&mut self, progress: &mut dyn Progress) -> Result<ValidationRecord> {
        let train = &self.recipe.train;
        let what = Evaluation {
            sequence_length: train.sequence_length,
            sequences: train.sequences,
            batches: train.validate_batches,
            precision: train.precision.into(),
        };
        let record = evaluate(&self.model, &self.corpus, &what, self.state.step)?;
        let best = self.state.best.is_none_or(|best| record.loss < best.loss);
        progress.event(&Event::Validation { record: &record, best });
        self.log.append(&Record::Validation(record.clone()))?;
        if best {
            let path = self.folder.best_model(self.state.step);
            files::create_folder(&self.folder.best())?;
            model_folder::save(&path, &self.model, &self.corpus.tokenizer, Default::default())?;
            self.state.best = Some(Best { step: self.state.step, loss: record.loss });
        }
        Ok(record)
    }

    /// Writes a checkpoint and the plot, and deletes what is no longer wanted.
    ///
    /// # Errors
    /// The system's; the checkpoints before stay as they were.
    pub fn save(&mut self, progress: &mut dyn Progress) -> Result<()> {
        self.log.sync()?;
        let path = self.folder.checkpoint(self.state.step);
        checkpoint::save(&path, &self.state, &self.model, &self.optimizer, &self.corpus.tokenizer)?;
        let best_of = |path: &Path| checkpoint::read_state(path).ok()?.best.map(|best| best.step);
        self.folder.prune(self.recipe.train.keep, best_of)?;
        progress.event(&Event::Saved { step: self.state.step, path: &path });
        self.plot()
    }

    /// Draws `plot.svg` from the log.
    ///
    /// # Errors
    /// The system's.
    pub fn plot(&self) -> Result<()> {
        let name = self.folder.root().file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        plot::write_plot(&self.folder.plot(), &name, &MetricsLog::read(&self.folder.metrics())?)
    }

    /// Writes `model/`: the last weights or the best, as the recipe says.
    fn export(&self, progress: &mut dyn Progress) -> Result<()> {
        let path = self.folder.model();
        let dtype = self.recipe.train.export_dtype;
        let best =
            self.state.best.filter(|best| self.recipe.train.export == Export::Best && best.step != self.state.step);
        let step = best.map_or(self.state.step, |best| best.step);
        match best {
            Some(best) => {
                let model = model_folder::load(&self.folder.best_model(best.step))?;
                model_folder::save(&path, &model, &self.corpus.tokenizer, dtype)?;
            }
            None => model_folder::save(&path, &self.model, &self.corpus.tokenizer, dtype)?,
        }
        progress.event(&Event::Exported { step, path: &path });
        Ok(())
    }

    fn facts(&self) -> RunFacts {
        let count = self.model.count_params();
        RunFacts {
            total_parameters: count.total,
            active_parameters: count.active,
            step: self.state.step,
            steps: self.recipe.train.steps,
            tokens_per_step: self.recipe.tokens_per_step(),
        }
    }

    /// The weights as they stand.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The optimiser's moments as they stand.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
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
