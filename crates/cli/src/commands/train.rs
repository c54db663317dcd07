//! `moebius train`: a run by recipe, its display, ctrl-C.

mod vision;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use moebius_train::trainer::Outcome;
use moebius_train::{Recipe, Start, Trainer};

use crate::arguments::TrainArguments;
use crate::display::{self, Display};
use crate::output;
use crate::samples::EngineWriter;

/// Set by ctrl-C; the trainer looks at it between steps.
static STOP: AtomicBool = AtomicBool::new(false);

/// The exit status of a process that ctrl-C ended at once.
const INTERRUPTED: i32 = 130;

/// Runs the command.
///
/// # Errors
/// A recipe that cannot be obeyed, texts or a folder that cannot be used, a full disk.
pub fn execute(arguments: &TrainArguments) -> anyhow::Result<ExitCode> {
    let start = match (arguments.resume, arguments.force) {
        (true, _) => Start::Resume,
        (_, true) => Start::Force,
        _ => Start::Fresh,
    };
    if vision::is_for(&arguments.recipe) {
        return vision::execute(arguments, start);
    }
    let recipe = Recipe::load(&arguments.recipe)?;
    ctrlc::set_handler(interrupted).context("ctrl-C handler")?;
    let precision = recipe.train.precision.into();
    let mut display = Display::new();
    let outcome = Trainer::prepare(recipe, &arguments.out, start, &mut display)
        .map(|trainer| trainer.with_samples(Box::new(EngineWriter::new(precision))))
        .and_then(|mut trainer| trainer.run(&STOP, &mut display));
    display.close();
    let outcome = outcome?;
    output::print(&format!("{}\n", summary(&outcome, arguments)))?;
    Ok(ExitCode::SUCCESS)
}

/// The last line: what there is now.
fn summary(outcome: &Outcome, arguments: &TrainArguments) -> String {
    let out = arguments.out.display();
    let best = match outcome.best {
        Some(best) => format!("; best validation loss {:.4} at step {}", best.loss, best.step),
        None => String::new(),
    };
    match outcome.finished {
        true if outcome.early => {
            format!(
                "ended after {} steps without improvement{best}; try: moebius run --model {out}/model",
                outcome.step
            )
        }
        true => format!("finished {} steps{best}; try: moebius run --model {out}/model", outcome.step),
        false => format!("stopped after step {}{best}; --resume goes on from there", outcome.step),
    }
}

/// The first ctrl-C asks for a checkpoint, the second does not wait for it.
fn interrupted() {
    if STOP.swap(true, Ordering::SeqCst) {
        std::process::exit(INTERRUPTED);
    }
    display::line("stopping after this step with a checkpoint; ctrl-C again stops at once without one");
}
