//! Making the runs of a comparison.

use std::sync::atomic::AtomicBool;

use moebius_model::Model;
use serde::{Deserialize, Serialize};

use super::plan::{Plan, PlannedRun};
use crate::digest::Digest;
use crate::metrics::{MetricsLog, Record};
use crate::progress::Progress;
use crate::run_folder::{RunFolder, Start};
use crate::{Recipe, Result, TrainError, Trainer, files};

/// What a finished run leaves beside its folder's usual content: `compared.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Finished {
    /// All parameters.
    pub total_parameters: usize,
    /// Parameters that one token uses.
    pub active_parameters: usize,
    /// Multiplications and additions that learning from one token takes.
    pub flops_per_token: f64,
    /// Tokens of one step.
    pub tokens_per_step: usize,
    /// Fingerprint of the tokens.
    pub corpus: Digest,
    /// Validations, in the order of steps.
    pub points: Vec<Point>,
}

/// A validation and what had been spent by then.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Steps.
    pub step: f64,
    /// Multiplications and additions.
    pub flops: f64,
    /// Seconds in steps, undisturbed: steps times what a step takes when nothing else runs.
    pub seconds: f64,
    /// Validation loss, in nats a token.
    pub loss: f64,
}

/// Makes a run, goes on with it, or finds it; `None` if it was stopped.
///
/// # Errors
/// The trainer's; a run that was made from other texts.
pub fn make(plan: &Plan, run: &PlannedRun, stop: &AtomicBool, progress: &mut dyn Progress) -> Result<Option<Finished>> {
    if let Some(finished) = find(run)? {
        return Ok(Some(finished));
    }
    let is_begun = !RunFolder::new(&run.folder).steps()?.is_empty();
    let start = if is_begun { Start::Resume } else { Start::Fresh };
    let mut trainer = Trainer::prepare_with_data(run.recipe.clone(), &run.folder, &plan.data(), start, progress)?;
    if !trainer.run(stop, progress)?.finished {
        return Ok(None);
    }
    let records = MetricsLog::read(&RunFolder::new(&run.folder).metrics())?;
    let flops_per_token = flops_per_token(trainer.model(), &run.recipe);
    let count = trainer.model().count_params();
    let tokens_per_step = run.recipe.tokens_per_step();
    let finished = Finished {
        total_parameters: count.total,
        active_parameters: count.active,
        flops_per_token,
        tokens_per_step,
        corpus: trainer.state().corpus,
        points: points(&records, flops_per_token * tokens_per_step as f64),
    };
    let json = serde_json::to_string_pretty(&finished).expect("plain data");
    files::write_whole(&run.folder.join("compared.json"), format!("{json}\n").as_bytes())?;
    Ok(Some(finished))
}

/// A run that is there and whole.
///
/// # Errors
/// The system's, or a file that is not ours.
pub fn find(run: &PlannedRun) -> Result<Option<Finished>> {
    let path = run.folder.join("compared.json");
    let bytes = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(TrainError::io("read", &path))?,
    };
    let refuse = |error: serde_json::Error| TrainError::Data {
        what: path.display().to_string(),
        message: format!("wanted what `compare` wrote, found {error}: delete the folder to make the run anew"),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(refuse)
}

fn points(records: &[Record], flops_per_step: f64) -> Vec<Point> {
    let seconds_per_step = seconds_per_step(records);
    let point = |record: &Record| {
        let Record::Validation(validation) = record else { return None };
        let step = validation.step as f64;
        Some(Point {
            step,
            flops: step * flops_per_step,
            seconds: step * seconds_per_step,
            loss: validation.score.loss,
        })
    };
    records.iter().filter_map(point).collect()
}

/// What a step takes: the time that a fourth of the steps stay under. Other programs, a stopped process or a machine that
/// slept only ever add, and must not decide which recipe is the faster.
fn seconds_per_step(records: &[Record]) -> f64 {
    let seconds = |record: &Record| if let Record::Step(step) = record { Some(step.seconds) } else { None };
    let mut seconds: Vec<f64> = records.iter().filter_map(seconds).collect();
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 4).copied().unwrap_or(0.0)
}

