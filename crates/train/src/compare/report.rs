//! A comparison told: as text, as JSON, as a page.

use std::fmt::Write;

use super::analysis::{AtBudget, Budget, Comparison, Row, Side, Spread};
use super::runs::Point;
use crate::report::chart::{Chart, Line, escape, number};
use crate::report::{page, table};

impl Budget {
    /// How a budget is called.
    fn title(self) -> &'static str {
        match self {
            Self::Steps => "equal steps",
            Self::Flops => "equal arithmetic",
            Self::Seconds => "equal time",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Steps => "steps",
            Self::Flops => "FLOP",
            Self::Seconds => "seconds in steps",
        }
    }
}

/// `3.4120 ± 0.0031`.
fn spread(spread: &Spread, signed: bool) -> String {
    let mean = |mean: f64| if signed { format!("{mean:+.4}") } else { format!("{mean:.4}") };
    match (spread.mean, spread.deviation) {
        (Some(value), Some(deviation)) => format!("{} ± {deviation:.4}", mean(value)),
        (Some(value), None) => mean(value),
        _ => "not reached".to_owned(),
    }
}

/// Head and rows of the table at one budget.
fn rows(rows: &[Row], seeds: &[u64]) -> (Vec<String>, Vec<Vec<String>>) {
    let mut head = ["recipe", "against", "loss", "difference"].map(str::to_owned).to_vec();
    head.extend(seeds.iter().map(|seed| format!("seed {seed}")));
    let line = |row: &Row| {
        let mut cells = vec![row.name.clone(), row.against.clone(), spread(&row.loss, false)];
        let is_itself = row.name == row.against;
        cells.push(if is_itself { "–".to_owned() } else { spread(&row.difference, true) });
        let each = row.losses.iter().zip(&row.differences);
        cells.extend(each.map(|(&loss, &difference)| match (is_itself, loss, difference) {
            (true, Some(loss), _) => format!("{loss:.4}"),
            (false, _, Some(difference)) => format!("{difference:+.4}"),
            _ => "–".to_owned(),
        }));
        cells
    };
    (head, rows.iter().map(line).collect())
}

fn side_rows(sides: &[Side]) -> (Vec<String>, Vec<Vec<String>>) {
    let head = ["recipe", "parameters", "active", "FLOP a token", "tokens/s"].map(str::to_owned).to_vec();
    let line = |side: &Side| {
        let figures =
            [side.total_parameters as f64, side.active_parameters as f64, side.flops_per_token, side.tokens_per_second];
        [vec![side.name.clone()], figures.map(number).to_vec()].concat()
    };
    (head, sides.iter().map(line).collect())
}

