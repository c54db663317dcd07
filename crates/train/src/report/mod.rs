//! `report.html`: a run on one page that needs nothing else, in light and dark.
//!
//! It says what `metrics.jsonl` says, and nothing that is not there: the same log gives the same page.

pub mod chart;

use std::fmt::Write;
use std::path::Path;

use crate::metrics::{LayerLoad, Record, SampleRecord, StepRecord, ValidationRecord};
use crate::progress::RunFacts;
use crate::{Recipe, Result, files};
use chart::{Chart, Line, escape, number};

/// A page's style: its colours are also the charts'.
const STYLE: &str = include_str!("page.css");

/// Writes the page of a run.
///
/// # Errors
/// The system's; nothing half-written stays.
pub fn write_report(path: &Path, title: &str, recipe: &Recipe, facts: &RunFacts, records: &[Record]) -> Result<()> {
    files::write_whole(path, run_page(title, recipe, facts, records).as_bytes())
}

/// A page around a body.
pub fn page(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{}</title><style>\n{STYLE}</style></head><body>\n{body}</body></html>\n",
        escape(title)
    )
}

/// A table from its head and its rows; cells are HTML.
pub fn table(head: &[String], rows: &[Vec<String>]) -> String {
    let cells = |tag: &str, row: &[String]| row.iter().map(|cell| format!("<{tag}>{cell}</{tag}>")).collect::<String>();
    let body = rows.iter().map(|row| format!("<tr>{}</tr>", cells("td", row))).collect::<String>();
    format!("<div class=\"scroll\"><table><tr>{}</tr>{body}</table></div>\n", cells("th", head))
}

/// Figures as cards: a value and what it is.
pub fn cards(cards: &[(String, &str)]) -> String {
    let card = |(value, what): &(String, &str)| format!("<div><b>{}</b><small>{what}</small></div>", escape(value));
    format!("<div class=\"facts\">{}</div>\n", cards.iter().map(card).collect::<String>())
}

/// The records of each kind.
struct Run<'r> {
    steps: Vec<&'r StepRecord>,
    validations: Vec<&'r ValidationRecord>,
    samples: Vec<&'r SampleRecord>,
    events: Vec<String>,
}

fn sorted(records: &[Record]) -> Run<'_> {
    let mut run = Run { steps: Vec::new(), validations: Vec::new(), samples: Vec::new(), events: Vec::new() };
    for record in records {
        match record {
            Record::Step(step) => run.steps.push(step),
            Record::Validation(validation) => run.validations.push(validation),
            Record::Sample(sample) => run.samples.push(sample),
            Record::Spike(spike) => run.events.push(match (spike.loss, spike.back_to) {
                (Some(loss), None) => {
                    format!("step {}: loss spike, {loss:.4} where {:.4} was usual", spike.step, spike.usual)
                }
                (Some(loss), Some(back)) => {
                    format!("step {}: loss spike, {loss:.4}; back to step {back}, the data skipped", spike.step)
                }
                (None, back) => {
                    format!("step {}: the loss was no number; back to step {}", spike.step, back.unwrap_or(0))
                }
            }),
            Record::Collapse(found) => run.events.push(format!(
                "step {}: layer {} has collapsed, {:.1} experts in effect of {}; {}",
                found.step, found.layer, found.effective_experts, found.experts, found.advice
            )),
        }
    }
    run
}

