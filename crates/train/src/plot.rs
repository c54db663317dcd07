//! `plot.svg`: loss of training and validation; in a sparse model also how unevenly each layer loads its experts over
//! the steps, and the share of each expert at the last validation.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::metrics::{Record, StepRecord, ValidationRecord};
use crate::{Result, TrainError, files};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

const WIDTH: u32 = 960;
const PANEL: u32 = 340;
/// At most this many points a line: an SVG of a long run stays small.
const POINTS: usize = 600;
const INK: RGBColor = RGBColor(60, 60, 67);
const TRAIN: RGBColor = RGBColor(59, 110, 190);
const VALID: RGBColor = RGBColor(204, 88, 40);

/// Draws the records of a run.
///
/// # Errors
/// The drawing library's or the system's; nothing half-written stays.
pub fn write_plot(path: &Path, title: &str, records: &[Record]) -> Result<()> {
    let mut svg = String::new();
    draw(&mut svg, title, records)
        .map_err(|error| TrainError::Plot { path: path.to_path_buf(), message: error.to_string() })?;
    files::write_whole(path, svg.as_bytes())
}

fn draw(svg: &mut String, title: &str, records: &[Record]) -> Drawn {
    let (mut steps, mut validations) = (Vec::new(), Vec::new());
    for record in records {
        match record {
            Record::Step(step) => steps.push(step),
            Record::Validation(validation) => validations.push(validation),
            _ => {}
        }
    }
    let sparse = steps.iter().any(|step| !step.load.is_empty());
    let panels = if sparse { 3 } else { 1 };
    let area = SVGBackend::with_string(svg, (WIDTH, 40 + PANEL * panels)).into_drawing_area();
    area.fill(&WHITE)?;
    let area = area.titled(title, ("sans-serif", 20).into_font().color(&INK))?;
    let areas = area.split_evenly((panels as usize, 1));
    draw_loss(&areas[0], &steps, &validations)?;
    if sparse {
        draw_imbalance(&areas[1], &steps)?;
        draw_shares(&areas[2], &validations, &steps)?;
    }
    area.present()?;
    Ok(())
}

/// Means of at most [`POINTS`] equal groups of neighbours: a readable line that hides no trend.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let group = points.len().div_ceil(POINTS).max(1);
    let mean = |points: &[(f64, f64)]| {
        let count = points.len() as f64;
        (
            points.iter().map(|point| point.0).sum::<f64>() / count,
            points.iter().map(|point| point.1).sum::<f64>() / count,
        )
    };
    points.chunks(group).map(mean).collect()
}

/// The span of the finite values with a margin; never empty.
fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return (0.0, 1.0);
    }
    let margin = (0.05 * (high - low)).max(1e-3);
    (low - margin, high + margin)
}

fn draw_loss(area: &Area<'_>, steps: &[&StepRecord], validations: &[&ValidationRecord]) -> Drawn {
    let train = thinned(&steps.iter().map(|step| (step.step as f64, step.loss)).collect::<Vec<_>>());
    let valid = validations.iter().map(|record| (record.step as f64, record.score.loss)).collect::<Vec<_>>();
    let last = train.iter().chain(&valid).map(|point| point.0).fold(1.0, f64::max);
    let (low, high) = span(train.iter().chain(&valid).map(|point| point.1));
    let mut chart = chart(area, "cross-entropy of the next token").build_cartesian_2d(0.0..last, low..high)?;
    mesh(&mut chart, "step", "nats")?;
    chart
        .draw_series(LineSeries::new(train, TRAIN.stroke_width(1)))?
        .label("training")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], TRAIN.stroke_width(2)));
    chart
        .draw_series(LineSeries::new(valid.clone(), VALID.stroke_width(2)))?
        .label(match validations.last() {
            Some(record) => {
                let score = &record.score;
                format!("validation, last {:.3} nats, {:.3} bits a byte", score.loss, score.bits_per_byte)
            }
            None => "validation".to_owned(),
        })
        .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], VALID.stroke_width(2)));
    chart.draw_series(valid.iter().map(|&point| Circle::new(point, 2, VALID.filled())))?;
    legend(&mut chart)
}

fn draw_imbalance(area: &Area<'_>, steps: &[&StepRecord]) -> Drawn {
    let layers = steps.iter().map(|step| step.load.len()).max().unwrap_or(0);
    let line = |layer: usize| {
        let points = steps.iter().filter_map(|step| {
            let load = step.load.get(layer)?;
            Some((step.step as f64, load.max_violation))
        });
        thinned(&points.collect::<Vec<_>>())
    };
    let lines = (0..layers).map(line).collect::<Vec<_>>();
    let last = lines.iter().flatten().map(|point| point.0).fold(1.0, f64::max);
    let high = span(lines.iter().flatten().map(|point| point.1)).1;
    let title = "expert load: the fullest expert above the mean (0 is even)";
    let mut chart = chart(area, title).build_cartesian_2d(0.0..last, 0.0..high)?;
    mesh(&mut chart, "step", "max / mean - 1")?;
    for (layer, points) in lines.into_iter().enumerate() {
        let color = layer_color(layer, layers);
        let series = chart.draw_series(LineSeries::new(points, color.stroke_width(1)))?;
        // A long legend would cover the lines: the first, the last and some between.
        if layers <= 8 || layer % layers.div_ceil(8) == 0 || layer + 1 == layers {
            series
                .label(format!("layer {layer}"))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
        }
    }
    legend(&mut chart)
}