/// A table of text, columns in line.
fn plain((head, rows): (Vec<String>, Vec<Vec<String>>)) -> String {
    let all = std::iter::once(&head).chain(&rows).collect::<Vec<_>>();
    let width = |column: usize| all.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = (0..head.len()).map(width).collect::<Vec<_>>();
    let mut text = String::new();
    for row in all {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}

const NOTE: &str = "Differences are paired by seed: the recipe's loss less the other's, so below zero is better; ± is their \
standard deviation over seeds. Losses between validations are on the straight line.";

impl Comparison {
    /// The comparison as lines for a terminal.
    pub fn text(&self) -> String {
        let mut text = plain(side_rows(&self.sides));
        for at in &self.budgets {
            let _ = write!(text, "\nat {}: {}\n{}", at.budget.title(), amount(at), plain(rows(&at.rows, &self.seeds)));
        }
        if self.equal_total_parameters.is_empty() {
            text.push_str("\nat equal total parameters: no two recipes are within 10 % of each other\n");
        } else {
            let table = plain(rows(&self.equal_total_parameters, &self.seeds));
            let _ = write!(text, "\nat equal total parameters (within 10 %), equal steps\n{table}");
        }
        let _ = write!(text, "\n{NOTE}\n");
        text
    }

    /// The comparison as one JSON object.
    pub fn json(&self) -> String {
        format!("{:#}\n", serde_json::to_value(self).expect("plain data"))
    }

    /// The comparison as a page.
    pub fn html(&self) -> String {
        let html = |(head, rows): (Vec<String>, Vec<Vec<String>>)| {
            let rows = rows.iter().map(|row| row.iter().map(|cell| escape(cell)).collect()).collect::<Vec<_>>();
            table(&head, &rows)
        };
        let names = self.sides.iter().map(|side| side.name.as_str()).collect::<Vec<_>>();
        let title = names.join(", ");
        let seeds = self.seeds.len();
        let mut body = format!("<h1>{}</h1>\n<p>A comparison by Moebius over {seeds} seeds.</p>\n", escape(&title));
        body.push_str(&html(side_rows(&self.sides)));
        for at in &self.budgets {
            let _ = writeln!(body, "<h2>At {}: {}</h2>", at.budget.title(), amount(at));
            body.push_str(&html(rows(&at.rows, &self.seeds)));
            body.push_str(&self.chart(at.budget).html());
        }
        body.push_str("<h2>At equal total parameters</h2>\n");
        if self.equal_total_parameters.is_empty() {
            body.push_str("<p>No two recipes are within 10 % of each other.</p>\n");
        } else {
            body.push_str(&html(rows(&self.equal_total_parameters, &self.seeds)));
        }
        let _ = writeln!(body, "<p>{NOTE}</p>");
        page(&title, &body)
    }

    /// Every seed's curve faintly, the mean over seeds in front.
    fn chart(&self, budget: Budget) -> Chart {
        let mut lines = Vec::new();
        for (colour, side) in self.sides.iter().enumerate() {
            let points = |curve: &[Point]| curve.iter().map(|point| (budget.of(point), point.loss)).collect();
            let faint = |curve: &Vec<Point>| Line { points: points(curve), colour, is_faint: true, ..Line::default() };
            lines.extend(side.curves.iter().map(faint));
        }
        for (colour, side) in self.sides.iter().enumerate() {
            lines.push(Line { name: side.name.clone(), points: mean(&side.curves, budget), colour, is_faint: false });
        }
        Chart {
            title: "Validation loss".to_owned(),
            x_label: budget.unit().to_owned(),
            y_label: "nats a token".to_owned(),
            lines,
        }
    }
}

fn amount(at: &AtBudget) -> String {
    format!("{} {}", number(at.amount), at.budget.unit())
}

/// The mean over seeds of what was spent and of the loss, validation by validation.
fn mean(curves: &[Vec<Point>], budget: Budget) -> Vec<(f64, f64)> {
    let length = curves.iter().map(Vec::len).min().unwrap_or(0);
    let count = curves.len() as f64;
    let at = |index: usize| {
        let sum = |value: &dyn Fn(&Point) -> f64| curves.iter().map(|curve| value(&curve[index])).sum::<f64>() / count;
        (sum(&|point| budget.of(point)), sum(&|point| point.loss))
    };
    (0..length).map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::analysis::compare;
    use crate::compare::runs::Finished;
    use crate::digest::Digest;

    #[test]
    fn the_three_forms_say_the_same() {
        let run = |losses: [f64; 2]| {
            let point = |step: f64, loss: f64| Point { step, flops: step, seconds: step, loss };
            let points = vec![point(10.0, losses[0]), point(20.0, losses[1])];
            Finished {
                total_parameters: 100,
                active_parameters: 50,
                flops_per_token: 1.0,
                tokens_per_step: 4,
                corpus: Digest(1),
                points,
            }
        };
        let names = ["dense <1>", "sparse"].map(str::to_owned);
        let finished = [vec![run([4.0, 3.0]), run([4.0, 3.1])], vec![run([3.5, 2.5]), run([3.5, 2.8])]];
        let found = compare(&names, &[7, 8], &finished);
        let text = found.text();
        let line = text.lines().find(|line| line.starts_with("sparse") && line.contains('±')).unwrap();
        assert_eq!(
            line.split_whitespace().collect::<Vec<_>>().join(" "),
            "sparse dense <1> 2.6500 ± 0.2121 -0.4000 ± 0.1414 -0.5000 -0.3000"
        );
        let json: serde_json::Value = serde_json::from_str(&found.json()).unwrap();
        let mean = json["budgets"][0]["rows"][1]["difference"]["mean"].as_f64().unwrap();
        assert!((mean + 0.4).abs() < 1e-12);
        let html = found.html();
        assert!(html.contains("dense &lt;1&gt;") && html.contains("-0.4000 ± 0.1414"));
        assert_eq!(html.matches("<svg").count(), 3);
    }
}