fn run_page(title: &str, recipe: &Recipe, facts: &RunFacts, records: &[Record]) -> String {
    let run = sorted(records);
    let mut body = format!("<h1>{}</h1>\n", escape(title));
    let done = run.steps.last().map_or(0, |step| step.step);
    let _ = writeln!(body, "<p>A training run by Moebius: {done} of {} steps.</p>", facts.steps);
    body.push_str(&cards(&run_cards(&run, facts)));
    body.push_str("<h2>Loss</h2>\n");
    body.push_str(&loss_chart(&run).html());
    body.push_str(&scores(&run));
    if run.steps.iter().any(|step| !step.load.is_empty()) {
        body.push_str("<h2>Experts</h2>\n");
        let last = run.validations.last().map(|record| &record.load).filter(|load| !load.is_empty());
        let shown = last.or_else(|| run.steps.last().map(|step| &step.load));
        body.push_str(&shown.map_or_else(String::new, |load| heat(load)));
        let of = |title: &str, unit: &str, value: fn(&LayerLoad) -> f64| layers_chart(&run, title, unit, value).html();
        body.push_str(&of("MaxVio", "the fullest expert over the mean, less one", |load| load.max_violation));
        body.push_str(&of("Router entropy", "1: does not care which expert, 0: sure", |load| load.router_entropy));
    }
    body.push_str("<h2>Optimiser and speed</h2>\n");
    let steps = |title: &str, unit: &str, value: &dyn Fn(&StepRecord) -> f64| {
        let points = run.steps.iter().map(|step| (step.step as f64, value(step))).collect();
        Chart {
            title: title.to_owned(),
            x_label: "step".to_owned(),
            y_label: unit.to_owned(),
            lines: vec![Line { points, ..Line::default() }],
        }
        .html()
    };
    body.push_str(&steps("Gradient norm", "before clipping", &|step| step.gradient_norm));
    body.push_str(&steps("Learning rate", "", &|step| step.learning_rate));
    let tokens = facts.tokens_per_step as f64;
    body.push_str(&steps("Speed", "tokens/s", &|step| tokens / step.seconds.max(1e-9)));
    if !run.events.is_empty() {
        let items = run.events.iter().map(|event| format!("<li>{}</li>", escape(event))).collect::<String>();
        let _ = writeln!(body, "<h2>Events</h2>\n<ul>{items}</ul>");
    }
    body.push_str(&samples(&run));
    let _ = writeln!(body, "<h2>Recipe</h2>\n<pre>{}</pre>", escape(recipe.text()));
    page(title, &body)
}

fn run_cards(run: &Run<'_>, facts: &RunFacts) -> Vec<(String, &'static str)> {
    let seconds = run.steps.iter().map(|step| step.seconds).sum::<f64>();
    let tokens = run.steps.last().map_or(0, |step| step.tokens) as f64;
    let lowest = run.validations.iter().map(|record| record.lowest().0).fold(f64::INFINITY, f64::min);
    let mut cards = vec![(number(facts.total_parameters as f64), "parameters")];
    if let Some((chosen, experts)) = facts.experts {
        cards.push((number(facts.active_parameters as f64), "active a token"));
        cards.push((format!("{chosen} of {experts}"), "experts a token"));
    }
    cards.push((number(tokens), "tokens seen"));
    if lowest.is_finite() {
        cards.push((format!("{lowest:.4}"), "lowest validation loss"));
    }
    cards.push((format!("{:.1} min", seconds / 60.0), "in steps"));
    cards.push((number(tokens / seconds.max(1e-9)), "tokens/s"));
    cards
}

fn loss_chart(run: &Run<'_>) -> Chart {
    let training = run.steps.iter().map(|step| (step.step as f64, step.loss)).collect();
    let line = |name: &str, colour: usize, points: Vec<(f64, f64)>| Line {
        name: name.to_owned(),
        points,
        colour,
        is_faint: false,
    };
    let mut lines = vec![line("training", 0, training)];
    let of = |value: &dyn Fn(&ValidationRecord) -> Option<f64>| {
        let points = run.validations.iter().filter_map(|record| Some((record.step as f64, value(record)?)));
        points.collect::<Vec<_>>()
    };
    lines.push(line("validation", 1, of(&|record| Some(record.score.loss))));
    let average = of(&|record| record.average.as_ref().map(|score| score.loss));
    if !average.is_empty() {
        lines.push(line("validation, averaged weights", 2, average));
    }
    if let Some(last) = run.validations.last() {
        for (at, name) in last.sets.keys().enumerate() {
            let points = of(&|record| record.sets.get(name).map(|score| score.loss));
            lines.push(line(name, 3 + at, points));
        }
    }
    Chart {
        title: "Cross-entropy of the next token".to_owned(),
        x_label: "step".to_owned(),
        y_label: "nats".to_owned(),
        lines,
    }
}

