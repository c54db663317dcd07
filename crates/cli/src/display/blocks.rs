//! Pictures made of characters: a curve, a row of bars.

use moebius_train::metrics::LayerLoad;

/// Eighths of a character, from the bottom.
const HEIGHTS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Bars that one layer's experts get at most; more experts share bars.
const MOST_BARS: usize = 32;

/// Layers shown at most: the least even ones.
const MOST_LAYERS: usize = 12;

/// A filled curve of `rows` lines and at most `columns` characters beside its scale; empty without two values.
///
/// Each column is the mean of its values. The scale runs from the lowest to the highest column.
pub fn curve(values: &[f64], columns: usize, rows: usize) -> Vec<String> {
    let finite = values.iter().copied().filter(|value| value.is_finite()).collect::<Vec<_>>();
    if finite.len() < 2 || rows == 0 {
        return Vec::new();
    }
    let columns = columns.clamp(1, finite.len());
    let mean = |column: usize| {
        let part = &finite[column * finite.len() / columns..(column + 1) * finite.len() / columns];
        part.iter().sum::<f64>() / part.len() as f64
    };
    let means = (0..columns).map(mean).collect::<Vec<_>>();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let eighths = |value: f64| match high > low {
        // One eighth at the least, so that the lowest column is seen.
        true => 1 + ((value - low) / (high - low) * (8 * rows - 1) as f64).round() as usize,
        false => 4 * rows,
    };
    let line = |row: usize| {
        let below = 8 * (rows - 1 - row);
        let cells = means.iter().map(|&value| HEIGHTS[eighths(value).saturating_sub(below).min(8)]);
        let label = match row {
            0 => format!("{high:7.3}"),
            row if row + 1 == rows => format!("{low:7.3}"),
            _ => " ".repeat(7),
        };
        format!("{label} {}", cells.collect::<String>())
    };
    (0..rows).map(line).collect()
}

/// A bar for each expert, full height for the busiest; neighbours share one where there are many.
pub fn bars(counts: &[u64]) -> String {
    let together = counts.len().div_ceil(MOST_BARS).max(1);
    let sums = counts.chunks(together).map(|part| part.iter().sum::<u64>()).collect::<Vec<_>>();
    let busiest = sums.iter().copied().max().unwrap_or(0).max(1);
    // Nothing at all gets no bar; little gets the lowest.
    sums.iter().map(|&sum| HEIGHTS[(sum * 8).div_ceil(busiest) as usize]).collect()
}

/// A line a layer: bars, MaxVio, dead experts, router entropy. Of many layers the least even ones, in their order.
pub fn loads(layers: &[LayerLoad]) -> Vec<String> {
    let mut shown = (0..layers.len()).collect::<Vec<_>>();
    shown.sort_by(|&a, &b| layers[b].max_violation.total_cmp(&layers[a].max_violation).then(a.cmp(&b)));
    shown.truncate(MOST_LAYERS);
    shown.sort_unstable();
    let line = |layer: usize| {
        let load = &layers[layer];
        format!("layer {layer:<2} {}  {}", bars(&load.counts), figures(load))
    };
    shown.into_iter().map(line).collect()
}

/// The figures of a layer's load.
pub fn figures(load: &LayerLoad) -> String {
    let (violation, dead, entropy) = (load.max_violation, load.dead_experts, load.router_entropy);
    format!("MaxVio {violation:.2}  dead {dead}  router entropy {entropy:.2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_on_paper() {
        assert_eq!(curve(&[3.0, 2.0, 1.0], 10, 2), ["  3.000 █▁ ", "  1.000 ██▁"]);
        assert_eq!(curve(&[4.0, 2.0, 1.0, 1.0], 2, 1), ["  3.000 █▁"]);
        assert_eq!(curve(&[1.0, 1.0], 2, 1), ["  1.000 ▄▄"]);
        assert!(curve(&[1.0, f64::NAN], 9, 3).is_empty());
    }

    #[test]
    fn bars_on_paper() {
        assert_eq!(bars(&[8, 4, 1, 0]), "█▄▁ ");
        assert_eq!(bars(&[0, 0]), "  ");
        assert_eq!(bars(&[1; 64]).chars().count(), 32);
    }

    #[test]
    fn the_least_even_layers_are_shown() {
        let layer = |max_violation| LayerLoad { counts: vec![1, 1], max_violation, ..LayerLoad::default() };
        let lines = loads(&(0..20).map(|at| layer(f64::from(at))).collect::<Vec<_>>());
        assert_eq!(lines.len(), 12);
        assert!(lines[0].starts_with("layer 8  ██  MaxVio 8.00  dead 0"), "{}", lines[0]);
    }
}
