//! `moebius compare`: recipes against each other on the same tokens, over several seeds.

use std::process::ExitCode;

use anyhow::{Context, bail};
use moebius_train::compare::{Finished, Plan, compare, make};

use super::train::{STOP, interrupted};
use crate::arguments::CompareArguments;
use crate::display::{self, Display};
use crate::output;

/// Runs the command.
///
/// # Errors
/// Recipes that cannot be compared, whatever a run can fail at, a file that cannot be written.
pub fn execute(arguments: &CompareArguments) -> anyhow::Result<ExitCode> {
    let plan = Plan::new(&arguments.recipes, &arguments.seeds, &arguments.out)?;
    ctrlc::set_handler(interrupted).context("ctrl-C handler")?;
    let mut finished: Vec<Vec<Finished>> = vec![Vec::new(); plan.names.len()];
    for (number, run) in plan.runs.iter().enumerate() {
        let (side, name) = (run.recipe_idx, &plan.names[run.recipe_idx]);
        display::line(&format!("run {} of {}: {name}, seed {}", number + 1, plan.runs.len(), run.seed));
        let mut display = Display::new();
        let made = make(&plan, run, &STOP, &mut display);
        display.close();
        match made? {
            Some(run) => finished[side].push(run),
            None => {
                display::line("stopped; the same command goes on from here");
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
    let mut all = finished.iter().flatten();
    let first = all.next().context("no run")?;
    if let Some(other) = all.find(|other| other.corpus != first.corpus) {
        let (wanted, found) = (first.corpus, other.corpus);
        bail!("{}: the texts changed between runs: wanted tokens {wanted}, found {found}", arguments.out.display());
    }
    let found = compare(&plan.names, &plan.seeds, &finished);
    for (name, content) in [("compare.json", found.json()), ("compare.html", found.html())] {
        moebius_model::atomic_write(&arguments.out.join(name), content.as_bytes())?;
    }
    output::print(&if arguments.json { found.json() } else { found.text() })?;
    Ok(ExitCode::SUCCESS)
}
