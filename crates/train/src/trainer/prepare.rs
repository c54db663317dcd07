//! How a run begins: anew, or where its latest checkpoint stands.

use std::path::Path;

use moebius_kernels::memory::release_pool;
use moebius_model::Model;
use moebius_tensor::Gradients;

use super::Trainer;
use crate::checkpoint::{self, Learner, TrainState};
use crate::data::corpus::Corpus;
use crate::data::sampler::{MixedSampler, count_windows};
use crate::metrics::MetricsLog;
use crate::progress::{Event, Progress};
use crate::run_folder::{RunFolder, Start};
use crate::schedule::Schedule;
use crate::{Recipe, Result, TrainError, files, hash_tables, learn};

impl Trainer {
    /// Checks everything, makes or finds the tokens, makes or loads the weights; writes a first checkpoint.
    ///
    /// # Errors
    /// Whatever is wrong with the recipe, the texts, the folder or the checkpoint; a run in the way.
    pub fn prepare(recipe: Recipe, out: &Path, start: Start, progress: &mut dyn Progress) -> Result<Self> {
        Self::prepare_with_data(recipe, out, &out.join("data"), start, progress)
    }

    /// As [`Trainer::prepare`], with the tokens in a folder that several runs may share.
    ///
    /// # Errors
    /// As [`Trainer::prepare`].
    pub fn prepare_with_data(
        recipe: Recipe,
        out: &Path,
        data: &Path,
        start: Start,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        let is_new = !out.exists();
        Self::prepare_in(RunFolder::new(out), data, recipe, start, progress).inspect_err(|_| {
            if is_new {
                // Only where it is empty: texts that were tokenised are worth keeping.
                let _ = std::fs::remove_dir(out.join("data"));
                let _ = std::fs::remove_dir(out);
            }
        })
    }

    fn prepare_in(
        folder: RunFolder,
        data: &Path,
        recipe: Recipe,
        start: Start,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        folder.make_ready(start)?;
        if start == Start::Resume {
            return Self::resume(recipe, folder, data, progress);
        }
        let corpus = Corpus::prepare(&recipe, data, progress)?;
        progress.event(&Event::Preparing("making the weights"));
        let mut model = Model::new(&learn::model_config(&recipe, corpus.tokenizer.vocab_size()), recipe.train.seed)?;
        hash_tables::fill(&mut model, &recipe, &corpus)?;
        let learner = Learner::new(model, &recipe);
        let state = TrainState::new(&recipe, corpus.digest());
        // With a checkpoint before the first step, a run can be resumed whenever it is killed.
        checkpoint::save(&folder.checkpoint(0), &state, &learner, &corpus.tokenizer)?;
        Self::assemble(recipe, folder, corpus, learner, state)
    }

    /// The run as its latest checkpoint left it.
    fn resume(recipe: Recipe, folder: RunFolder, data: &Path, progress: &mut dyn Progress) -> Result<Self> {
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
        let corpus = Corpus::prepare(&recipe, data, progress)?;
        if corpus.digest() != state.corpus {
            return Err(refuse("the texts have changed since the run began: tokens differ".to_owned()));
        }
        progress.event(&Event::Preparing("loading the checkpoint"));
        let learner = checkpoint::load(&latest, &learn::model_config(&recipe, corpus.tokenizer.vocab_size()), &recipe)?;
        let state = TrainState { recipe: recipe.clone(), ..state };
        Self::assemble(recipe, folder, corpus, learner, state)
    }

    fn assemble(
        recipe: Recipe,
        folder: RunFolder,
        corpus: Corpus,
        learner: Learner,
        state: TrainState,
    ) -> Result<Self> {
        let length = recipe.train.sequence_length;
        let weights = recipe.data.train.iter().map(|source| source.weight.unwrap_or(1.0));
        let streams =
            corpus.train.iter().zip(weights).map(|(shard, weight)| (count_windows(shard.len(), length), weight));
        let sampler = MixedSampler::new(recipe.train.seed, &streams.collect::<Vec<_>>(), &state.positions);
        files::write_whole(&folder.recipe(), recipe.text().as_bytes())?;
        let log = MetricsLog::open(&folder.metrics(), state.step, state.watch.rollbacks)?;
        let schedule = Schedule::of(&recipe);
        // What making the weights took is of other sizes than what the steps will need.
        release_pool();
        let (gradients, addend) = (Gradients::new(), Gradients::new());
        let (events, samples) = (None, None);
        let mut trainer =
            Self { recipe, folder, corpus, schedule, learner, sampler, state, gradients, addend, log, events, samples };
        trainer.open_events()?;
        Ok(trainer)
    }
}
