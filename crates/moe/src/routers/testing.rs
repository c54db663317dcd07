//! Methods whose weights are written by hand, for tests that fit on paper.

use super::{MethodConfig, MethodLayer, OptionValue, RoutingMethod};
use moebius_tensor::{Param, Tensor};

/// The method `name` for x of width 2, of which the first coordinate is to be one: then the first number of each expert's
/// row is its score. `scores` gives those of a weight by its name; none: zeros.
pub(super) fn by_scores(
    name: &str,
    [experts, top_k]: [usize; 2],
    options: &[(&str, OptionValue)],
    scores: &dyn Fn(&str) -> Option<Vec<f32>>,
) -> Box<dyn RoutingMethod> {
    let options = options.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    let layer = MethodLayer { hidden: 2, experts, top_k, vocabulary: 0, causal: false };
    let mut make = |name: &str, shape: &[usize]| {
        let mut value = Tensor::zeros(shape);
        let first = value.data_mut().iter_mut().step_by(2);
        first.zip(scores(name).unwrap_or_default()).for_each(|(w, score)| *w = score);
        Ok(Param::new(0, name, value))
    };
    MethodConfig { name: name.into(), options }.build(&layer, &mut make).unwrap()
}

/// An error unless all are within 1e-4.
pub(super) fn close(found: &[f32], wanted: &[f32]) {
    let near = found.len() == wanted.len() && found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-4);
    assert!(near, "{found:?}, wanted {wanted:?}");
}
