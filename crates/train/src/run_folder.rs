//! Where a run keeps what, and whether a folder holds one.
//!
//! | path | content |
//! |---|---|
//! | `recipe.toml` | the recipe as it was given |
//! | `data/` | tokenizer and token shards, found again by later starts |
//! | `checkpoints/step-N/` | everything that resuming after step N needs |
//! | `best/step-N/` | the weights of the lowest validation loss |
//! | `metrics.jsonl`, `plot.svg`, `report.html` | the record of the run, its picture and its page |
//! | `tensorboard/` | the record as TensorBoard reads it |
//! | `model/` | the trained model, a Hugging Face folder |

use std::path::{Path, PathBuf};

use crate::{Result, TrainError, files};

/// A run's folder.
#[derive(Clone, Debug)]
pub struct RunFolder {
    root: PathBuf,
}

/// What to do with a folder that may hold a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Begin; refuse if a run is there.
    Fresh,
    /// Begin; delete the run that is there.
    Force,
    /// Go on from the latest checkpoint; refuse if there is none.
    Resume,
}

impl RunFolder {
    /// The run in `root`.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_path_buf() }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Tokenizer and shards.
    pub fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    /// The recipe as it was given.
    pub fn recipe(&self) -> PathBuf {
        self.root.join("recipe.toml")
    }

