//! The run itself. A step is exactly what a language model's is ([`crate::trainer`]): micro-batches in the sampler's
//! order, gradients added in f32 in that order, multiplied once by `1 / accumulation` and the clipping factor.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use moebius_kernels::gemm::Precision;
use moebius_kernels::parallel::with_team;
use moebius_model::vision::VisionModel;
use moebius_moe::LoadStatistics;
use moebius_moe::routers::Decision;
use moebius_tensor::{Gradients, Graph};
use serde::{Deserialize, Serialize};

use super::checkpoint::{self, VisionState};
use super::data::{Dataset, Images};
use super::recipe::VisionRecipe;
use crate::data::sampler::WindowSampler;
use crate::metrics::LayerLoad;
use crate::optimizer::{Optimizer, StepSettings, clip_factor};
use crate::run_folder::{RunFolder, Start};
use crate::schedule::Schedule;
use crate::{Result, TrainError, files};

/// Images that go through the model at once when accuracy is measured.
const VALIDATION_IMAGES: usize = 256;

/// What one optimiser step gave; a line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VisionStep {
    /// The step, from 1.
    pub step: u64,
    /// Mean cross entropy of an image, in nats.
    pub loss: f64,
    /// The routers' own losses, weighted.
    pub auxiliary: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// The gradient's global norm before clipping.
    pub gradient_norm: f64,
    /// Seconds that the step took.
    pub seconds: f64,
    /// Load of the experts, routed block by routed block.
    pub load: Vec<LayerLoad>,
    /// Choices that found their expert full, routed block by routed block.
    pub dropped: Vec<u64>,
}

/// What a validation gave; a line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VisionValidation {
    /// The step after which it was made.
    pub step: u64,
    /// Mean cross entropy, in nats.
    pub loss: f64,
    /// Share of the images whose class scored highest.
    pub accuracy: f64,
    /// Images looked at.
    pub images: usize,
}

/// A line of `metrics.jsonl`.
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Record {
    Step(VisionStep),
    Validation(VisionValidation),
}

/// Something that happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum VisionEvent<'a> {
    /// The steps begin.
    Started {
        /// All parameters.
        parameters: usize,
        /// Images to learn from.
        train_images: usize,
        /// Images held back.
        valid_images: usize,
        /// Steps done already.
        step: u64,
    },
    /// A step is done.
    Step(&'a VisionStep),
    /// A validation is done.
    Validation(&'a VisionValidation),
}

/// How a call of [`VisionTrainer::run`] ended.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionOutcome {
    /// Whether all steps are done.
    pub finished: bool,
    /// Steps done.
    pub step: u64,
    /// The highest accuracy so far.
    pub best_accuracy: Option<f64>,
}

/// A run that is ready to take steps.
pub struct VisionTrainer {
    recipe: VisionRecipe,
    folder: RunFolder,
    dataset: Dataset,
    schedule: Schedule,
    model: VisionModel,
    optimizer: Optimizer,
    sampler: WindowSampler,
    state: VisionState,
    gradients: Gradients,
    addend: Gradients,
}

impl VisionTrainer {
    /// Checks everything, reads the images, makes or loads the weights; writes a first checkpoint.
    ///
    /// # Errors
    /// Whatever is wrong with the images, the folder or the checkpoint; a run in the way.
    pub fn prepare(recipe: VisionRecipe, out: &Path, start: Start) -> Result<Self> {
        let dataset = Dataset::load(&recipe)?;
        let folder = RunFolder::new(out);
        folder.make_ready(start)?;
        let (model, optimizer, state) = match start {
            Start::Resume => Self::resume(&recipe, &folder, &dataset)?,
            Start::Fresh | Start::Force => {
                let model = VisionModel::new(&recipe.model(&dataset), recipe.train.seed)?;
                let optimizer = Optimizer::new(&recipe.optimizer, recipe.train.precision.into(), &model.params());
                let state = VisionState::new(&recipe, dataset.digest());
                checkpoint::save(&folder.checkpoint(0), &state, &model, &optimizer)?;
                (model, optimizer, state)
            }
        };
        files::write_whole(&folder.recipe(), recipe.text().as_bytes())?;
        cut_log(&folder.metrics(), state.step)?;
        let sampler = WindowSampler::new(recipe.train.seed, dataset.train.len(), state.position);
        let schedule = Schedule::of_section(&recipe.optimizer, recipe.train.steps);
        let (gradients, addend) = (Gradients::new(), Gradients::new());
        Ok(Self { recipe, folder, dataset, schedule, model, optimizer, sampler, state, gradients, addend })
    }