/// Multiplications and additions of forward and backward for one token: two a weight that takes part, three times over
/// (Kaplan et al. 2020), and those of attention on half a sequence, the mean of what a token sees.
///
/// Looking an embedding up costs nothing; a tied one is the head and counts as that. A layer that some tokens go around
/// counts for its share of them, which see each other alone.
fn flops_per_token(model: &Model, recipe: &Recipe) -> f64 {
    let chosen = recipe.model.experts_per_token.unwrap_or(1);
    let share = |layer: usize| model.config.depths.filter(|depths| depths.applies(layer)).map_or(1.0, |d| d.share);
    let mut forward = 0.0;
    for param in model.params() {
        let elements = param.n_elements() as f64;
        let layer = param.name().strip_prefix("layers.").and_then(|name| name.split('.').next()?.parse().ok());
        let share = layer.filter(|_| !param.name().contains(".depth_")).map_or(1.0, &share);
        forward += share
            * match *param.shape() {
                _ if param.name() == "embedding" && !recipe.model.tied_embeddings => 0.0,
                [experts, ..] if param.shape().len() == 3 => 2.0 * elements * chosen as f64 / experts as f64,
                [_, _] => 2.0 * elements,
                _ => 0.0,
            };
    }
    for share in (0..recipe.model.layers).map(&share) {
        let seen = (share * recipe.train.sequence_length as f64 + 1.0) / 2.0;
        forward += share * 4.0 * recipe.model.hidden as f64 * seen;
    }
    3.0 * forward
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::learn;
    use crate::metrics::tests::{step, validation};

    #[test]
    fn flops_on_paper() {
        let count = |text: &str| {
            let text = format!(
                "[model]\n{text}\n[tokenizer]\nvocab_size = 300\n[data]\ntrain = ['a']\nvalid = ['b']\n[train]\nsteps = 9\n\
                 [optimizer]\nlearning_rate = 1e-3\n"
            );
            let recipe = Recipe::parse("x.toml", Path::new(""), &text).unwrap();
            flops_per_token(&Model::new(&learn::model_config(&recipe, 300), 1).unwrap(), &recipe)
        };
        let shape = "hidden = 8\nlayers = 2\nheads = 2\nffn = 16\ncontext = 31";
        // Two layers of q, k, v, o and three matrices, the head; attention on 16 tokens in the mean.
        let layers = 2.0 * (4.0 * 64.0 + 3.0 * 128.0);
        let wanted = 3.0 * (2.0 * (layers + 300.0 * 8.0) + 2.0 * 4.0 * 8.0 * 16.0);
        assert_eq!(count(shape), wanted);
        assert_eq!(count(&format!("{shape}\ntied_embeddings = true")), wanted);
        // Two of four experts of half the width: the same, and the router.
        let sparse = shape.replace("ffn = 16", "ffn = 8\nexperts = 4\nexperts_per_token = 2");
        assert_eq!(count(&sparse), wanted + 3.0 * 2.0 * 2.0 * 4.0 * 8.0);
        // An eighth of 32 tokens go through the second layer and see 2.5 in the mean; its router is new.
        let around = count(&format!("{}2\n[depths]\nshare = 0.125", shape.replace("context = 31", "context = 3")));
        let whole = 2.0 * (4.0 * 64.0 + 3.0 * 128.0) + 4.0 * 8.0 * 16.5;
        let part = (2.0 * (4.0 * 64.0 + 3.0 * 128.0) + 4.0 * 8.0 * 2.5) / 8.0;
        assert_eq!(around, 3.0 * (whole + part + 2.0 * 8.0 + 2.0 * 300.0 * 8.0));
    }

    #[test]
    fn points_count_what_was_spent() {
        let steps = [0.25, 0.5, 9.0, 0.75].into_iter().enumerate();
        let mut records: Vec<Record> = steps
            .map(|(at, seconds)| match step(at as u64 + 1, 4.0) {
                Record::Step(step) => Record::Step(crate::metrics::StepRecord { seconds, ..step }),
                other => other,
            })
            .collect();
        records.insert(2, validation(2, 3.5));
        records.push(validation(4, 2.5));
        // The third step was disturbed; three of four take half a second or less time than that allows.
        let wanted = [(2.0, 200.0, 1.0, 3.5), (4.0, 400.0, 2.0, 2.5)];
        assert_eq!(
            points(&records, 100.0),
            wanted.map(|(step, flops, seconds, loss)| Point { step, flops, seconds, loss })
        );
        assert_eq!(points(&[], 1.0), []);
    }
}