    /// The folder of all checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The checkpoint after `step`.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.checkpoints().join(format!("step-{step}"))
    }

    /// The folder of the best weights.
    pub fn best(&self) -> PathBuf {
        self.root.join("best")
    }

    /// The best weights, if they were those after `step`.
    pub fn best_model(&self, step: u64) -> PathBuf {
        self.best().join(format!("step-{step}"))
    }

    /// The record of the run.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// Its picture.
    pub fn plot(&self) -> PathBuf {
        self.root.join("plot.svg")
    }

    /// Its page.
    pub fn report(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// The folder that TensorBoard is pointed at.
    pub fn tensorboard(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// The trained model.
    pub fn model(&self) -> PathBuf {
        self.root.join("model")
    }

    /// The steps of all checkpoints, rising.
    ///
    /// # Errors
    /// The system's.
    pub fn steps(&self) -> Result<Vec<u64>> {
        steps_in(&self.checkpoints())
    }

    /// The latest checkpoint.
    ///
    /// # Errors
    /// None there, or the system's.
    pub fn latest(&self) -> Result<PathBuf> {
        let step = self.steps()?.last().copied().ok_or_else(|| TrainError::NothingToResume {
            path: self.root.clone(),
            message: "no checkpoint there".to_owned(),
        })?;
        Ok(self.checkpoint(step))
    }

    /// The latest checkpoint at a multiple of `every` steps: one that a run has whether or not it was interrupted.
    ///
    /// # Errors
    /// None there, or the system's.
    pub fn latest_regular(&self, every: u64) -> Result<PathBuf> {
        let steps = self.steps()?;
        let regular = steps.into_iter().rfind(|step| step.is_multiple_of(every));
        let step = regular.ok_or_else(|| TrainError::NothingToResume {
            path: self.root.clone(),
            message: "no checkpoint to go back to".to_owned(),
        })?;
        Ok(self.checkpoint(step))
    }

    /// Makes the folder ready for a start; afterwards it holds a run only if `start` is [`Start::Resume`].
    ///
    /// # Errors
    /// A run in the way, or none to resume, or the system's.
    pub fn make_ready(&self, start: Start) -> Result<()> {
        for folder in [self.root.clone(), self.checkpoints(), self.best()] {
            if start == Start::Resume || folder.exists() {
                files::sweep(&folder)?;
            }
        }
        let folders = [self.checkpoints(), self.best(), self.model(), self.tensorboard()];
        let parts = [&folders[..], &[self.metrics(), self.plot(), self.report(), self.recipe()]].concat();
        match start {
            Start::Resume => self.latest().map(drop),
            Start::Fresh if self.metrics().exists() || self.model().exists() || !self.steps()?.is_empty() => {
                let step = self.steps()?.last().copied().unwrap_or(0);
                Err(TrainError::RunExists { path: self.root.clone(), step })
            }
            // A start that was killed before its first checkpoint left nothing worth keeping.
            Start::Fresh | Start::Force => {
                // Only what a run makes is deleted; whatever else lies in the folder stays.
                for part in parts.iter().filter(|part| part.exists()) {
                    if part.is_dir() {
                        files::remove_folder(part)?;
                    } else {
                        std::fs::remove_file(part).map_err(TrainError::io("delete", part))?;
                    }
                }
                Ok(())
            }
        }
    }

    /// Deletes all checkpoints but the last `keep` and the last at a multiple of `every` steps, and best weights that neither `best` nor a kept checkpoint names.
    ///
    /// # Errors
    /// The system's.
    pub fn prune(&self, keep: usize, every: u64, wanted_best: impl Fn(&Path) -> Option<u64>) -> Result<()> {
        let steps = self.steps()?;
        let regular = steps.iter().rfind(|step| step.is_multiple_of(every)).copied();
        let first_kept = steps.len().saturating_sub(keep);
        let is_kept = |at: usize| at >= first_kept || regular == Some(steps[at]);
        let (kept, old) = (0..steps.len()).partition::<Vec<_>, _>(|&at| is_kept(at));
        let (kept, old) = (kept.into_iter().map(|at| steps[at]), old.into_iter().map(|at| steps[at]));
        for step in old {
            files::remove_folder(&self.checkpoint(step))?;
        }
        let wanted = kept.filter_map(|step| wanted_best(&self.checkpoint(step))).collect::<Vec<_>>();
        for step in steps_in(&self.best())?.into_iter().filter(|step| !wanted.contains(step)) {
            files::remove_folder(&self.best_model(step))?;
        }
        Ok(())
    }
}

/// The numbers N of the folders `step-N` in `folder`, rising.
fn steps_in(folder: &Path) -> Result<Vec<u64>> {
    let paths = files::entries(folder)?;
    let names = paths.iter().filter_map(|path| path.file_name()?.to_str()?.strip_prefix("step-"));
    let mut steps = names.filter_map(|digits| digits.parse().ok()).collect::<Vec<u64>>();
    steps.sort_unstable();
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(steps: &[u64], best: &[u64]) -> (tempfile::TempDir, RunFolder) {
        let root = tempfile::tempdir().unwrap();
        let run = RunFolder::new(root.path());
        steps.iter().for_each(|&step| files::create_folder(&run.checkpoint(step)).unwrap());
        best.iter().for_each(|&step| files::create_folder(&run.best_model(step)).unwrap());
        (root, run)
    }

    #[test]
    fn the_latest_is_the_highest_whole_one() {
        let (_root, run) = folder_with(&[9, 10, 100], &[]);
        files::create_folder(&run.checkpoints().join("step-200.unfinished")).unwrap();
        files::create_folder(&run.checkpoints().join("notes")).unwrap();
        assert_eq!(run.latest().unwrap(), run.checkpoint(100));
        run.make_ready(Start::Resume).unwrap();
        assert_eq!(run.steps().unwrap(), [9, 10, 100]);
        assert!(!run.checkpoints().join("step-200.unfinished").exists());
    }

    #[test]
    fn pruning_keeps_what_a_kept_checkpoint_names() {
        let (_root, run) = folder_with(&[10, 20, 30], &[5, 15, 25]);
        run.prune(2, 10, |path| Some(if path.ends_with("step-20") { 15 } else { 25 })).unwrap();
        assert_eq!(run.steps().unwrap(), [20, 30]);
        assert_eq!(steps_in(&run.best()).unwrap(), [15, 25]);
    }

    /// An interruption leaves a checkpoint out of turn; the last one in turn stays, for rollbacks to find.
    #[test]
    fn pruning_keeps_the_last_regular_one() {
        let (_root, run) = folder_with(&[10, 20, 23], &[]);
        run.prune(1, 10, |_| None).unwrap();
        assert_eq!(run.steps().unwrap(), [20, 23]);
        assert_eq!(run.latest_regular(10).unwrap(), run.checkpoint(20));
    }

    #[test]
    fn a_run_is_not_overwritten_unasked() {
        let (root, run) = folder_with(&[10], &[]);
        std::fs::write(root.path().join("mine.txt"), "x").unwrap();
        let error = run.make_ready(Start::Fresh).unwrap_err().to_string();
        assert!(
            error.ends_with("already holds a run (at step 10); use --resume to go on, --force to start anew"),
            "{error}"
        );
        run.make_ready(Start::Force).unwrap();
        assert!(!run.checkpoints().exists() && root.path().join("mine.txt").exists());
        run.make_ready(Start::Fresh).unwrap();
        let error = run.make_ready(Start::Resume).unwrap_err().to_string();
        assert!(error.ends_with("nothing to resume: no checkpoint there"), "{error}");
    }
}