    fn resume(
        recipe: &VisionRecipe,
        folder: &RunFolder,
        dataset: &Dataset,
    ) -> Result<(VisionModel, Optimizer, VisionState)> {
        let latest = folder.latest()?;
        let state = checkpoint::read_state(&latest)?;
        if let Some((key, was, now)) = state.recipe.difference(recipe) {
            return Err(TrainError::RecipeChanged { path: latest, key, was, now });
        }
        let refuse = |message: String| TrainError::Checkpoint { path: latest.clone(), message };
        if state.step > recipe.train.steps {
            let message = format!("wanted train.steps of at least {}, found {}", state.step, recipe.train.steps);
            return Err(refuse(message));
        }
        if state.data != dataset.digest() {
            return Err(refuse("the images have changed since the run began".to_owned()));
        }
        let (model, optimizer) = checkpoint::load(&latest, recipe)?;
        if model.config != recipe.model(dataset) {
            return Err(refuse(format!("wanted the recipe's model, found {:?}", model.config)));
        }
        Ok((model, optimizer, state.of(recipe)))
    }

    /// Takes the steps that are left, unless `stop` is set: then the step under way is finished and saved.
    ///
    /// # Errors
    /// A loss that is no number, a full disk; checkpoints written before stay usable.
    pub fn run(&mut self, stop: &AtomicBool, watch: &mut dyn FnMut(&VisionEvent<'_>)) -> Result<VisionOutcome> {
        let train = self.recipe.train.clone();
        watch(&VisionEvent::Started {
            parameters: self.model.params().iter().map(|param| param.n_elements()).sum(),
            train_images: self.dataset.train.len(),
            valid_images: self.dataset.valid.len(),
            step: self.state.step,
        });
        let path = self.folder.metrics();
        let mut log =
            OpenOptions::new().create(true).append(true).open(&path).map_err(TrainError::io("open", &path))?;
        let mut saved = self.state.step;
        while self.state.step < train.steps && !stop.load(Ordering::Relaxed) {
            let record = self.step()?;
            watch(&VisionEvent::Step(&record));
            append(&mut log, &path, &Record::Step(record))?;
            let due = |every: u64| self.state.step.is_multiple_of(every) || self.state.step == train.steps;
            let (validate, save) = (due(train.validate_every), due(train.save_every));
            if validate {
                let record = self.validate()?;
                let best = self.state.best_accuracy.map_or(record.accuracy, |best| best.max(record.accuracy));
                self.state.best_accuracy = Some(best);
                watch(&VisionEvent::Validation(&record));
                append(&mut log, &path, &Record::Validation(record))?;
            }
            if save {
                self.save()?;
                saved = self.state.step;
            }
        }
        if saved != self.state.step {
            self.save()?;
        }
        let finished = self.state.step >= train.steps;
        if finished {
            files::write_folder_whole(&self.folder.model(), |folder| Ok(self.model.save(folder)?))?;
        }
        Ok(VisionOutcome { finished, step: self.state.step, best_accuracy: self.state.best_accuracy })
    }

    fn save(&self) -> Result<()> {
        checkpoint::save(&self.folder.checkpoint(self.state.step), &self.state, &self.model, &self.optimizer)?;
        self.folder.prune(self.recipe.train.keep, u64::MAX, |_| None)
    }

    /// One optimiser step. Neither logs nor saves.
    ///
    /// # Errors
    /// The model's; a loss or gradient that is no number, before it reaches the weights.
    pub fn step(&mut self) -> Result<VisionStep> {
        let begun = Instant::now();
        let step = self.state.step + 1;
        let count = self.recipe.train.accumulation;
        let (mut load, mut dropped) = (Vec::new(), Vec::new());
        let (mut loss, mut auxiliary) = (0.0, 0.0);
        self.gradients.clear();
        for micro_batch in 0..count {
            let numbers: Vec<usize> = (0..self.recipe.train.images).map(|_| self.sampler.next_window()).collect();
            let (pixels, labels) = self.dataset.train.batch(numbers);
            let target = if micro_batch == 0 { &mut self.gradients } else { &mut self.addend };
            target.clear();
            // Each micro-batch of a run has noise of its own, the same again after a resumption.
            let seed = self.recipe.train.seed ^ (step * count as u64 + micro_batch as u64).rotate_left(32);
            let graph = Graph::training(self.recipe.train.precision.into());
            let losses = with_team(|| -> Result<_> {
                let losses = self.model.loss(&graph, &pixels, &labels, seed)?;
                graph.backward(&losses.total, target);
                Ok(losses)
            })?;
            loss += f64::from(losses.cross_entropy) / count as f64;
            auxiliary += f64::from(losses.auxiliary) / count as f64;
            add_counts(&losses.decisions, &mut load, &mut dropped);
            if micro_batch > 0 {
                for param in self.model.params() {
                    if let Some(addend) = self.addend.get(param.id()) {
                        let sum = self.gradients.get_mut(param.id(), addend.len());
                        sum.iter_mut().zip(addend).for_each(|(sum, addend)| *sum += addend);
                    }
                }
            }
        }
        let finite = |what: &'static str, value: f64| match value.is_finite() {
            true => Ok(value),
            false => Err(TrainError::Diverged { step, what, value }),
        };
        finite("loss", loss + auxiliary)?;
        let gradient_norm = finite("gradient norm", self.gradients.norm() / count as f64)?;
        let rate = self.schedule.rate(step);
        let gradient_scale = clip_factor(gradient_norm, self.recipe.optimizer.clip_norm) / count as f64;
        self.optimizer.step(self.model.params_mut(), &mut self.gradients, &StepSettings { step, rate, gradient_scale });
        let counts: Vec<Vec<u64>> = load.iter().map(|layer: &LoadStatistics| layer.counts.clone()).collect();
        self.model.after_step(&counts);
        self.state.step = step;
        self.state.images += (count * self.recipe.train.images) as u64;
        self.state.position = self.sampler.position();
        let load = load.iter().map(|layer| LayerLoad::new(layer, 0.0)).collect();
        let seconds = begun.elapsed().as_secs_f64();
        Ok(VisionStep { step, loss, auxiliary, learning_rate: rate, gradient_norm, seconds, load, dropped })
    }

