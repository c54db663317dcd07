//! Loss spikes: a step whose loss stands far above those before it.
//!
//! What is usual is the median of the last losses, how far they scatter their median absolute deviation times 1.4826
//! (the deviation of a normal distribution; Rousseeuw & Croux 1993): neither is moved by a spike among them.

use serde::{Deserialize, Serialize};

use crate::recipe::SpikeSection;

/// A spike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpikeRecord {
    /// The step, from 1.
    pub step: u64,
    /// What its loss was; absent if it was no number.
    pub loss: Option<f64>,
    /// The usual loss before it.
    pub usual: f64,
    /// How many deviations above the usual it stood; absent if it was no number.
    pub deviations: Option<f64>,
    /// The checkpoint that the run went back to; absent if it went on.
    pub back_to: Option<u64>,
}

/// The step's spike, if it is one: `loss` and `gradient_norm` against the losses of earlier steps.
///
/// Values that are no numbers are a spike always; others only once `window` losses say what is usual.
pub fn find(recent: &[f64], step: u64, loss: f64, gradient_norm: f64, settings: &SpikeSection) -> Option<SpikeRecord> {
    let usual = median(recent.to_vec());
    let spike = |loss, deviations| Some(SpikeRecord { step, loss, usual, deviations, back_to: None });
    if !loss.is_finite() || !gradient_norm.is_finite() {
        return spike(loss.is_finite().then_some(loss), None);
    }
    if recent.len() < settings.window {
        return None;
    }
    let scatter = 1.4826 * median(recent.iter().map(|loss| (loss - usual).abs()).collect());
    let rise = loss - usual;
    // Losses that do not scatter at all would make a spike of any rise: the other limit remains.
    let deviations = rise / scatter.max(1e-9);
    if rise > settings.rise && deviations > settings.deviations { spike(Some(loss), Some(deviations)) } else { None }
}

/// Takes a loss in; the oldest of more than `window` goes.
pub fn remember(recent: &mut Vec<f64>, loss: f64, window: usize) {
    recent.push(loss);
    recent.drain(..recent.len().saturating_sub(window));
}

/// The middle value; 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => values[middle],
        _ => 0.5 * (values[middle - 1] + values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> SpikeSection {
        SpikeSection { window: 8, deviations: 4.0, rise: 0.2, ..SpikeSection::default() }
    }

    #[test]
    fn medians_on_paper() {
        assert_eq!(median(vec![]), 0.0);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn a_spike_is_named_once_enough_is_known() {
        // Median 2, median deviation 0.1: scatter 0.148.
        let recent = [2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.2, 1.8];
        let find = |recent: &[f64], loss| find(recent, 9, loss, 1.0, &settings());
        assert_eq!(find(&recent, 2.55), None);
        let spike = find(&recent, 2.65).expect("4.4 deviations");
        assert_eq!((spike.step, spike.loss, spike.usual), (9, Some(2.65), 2.0));
        assert!((spike.deviations.unwrap() - 0.65 / 0.14826).abs() < 1e-9);
        assert_eq!(find(&recent[1..], 9.0), None, "seven losses say nothing yet");
        // Scatterless losses: only the rise counts.
        assert_eq!(find(&[2.0; 8], 2.1), None);
        assert!(find(&[2.0; 8], 2.3).is_some());
        // One outlier before does not hide the next.
        let mut with_outlier = recent;
        with_outlier[0] = 90.0;
        assert!(find(&with_outlier, 3.0).is_some());
    }

    #[test]
    fn what_is_no_number_is_a_spike_at_once() {
        let spike = find(&[], 1, f64::NAN, 1.0, &settings()).expect("no number");
        assert_eq!((spike.loss, spike.deviations), (None, None));
        assert!(find(&[], 1, 2.0, f64::INFINITY, &settings()).is_some());
    }

    #[test]
    fn the_window_moves() {
        let mut recent = vec![1.0, 2.0];
        remember(&mut recent, 3.0, 2);
        assert_eq!(recent, [2.0, 3.0]);
    }
}
