//! `moebius train` with a recipe that has a `[vision]` section.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use moebius_train::Start;
use moebius_train::vision::recipe::is_vision;
use moebius_train::vision::{VisionEvent, VisionRecipe, VisionTrainer};

use super::{STOP, interrupted};
use crate::arguments::TrainArguments;
use crate::{display, output};

/// Lines about steps come at least so far apart.
const BETWEEN_LINES: Duration = Duration::from_secs(5);

/// Whether a recipe is a vision model's. A file that cannot be read is nobody's: whoever reads it next says so.
pub(super) fn is_for(recipe: &Path) -> bool {
    std::fs::read_to_string(recipe).is_ok_and(|text| is_vision(&text))
}

/// Runs the command.
pub(super) fn execute(arguments: &TrainArguments, start: Start) -> anyhow::Result<ExitCode> {
    let recipe = VisionRecipe::load(&arguments.recipe)?;
    let steps = recipe.train.steps;
    ctrlc::set_handler(interrupted).context("ctrl-C handler")?;
    let mut trainer = VisionTrainer::prepare(recipe, &arguments.out, start)?;
    let mut last_line = Instant::now();
    let outcome = trainer.run(&STOP, &mut |event| match event {
        VisionEvent::Started { parameters, train_images, valid_images, step } => display::line(&format!(
            "{train_images} images to learn from, {valid_images} held back; model: {parameters} parameters; after step \
             {step} of {steps}"
        )),
        VisionEvent::Step(record) if last_line.elapsed() >= BETWEEN_LINES => {
            last_line = Instant::now();
            let dropped: u64 = record.dropped.iter().sum();
            let dropped = if dropped > 0 { format!("  {dropped} choices dropped") } else { String::new() };
            let ms = 1e3 * record.seconds;
            display::line(&format!("step {}/{steps}  loss {:.4}  {ms:.0} ms{dropped}", record.step, record.loss));
        }
        VisionEvent::Validation(record) => display::line(&format!(
            "step {}: validation loss {:.4}, accuracy {:.2} % of {} images",
            record.step,
            record.loss,
            1e2 * record.accuracy,
            record.images
        )),
        _ => {}
    })?;
    let best = outcome.best_accuracy.map_or(String::new(), |best| format!("; best accuracy {:.2} %", 1e2 * best));
    let out = arguments.out.display();
    output::print(&match outcome.finished {
        true => format!("finished {} steps{best}; the model is in {out}/model\n", outcome.step),
        false => format!("stopped after step {}{best}; --resume goes on from there\n", outcome.step),
    })?;
    Ok(ExitCode::SUCCESS)
}