    /// Loss and accuracy on all images held back.
    ///
    /// # Errors
    /// The model's.
    pub fn validate(&self) -> Result<VisionValidation> {
        let precision = self.recipe.train.precision.into();
        let (loss, accuracy) = measure(&self.model, &self.dataset.valid, precision)?;
        Ok(VisionValidation { step: self.state.step, loss, accuracy, images: self.dataset.valid.len() })
    }

    /// The model as it stands.
    pub fn model(&self) -> &VisionModel {
        &self.model
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.state.step
    }
}

/// Mean cross entropy in nats and the share of images whose class scores highest (the lower class on a tie).
fn measure(model: &VisionModel, images: &Images, precision: Precision) -> Result<(f64, f64)> {
    let (mut nats, mut right) = (0.0, 0_usize);
    for first in (0..images.len()).step_by(VALIDATION_IMAGES) {
        let (pixels, labels) = images.batch(first..(first + VALIDATION_IMAGES).min(images.len()));
        let graph = Graph::inference(precision);
        let scores = with_team(|| -> Result<_> {
            let (features, _) = model.forward(&graph, &pixels, 0)?;
            Ok(model.logits(&graph, &features)?)
        })?;
        for (row, &label) in scores.data().chunks_exact(model.config.classes).zip(&labels) {
            let best = (0..row.len()).fold(0, |best, class| if row[class] > row[best] { class } else { best });
            right += usize::from(best == label as usize);
            let top = f64::from(row[best]);
            let sum: f64 = row.iter().map(|&score| (f64::from(score) - top).exp()).sum();
            nats += top + sum.ln() - f64::from(row[label as usize]);
        }
    }
    Ok((nats / images.len() as f64, right as f64 / images.len() as f64))
}

fn add_counts(decisions: &[Decision], load: &mut Vec<LoadStatistics>, dropped: &mut Vec<u64>) {
    load.resize_with(decisions.len(), LoadStatistics::default);
    dropped.resize(decisions.len(), 0);
    for ((load, dropped), decision) in load.iter_mut().zip(dropped).zip(decisions) {
        load.add(&decision.plan);
        *dropped += decision.dropped as u64;
    }
}

/// Drops every record after `step`, and a torn last line.
fn cut_log(path: &Path, step: u64) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let text = std::fs::read_to_string(path).map_err(TrainError::io("read", path))?;
    let mut kept = String::new();
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let record: Record = serde_json::from_str(line).map_err(|error| TrainError::Data {
            what: path.display().to_string(),
            message: format!("wanted records of a vision run, found {error}"),
        })?;
        let at = match &record {
            Record::Step(record) => record.step,
            Record::Validation(record) => record.step,
        };
        if at <= step {
            kept.push_str(line);
        }
    }
    files::write_whole(path, kept.as_bytes())
}

fn append(log: &mut File, path: &Path, record: &Record) -> Result<()> {
    let mut line = serde_json::to_string(record).expect("records are plain data");
    line.push('\n');
    log.write_all(line.as_bytes()).map_err(TrainError::io("write", path))
}