/// A cell a layer and expert, darker the more tokens it got; the last validation's, else the last step's.
fn draw_shares(area: &Area<'_>, validations: &[&ValidationRecord], steps: &[&StepRecord]) -> Drawn {
    let load = match (validations.last(), steps.last()) {
        (Some(record), _) => &record.load,
        (None, Some(record)) => &record.load,
        (None, None) => return Ok(()),
    };
    let experts = load.iter().map(|layer| layer.counts.len()).max().unwrap_or(0).max(1);
    let layers = load.len().max(1);
    let title = "share of a layer's tokens that each expert got, against an even share";
    let mut chart = chart(area, title).build_cartesian_2d(-0.5..experts as f64 - 0.5, -0.5..layers as f64 - 0.5)?;
    let number = |value: &f64| if value.fract() == 0.0 { format!("{value}") } else { String::new() };
    chart
        .configure_mesh()
        .disable_mesh()
        .axis_style(INK)
        .label_style(("sans-serif", 13).into_font().color(&INK))
        .x_desc("expert")
        .y_desc("layer")
        .x_labels(experts.min(32) + 1)
        .y_labels(layers.min(16) + 1)
        .x_label_formatter(&number)
        .y_label_formatter(&number)
        .draw()?;
    let mut cells = Vec::new();
    for (layer, statistics) in load.iter().enumerate() {
        let total = statistics.counts.iter().sum::<u64>().max(1) as f64;
        for (expert, &count) in statistics.counts.iter().enumerate() {
            cells.push((expert as f64, layer as f64, count as f64 * statistics.counts.len() as f64 / total));
        }
    }
    chart.draw_series(cells.iter().map(|&(x, y, share)| {
        Rectangle::new([(x - 0.48, y - 0.46), (x + 0.48, y + 0.46)], share_color(share).filled())
    }))?;
    if experts <= 16 && layers <= 12 {
        chart.draw_series(cells.iter().map(|&(x, y, share)| {
            let ink = if share > 1.6 { WHITE } else { INK };
            let style = ("sans-serif", 12).into_font().color(&ink).pos(Pos::new(HPos::Center, VPos::Center));
            Text::new(format!("{share:.2}"), (x, y), style)
        }))?;
    }
    Ok(())
}

/// White for no tokens, the even share in the middle, dark from twice the even share on.
fn share_color(share: f64) -> RGBColor {
    let part = (share / 2.0).clamp(0.0, 1.0);
    let mix = |light: f64, dark: f64| (light + (dark - light) * part) as u8;
    RGBColor(mix(250.0, 30.0), mix(250.0, 80.0), mix(252.0, 150.0))
}

/// From blue in the first layer to orange in the last.
fn layer_color(layer: usize, layers: usize) -> RGBColor {
    let part = layer as f64 / (layers.max(2) - 1) as f64;
    let mix = |first: u8, last: u8| (f64::from(first) + (f64::from(last) - f64::from(first)) * part) as u8;
    RGBColor(mix(TRAIN.0, VALID.0), mix(TRAIN.1, VALID.1), mix(TRAIN.2, VALID.2))
}

/// The frame that all panels share.
fn chart<'a, 'b>(area: &'a Area<'b>, title: &str) -> ChartBuilder<'a, 'b, SVGBackend<'b>> {
    let mut builder = ChartBuilder::on(area);
    builder
        .caption(title, ("sans-serif", 15).into_font().color(&INK))
        .margin(12)
        .margin_right(28)
        .x_label_area_size(38)
        .y_label_area_size(56);
    builder
}

type Lines<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

fn mesh(chart: &mut Lines<'_, '_>, x: &str, y: &str) -> Drawn {
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(232, 232, 236))
        .axis_style(INK)
        .label_style(("sans-serif", 13).into_font().color(&INK))
        .x_desc(x)
        .y_desc(y)
        .x_label_formatter(&|value| format!("{value:.0}"))
        .draw()?;
    Ok(())
}

fn legend<'a, 'b: 'a>(chart: &mut Lines<'a, 'b>) -> Drawn {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(210, 210, 215))
        .label_font(("sans-serif", 13).into_font().color(&INK))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::{step, validation};

    #[test]
    fn a_run_of_any_length_is_drawn() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plot.svg");
        for length in [0, 1, 2, 3000] {
            let mut records = (1..=length).map(|at| step(at, 5.0 / at as f64)).collect::<Vec<_>>();
            records.extend((1..=length / 2).map(|at| validation(at * 2, 5.0 / at as f64)));
            write_plot(&path, "tiny <&> recipe", &records).unwrap();
            let svg = std::fs::read_to_string(&path).unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
            assert!(svg.contains("tiny &lt;&amp;&gt; recipe"));
            assert!(svg.len() < 400_000, "{length} steps: {} bytes", svg.len());
        }
    }

    #[test]
    fn a_loss_that_is_no_number_does_not_stop_the_plot() {
        assert_eq!(span([f64::NAN, f64::INFINITY].into_iter()), (0.0, 1.0));
        let (low, high) = span([2.0, 2.0].into_iter());
        assert!(low < 2.0 && 2.0 < high);
    }

    #[test]
    fn thinning_keeps_the_mean() {
        let points = (0..POINTS * 4).map(|at| (at as f64, 1.0)).collect::<Vec<_>>();
        let thin = thinned(&points);
        assert_eq!((thin.len(), thin[0]), (POINTS, (1.5, 1.0)));
    }
}
