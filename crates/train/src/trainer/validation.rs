//! What a run shows of itself: losses on held-back texts, the best weights, samples, the final model.

use super::Trainer;
use crate::checkpoint::{Best, Learner};
use crate::evaluate::{Evaluation, evaluate};
use crate::learn::LoadCounts;
use crate::metrics::{Record, SampleRecord, Score, ValidationRecord};
use crate::progress::{Event, Progress};
use crate::recipe::{Export, ExportDtype};
use crate::{Result, TrainError, files, model_folder};
use moebius_kernels::memory::release_pool;

impl Trainer {
    /// Measures the loss on the held-back texts, logs it, and keeps the weights, or their average, if none were better.
    ///
    /// # Errors
    /// The model's or the system's.
    pub fn validate(&mut self, progress: &mut dyn Progress) -> Result<ValidationRecord> {
        let mut load = LoadCounts::default();
        let score = self.score(None, &mut load)?;
        let mut sets = std::collections::BTreeMap::new();
        for name in self.corpus.eval.keys() {
            sets.insert(name.clone(), self.score(Some(name), &mut LoadCounts::default())?);
        }
        let average = match self.learner.average {
            Some(_) => Some(self.averaged(|trainer| trainer.score(None, &mut LoadCounts::default()))?),
            None => None,
        };
        let record = ValidationRecord { step: self.state.step, score, average, sets, load: load.statistics() };
        let (loss, averaged) = record.lowest();
        let is_best = self.state.best.is_none_or(|best| loss < best.loss);
        progress.event(&Event::Validation { record: &record, best: is_best });
        self.record(Record::Validation(record.clone()))?;
        if is_best {
            match averaged {
                true => self.averaged(|trainer| trainer.save_best())?,
                false => self.save_best()?,
            }
            self.state.best = Some(Best { step: self.state.step, loss, averaged });
            self.state.stale = 0;
        } else {
            self.state.stale += 1;
        }
        Ok(record)
    }

    /// The score on `data.valid`, or on one of `data.eval`.
    fn score(&self, name: Option<&str>, load: &mut LoadCounts) -> Result<Score> {
        let train = &self.recipe.train;
        let what = Evaluation {
            sequence_length: train.sequence_length,
            sequences: train.sequences,
            batches: train.validate_batches,
            precision: train.precision.into(),
            router_precision: train.router_precision.into(),
        };
        let tokens = name.map_or(&self.corpus.valid, |name| &self.corpus.eval[name]);
        evaluate(&self.learner.model, &self.corpus, tokens, &what, load)
    }

    /// Does something with the average of the weights in the place of the weights.
    fn averaged<T>(&mut self, then: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        self.swap_average();
        let result = then(self);
        self.swap_average();
        result
    }

    fn swap_average(&mut self) {
        let Learner { model, average, .. } = &mut self.learner;
        if let Some(average) = average {
            average.swap(model);
        }
    }

    fn save_best(&self) -> Result<()> {
        files::create_folder(&self.folder.best())?;
        let path = self.folder.best_model(self.state.step);
        model_folder::save(&path, &self.learner.model, &self.corpus.tokenizer, ExportDtype::F32)
    }

    /// Has the samples of this step written, if it is their time and there is somebody to write them.
    pub(super) fn write_samples(&mut self, progress: &mut dyn Progress) -> Result<()> {
        let (Some(settings), Some(writer)) = (&self.recipe.samples, &mut self.samples) else { return Ok(()) };
        if !self.state.step.is_multiple_of(settings.every) {
            return Ok(());
        }
        let mut written = Vec::new();
        for prompt in &settings.prompts {
            let text = writer
                .write(&self.learner.model, &self.corpus.tokenizer, prompt, settings)
                .map_err(|message| TrainError::Sample { prompt: prompt.clone(), message })?;
            written.push(SampleRecord { step: self.state.step, prompt: prompt.clone(), text });
        }
        for sample in written {
            progress.event(&Event::Sample(&sample));
            self.record(Record::Sample(sample))?;
        }
        Ok(())
    }

    /// Writes `model/`: the last weights, their average, or the best, as the recipe says.
    pub(super) fn export(&mut self, progress: &mut dyn Progress) -> Result<()> {
        // The steps are done: their memory serves for a second model beside the first.
        release_pool();
        let path = self.folder.model();
        let dtype = self.recipe.train.export_dtype;
        let best = self.state.best.filter(|_| self.recipe.train.export == Export::Best);
        let save =
            |trainer: &Self| model_folder::publish(&path, &trainer.learner.model, &trainer.corpus.tokenizer, dtype);
        let own_layout = match best {
            Some(best) if best.step == self.state.step && !best.averaged => save(self)?,
            Some(best) => {
                let model = model_folder::load(&self.folder.best_model(best.step))?;
                model_folder::publish(&path, &model, &self.corpus.tokenizer, dtype)?
            }
            None if self.recipe.train.export == Export::Average => self.averaged(save)?,
            None => save(self)?,
        };
        let step = best.map_or(self.state.step, |best| best.step);
        progress.event(&Event::Exported { step, path: &path, own_layout: own_layout.as_deref() });
        Ok(())
    }
}