/// The last validation's scores, set by set.
fn scores(run: &Run<'_>) -> String {
    let Some(last) = run.validations.last() else { return String::new() };
    let named = std::iter::once(("validation", &last.score));
    let named = named.chain(last.average.iter().map(|score| ("validation, averaged weights", score)));
    let named = named.chain(last.sets.iter().map(|(name, score)| (name.as_str(), score)));
    let rows = named.map(|(name, score)| {
        let figures = [score.loss, score.perplexity, score.bits_per_byte].map(|value| format!("{value:.4}"));
        [vec![escape(name)], figures.to_vec(), vec![score.tokens.to_string()]].concat()
    });
    let head =
        [&format!("step {}", last.step), "loss", "perplexity", "bits a byte", "tokens"].map(|text| text.to_string());
    table(&head, &rows.collect::<Vec<_>>())
}

/// A cell a layer and expert: its share of the layer's tokens against an even one.
fn heat(load: &[LayerLoad]) -> String {
    let row = |(layer, load): (usize, &LayerLoad)| {
        let total = load.counts.iter().sum::<u64>().max(1) as f64;
        let cell = |&count: &u64| {
            let share = count as f64 * load.counts.len() as f64 / total;
            let strength = (share / 2.0).min(1.0) * 85.0;
            format!(
                "<td style=\"background: color-mix(in srgb, var(--s0) {strength:.0}%, var(--card))\">{share:.2}</td>"
            )
        };
        format!("<tr><th>layer {layer}</th>{}</tr>", load.counts.iter().map(cell).collect::<String>())
    };
    let rows = load.iter().enumerate().map(row).collect::<String>();
    format!(
        "<figure><figcaption>Load <small>share of each expert, 1 is even</small></figcaption><div class=\"scroll\">\
         <table class=\"heat\">{rows}</table></div></figure>\n"
    )
}

fn layers_chart(run: &Run<'_>, title: &str, unit: &str, value: fn(&LayerLoad) -> f64) -> Chart {
    let layers = run.steps.iter().map(|step| step.load.len()).max().unwrap_or(0);
    let line = |layer: usize| {
        let points = run.steps.iter().filter_map(|step| Some((step.step as f64, value(step.load.get(layer)?))));
        Line { name: format!("layer {layer}"), points: points.collect(), colour: layer, is_faint: false }
    };
    Chart {
        title: title.to_owned(),
        x_label: "step".to_owned(),
        y_label: unit.to_owned(),
        lines: (0..layers).map(line).collect(),
    }
}

/// The last samples of each prompt.
fn samples(run: &Run<'_>) -> String {
    if run.samples.is_empty() {
        return String::new();
    }
    let quote = |sample: &&SampleRecord| {
        let (step, prompt, text) = (sample.step, escape(&sample.prompt), escape(&sample.text));
        format!("<blockquote><small>step {step}</small><br><b>{prompt}</b>{text}</blockquote>\n")
    };
    format!("<h2>Samples</h2>\n{}", run.samples.iter().rev().take(12).map(quote).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::{step, validation};

    #[test]
    fn a_run_of_any_length_has_a_page() {
        let text = "[model]\npreset = 'moe-nano' # <b>\n[data]\ntrain = ['a']\nvalid = ['b']\n[train]\nsteps = 9\n";
        let recipe = Recipe::parse("x.toml", Path::new(""), text).unwrap();
        let facts = RunFacts {
            total_parameters: 1000,
            active_parameters: 500,
            step: 0,
            steps: 9,
            tokens_per_step: 10,
            experts: Some((2, 8)),
        };
        for length in [0, 1, 500] {
            let mut records = (1..=length).map(|at| step(at, 5.0 / at as f64)).collect::<Vec<_>>();
            records.extend((1..=length / 2).map(|at| validation(at * 2, 5.0 / at as f64)));
            records.push(Record::Sample(SampleRecord { step: 3, prompt: "a <".into(), text: "&".into() }));
            let page = run_page("run & <co>", &recipe, &facts, &records);
            assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
            assert!(page.contains("<title>run &amp; &lt;co&gt;</title>") && page.contains("# &lt;b&gt;"));
            assert!(page.contains("<b>a &lt;</b>&amp;") && !page.contains("http"));
            assert_eq!(page.matches("<figure>").count(), if length == 0 { 0 } else { 4 });
            assert_eq!(page, run_page("run & <co>", &recipe, &facts, &records));
        }
    }
}
