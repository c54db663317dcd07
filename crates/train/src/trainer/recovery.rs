//! What is done about a loss spike: it is named, and if the recipe wants it the run goes back to its last checkpoint and
//! skips the data that led there.
//!
//! A rollback loads weights, optimiser and counters of the checkpoint, but leaves the sampler behind the spike's batch.
//! Nothing is written but a line of the log: a run that is killed afterwards comes by the same spike again and does the
//! same about it.

use super::{Computed, Trainer};
use crate::checkpoint;
use crate::metrics::{MetricsLog, Record};
use crate::progress::{Event, Progress};
use crate::recipe::SpikeAction;
use crate::spikes::{self, SpikeRecord};
use crate::{Result, TrainError, learn};

impl Trainer {
    /// The spike of the step that was computed, if it is one.
    pub(super) fn spike(&self, computed: &Computed) -> Option<SpikeRecord> {
        let (losses, step) = (&computed.losses, self.state.step + 1);
        let recent = &self.state.watch.losses;
        let mut spike = spikes::find(recent, step, losses.cross_entropy, computed.gradient_norm, &self.recipe.spikes);
        // The loss itself may be sound and its routing losses not.
        if spike.is_none() && !(losses.balance + losses.z + losses.method).is_finite() {
            spike = spikes::find(recent, step, f64::NAN, computed.gradient_norm, &self.recipe.spikes);
        }
        spike
    }

    /// Deals with a spike; whether its step is taken nevertheless.
    ///
    /// # Errors
    /// A value that is no number without rollbacks, or more rollbacks than allowed.
    pub(super) fn pass(
        &mut self,
        spike: SpikeRecord,
        computed: &Computed,
        progress: &mut dyn Progress,
    ) -> Result<bool> {
        let settings = &self.recipe.spikes;
        if settings.action == SpikeAction::Log {
            self.check_finite(computed)?;
            progress.event(&Event::Spike(&spike));
            self.log.append(&Record::Spike(spike))?;
            return Ok(true);
        }
        let rollbacks = self.state.watch.rollbacks;
        if rollbacks >= settings.rollbacks {
            return Err(TrainError::Spikes { step: spike.step, rollbacks });
        }
        self.roll_back(spike, progress)?;
        Ok(false)
    }

    /// Loads the last checkpoint, but keeps the place in the data.
    fn roll_back(&mut self, spike: SpikeRecord, progress: &mut dyn Progress) -> Result<()> {
        // Not one that an interruption left: an unbroken run would not have it.
        let latest = self.folder.latest_regular(self.recipe.train.save_every)?;
        let mut state = checkpoint::read_state(&latest)?;
        let config = learn::model_config(&self.recipe, self.corpus.tokenizer.vocab_size());
        self.learner = checkpoint::load(&latest, &config, &self.recipe)?;
        state.recipe = self.recipe.clone();
        state.positions = vec![self.sampler.position()];
        let rollbacks = self.state.watch.rollbacks;
        state.watch.rollbacks = rollbacks + 1;
        self.state = state;
        let spike = SpikeRecord { back_to: Some(self.state.step), ..spike };
        progress.event(&Event::Spike(&spike));
        self.log = MetricsLog::open(&self.folder.metrics(), self.state.step, rollbacks)?;
        self.log.append(&Record::Spike(spike))
    }
}
