//! Gradients against central differences of a function that computes in f32.
//!
//! Such differences have two errors. The step's, of order step², is removed to the next order by taking two steps
//! (Richardson 1911). Rounding's is that of the function's value over the step: it bounds what can be seen, so it is
//! part of the tolerance, and the step is wide. Where the two steps disagree the function is not smooth (a router
//! changed its choice): that fails too, since such differences say nothing.

/// The smaller step, for numbers about one.
const STEP: f32 = 1.0 / 64.0;
/// What an element may be off, relative to itself or to the typical element, whichever is larger.
const RELATIVE: f64 = 1e-3;
/// Rounding errors of the function's value that are allowed for, in units of f32's.
const ROUNDINGS: f64 = 32.0;
/// How much the slopes over both steps may differ, relative as above.
const ROUGHNESS: f64 = 0.05;

/// Panics unless `gradient` is that of `f` at `x`; `what` names it.
pub fn check_gradient(what: &str, x: &[f32], gradient: &[f32], f: impl FnMut(&[f32]) -> f64) {
    if let Err(complaint) = compare_gradient(x, gradient, f) {
        panic!("gradient of {what}{complaint}");
    }
}

/// An error unless `gradient` is that of `f` at `x`: the first element that is off, what it is and should be.
///
/// # Errors
/// An element that is off, or at which `f` is not smooth.
pub fn compare_gradient(x: &[f32], gradient: &[f32], mut f: impl FnMut(&[f32]) -> f64) -> Result<(), String> {
    if gradient.len() != x.len() {
        return Err(format!(": {} numbers for {}", gradient.len(), x.len()));
    }
    let squares: f64 = gradient.iter().map(|&g| f64::from(g).powi(2)).sum();
    let typical = (squares / x.len().max(1) as f64).sqrt();
    let mut moved = x.to_vec();
    for i in 0..x.len() {
        let mut size = 1.0f64;
        let mut slope = |step: f32| {
            let [up, down] = [x[i] + step, x[i] - step];
            let [above, below] = [up, down].map(|to| {
                moved[i] = to;
                f(&moved)
            });
            moved[i] = x[i];
            size = size.max(above.abs()).max(below.abs());
            (above - below) / (f64::from(up) - f64::from(down))
        };
        let step = STEP * x[i].abs().max(1.0);
        let (near, far) = (slope(step), slope(2.0 * step));
        let wanted = near + (near - far) / 3.0;
        let found = f64::from(gradient[i]);
        let rounding = ROUNDINGS * f64::from(f32::EPSILON) / 2.0 * size / f64::from(step);
        let scale = wanted.abs().max(typical);
        // Asked so that NaN fails.
        let smooth = (near - far).abs() <= ROUGHNESS * scale + 2.0 * rounding;
        if !smooth {
            return Err(format!("[{i}]: not smooth there: slope {near} over one step, {far} over two"));
        }
        let right = (wanted - found).abs() <= RELATIVE * scale + rounding;
        if !right {
            return Err(format!("[{i}]: found {found}, differences say {wanted}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const X: [f32; 3] = [0.3, -1.2, 0.5];

    /// Σ sin(x) / 3 + x₀ x₁, in f32 but for the last sum.
    fn value(x: &[f32]) -> f64 {
        x.iter().map(|x| f64::from(x.sin() / 3.0)).sum::<f64>() + f64::from(x[0] * x[1])
    }

    fn slopes() -> [f32; 3] {
        [X[0].cos() / 3.0 + X[1], X[1].cos() / 3.0 + X[0], X[2].cos() / 3.0]
    }

    #[test]
    fn a_right_gradient_passes() {
        compare_gradient(&X, &slopes(), value).unwrap();
        check_gradient("nothing", &[], &[], |_| 0.0);
    }

    #[test]
    fn one_per_cent_off_in_one_element_fails() {
        for i in 0..3 {
            let mut gradient = slopes();
            gradient[i] *= 1.01;
            let complaint = compare_gradient(&X, &gradient, value).unwrap_err();
            assert!(complaint.starts_with(&format!("[{i}]: found ")), "{complaint}");
        }
        assert!(compare_gradient(&X, &[f32::NAN; 3], value).is_err());
        assert_eq!(compare_gradient(&X, &slopes()[..2], value).unwrap_err(), ": 2 numbers for 3");
    }

    #[test]
    fn small_gradients_are_looked_at_as_sharply() {
        let scaled = |x: &[f32]| 1e-2 * f64::from(x[0].sin());
        assert!(compare_gradient(&[0.3], &[1e-2 * 0.3f32.cos()], scaled).is_ok());
        assert!(compare_gradient(&[0.3], &[1.03e-2 * 0.3f32.cos()], scaled).is_err());
    }

    #[test]
    fn a_jump_and_a_kink_are_named() {
        for f in [|x: &[f32]| f64::from(u8::from(x[0] > 0.02)), |x: &[f32]| f64::from((x[0] - 0.01).abs())] {
            assert!(compare_gradient(&[0.0], &[0.0], f).unwrap_err().contains("not smooth"));
        }
    }
}
