//! Line charts as SVG text whose colours are the page's: they follow its light or dark theme.

use std::fmt::Write;

/// Width and height of a chart, in its own units.
const SIZE: [f64; 2] = [760.0, 280.0];
/// Room at the left, top, right and bottom for numbers.
const MARGIN: [f64; 4] = [58.0, 10.0, 14.0, 34.0];
/// At most this many points a line.
const POINTS: usize = 400;
/// Colours that the page's style knows: `--s0` to `--s7`.
pub const COLOURS: usize = 8;

/// A line of a chart.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// Stands in the legend; lines without a name are not listed.
    pub name: String,
    /// In rising order of x.
    pub points: Vec<(f64, f64)>,
    /// Which of the page's colours.
    pub colour: usize,
    /// Thin and pale, for what stands behind.
    pub is_faint: bool,
}

/// A chart with a title and named axes.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// Below it.
    pub x_label: String,
    /// The unit of the values, after the title.
    pub y_label: String,
    /// What is drawn, later ones above.
    pub lines: Vec<Line>,
}

impl Chart {
    /// The chart as HTML: a figure with a caption, the picture and a legend. Empty if there is nothing to draw.
    pub fn html(&self) -> String {
        let lines = self.lines.iter().map(|line| (line, thinned(&line.points))).collect::<Vec<_>>();
        let points = || lines.iter().flat_map(|(_, points)| points.iter().copied());
        if points().next().is_none() {
            return String::new();
        }
        let [left, right] = span(points().map(|point| point.0), 0.0);
        let [low, high] = span(points().map(|point| point.1), 0.05);
        let [x0, y0, x1, y1] = [MARGIN[0], MARGIN[1], SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]];
        let place = |(x, y): (f64, f64)| {
            [x0 + (x - left) / (right - left) * (x1 - x0), y1 - (y - low) / (high - low) * (y1 - y0)]
        };
        let mut svg = format!(
            "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">",
            SIZE[0],
            SIZE[1],
            escape(&self.title)
        );
        for y in ticks(low, high) {
            let [_, at] = place((left, y));
            let _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{x0} {at:.1}H{x1}\"/><text x=\"{}\" y=\"{:.1}\" class=\"end\">{}</text>",
                x0 - 6.0,
                at + 4.0,
                number(y)
            );
        }
        for x in ticks(left, right) {
            let [at, _] = place((x, low));
            let _ = write!(svg, "<text x=\"{at:.1}\" y=\"{}\" class=\"middle\">{}</text>", y1 + 16.0, number(x));
        }
        let _ = write!(
            svg,
            "<path class=\"axis\" d=\"M{x0} {y0}V{y1}H{x1}\"/><text x=\"{x1}\" y=\"{}\" class=\"end\">{}</text>",
            SIZE[1] - 3.0,
            escape(&self.x_label)
        );
        for (line, points) in &lines {
            let (colour, faint) = (line.colour % COLOURS, if line.is_faint { " faint" } else { "" });
            let mut path = String::new();
            for (at, &point) in points.iter().enumerate() {
                let [x, y] = place(point);
                let _ = write!(path, "{}{x:.1} {y:.1}", if at == 0 { "M" } else { "L" });
            }
            let _ = write!(svg, "<path class=\"line s{colour}{faint}\" d=\"{path}\"/>");
            // A line of few points shows them.
            if !line.is_faint && points.len() <= 40 {
                for &point in points {
                    let [x, y] = place(point);
                    let _ = write!(
                        svg,
                        "<circle class=\"s{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.4\"><title>{}: {} at {}</title></circle>",
                        escape(&line.name),
                        number(point.1),
                        number(point.0)
                    );
                }
            }
        }
        svg.push_str("</svg>");
        let unit =
            if self.y_label.is_empty() { String::new() } else { format!(" <small>{}</small>", escape(&self.y_label)) };
        format!("<figure><figcaption>{}{unit}</figcaption>{svg}{}</figure>\n", escape(&self.title), self.legend())
    }

    fn legend(&self) -> String {
        let named = self.lines.iter().filter(|line| !line.name.is_empty());
        let keys = named.map(|line| {
            format!("<span class=\"key\"><i class=\"s{}\"></i>{}</span>", line.colour % COLOURS, escape(&line.name))
        });
        format!("<div class=\"legend\">{}</div>", keys.collect::<String>())
    }
}

/// Text that stands for itself in HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A number with as many digits as a reader wants.
pub fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if !(1e-3..1e6).contains(&size) => format!("{value:.2e}"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => trimmed(format!("{value:.1}")),
        _ => trimmed(format!("{value:.3}")),
    }
}

fn trimmed(text: String) -> String {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Means of at most [`POINTS`] equal groups of finite neighbours.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite = points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect::<Vec<_>>();
    let group = finite.len().div_ceil(POINTS).max(1);
    let mean = |points: &[(f64, f64)]| {
        let count = points.len() as f64;
        (points.iter().map(|p| p.0).sum::<f64>() / count, points.iter().map(|p| p.1).sum::<f64>() / count)
    };
    finite.chunks(group).map(mean).collect()
}

/// The lowest and the highest value with a margin; never the same.
fn span(values: impl Iterator<Item = f64>, margin: f64) -> [f64; 2] {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    let room = (high - low) * margin;
    if high > low { [low - room, high + room] } else { [low - 0.5, high + 0.5] }
}

/// Round numbers, about five, within a span.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|part| part * power).find(|&step| step >= rough).unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    (first..).map(|at| at as f64 * step).take_while(|&tick| tick <= high + step * 1e-9).take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(0.0, 1.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks(37.0, 1010.0), [200.0, 400.0, 600.0, 800.0, 1000.0]);
        assert_eq!([0.0, 1234.5, 12.34, 0.5, 2e-5, 3e9].map(number), ["0", "1234", "12.3", "0.5", "2.00e-5", "3.00e9"]);
    }

    #[test]
    fn a_chart_of_anything_is_drawn() {
        let chart = |points: Vec<(f64, f64)>| Chart {
            title: "a <b> & \"c\"".to_owned(),
            lines: vec![Line { name: "x".to_owned(), points, ..Line::default() }],
            ..Chart::default()
        };
        assert_eq!(chart(vec![]).html(), "");
        assert_eq!(chart(vec![(1.0, f64::NAN)]).html(), "");
        for points in [vec![(1.0, 2.0)], (0..5000).map(|at| (f64::from(at), 1.0 / f64::from(at + 1))).collect()] {
            let html = chart(points).html();
            assert!(html.contains("a &lt;b&gt; &amp; &quot;c&quot;") && html.ends_with("</figure>\n"));
            assert!(!html.contains("NaN") && !html.contains("inf") && html.len() < 20_000, "{}", html.len());
        }
    }
}
