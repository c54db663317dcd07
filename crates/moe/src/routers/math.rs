//! The few differentiable operations that routers share.

use crate::{MoeError, Plan};
use moebius_kernels::activation;
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Tensor, TensorError, Var};
use std::rc::Rc;

/// Softmax over the last dimension of `[tokens, experts]`.
pub(super) fn softmax<'p>(g: &Graph<'p>, logits: &Var) -> Result<Var, MoeError> {
    let [_, experts] = logits.dims()?;
    let mut p = Buffer::from_slice(logits.data());
    activation::softmax_rows(&mut p, experts);
    let output = Tensor::new(logits.shape(), p);
    let (to_logits, p) = (logits.place(), output.clone());
    Ok(g.record_from(&[logits], output, move |dp, back| {
        let mut dx = Buffer::scratch(dp.len());
        activation::softmax_rows_backward(&dp, p.data(), experts, &mut dx);
        back.give(to_logits, dx);
    }))
}

/// `f` of every element; `slope` is its derivative.
pub(super) fn map<'p>(g: &Graph<'p>, x: &Var, f: fn(f32) -> f32, slope: fn(f32) -> f32) -> Var {
    let output = Tensor::new(x.shape(), x.data().iter().map(|&x| f(x)).collect::<Buffer<f32>>());
    let (to_x, x_value) = (x.place(), x.value().clone());
    g.record_from(&[x], output, move |mut dy, back| {
        dy.iter_mut().zip(x_value.data()).for_each(|(dy, &x)| *dy *= slope(x));
        back.give(to_x, dy);
    })
}

/// 1 / (1 + exp(−x)).
pub(super) fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// [`logistic`] of every element.
pub(super) fn sigmoid<'p>(g: &Graph<'p>, x: &Var) -> Var {
    map(g, x, logistic, |x| logistic(x) * (1.0 - logistic(x)))
}

/// ln(1 + exp(x)) of every element.
pub(super) fn softplus<'p>(g: &Graph<'p>, x: &Var) -> Var {
    map(g, x, |x| x.max(0.0) + (-x.abs()).exp().ln_1p(), logistic)
}

/// `base + factor * spread`, element by element; the factors are numbers without gradient.
pub(super) fn add_scaled<'p>(g: &Graph<'p>, base: &Var, spread: &Var, factors: Vec<f32>) -> Var {
    let sums = base.data().iter().zip(spread.data()).zip(&factors).map(|((b, s), f)| b + f * s);
    let output = Tensor::new(base.shape(), sums.collect::<Buffer<f32>>());
    let (to_base, to_spread) = (base.place(), spread.place());
    g.record_from(&[base, spread], output, move |mut dy, back| {
        back.add(to_base, &dy);
        dy.iter_mut().zip(&factors).for_each(|(dy, factor)| *dy *= factor);
        back.give(to_spread, dy);
    })
}

/// `x * factor`, element by element; the factors are numbers without gradient.
pub(super) fn multiply<'p>(g: &Graph<'p>, x: &Var, factors: Vec<f32>) -> Var {
    let output = Tensor::new(x.shape(), x.data().iter().zip(&factors).map(|(x, f)| x * f).collect::<Buffer<f32>>());
    let to_x = x.place();
    g.record_from(&[x], output, move |mut dy, back| {
        dy.iter_mut().zip(&factors).for_each(|(dy, factor)| *dy *= factor);
        back.give(to_x, dy);
    })
}

/// The elements of `x` at `at`, in a vector.
pub(super) fn pick<'p>(g: &Graph<'p>, x: &Var, at: Vec<usize>) -> Var {
    let output = Tensor::new(&[at.len()], at.iter().map(|&i| x.data()[i]).collect::<Buffer<f32>>());
    let to_x = x.place();
    g.record_from(&[x], output, move |dy, back| {
        let Some(dx) = back.sum_of(to_x) else { return };
        at.iter().zip(dy.iter()).for_each(|(&i, dy)| dx[i] += dy);
    })
}

/// `a * b`, element by element.
pub(super) fn product<'p>(g: &Graph<'p>, a: &Var, b: &Var) -> Var {
    let output = Tensor::new(a.shape(), a.data().iter().zip(b.data()).map(|(a, b)| a * b).collect::<Buffer<f32>>());
    let (to_a, to_b) = (a.place(), b.place());
    let (a_value, b_value) = (a.value().clone(), b.value().clone());
    g.record_from(&[a, b], output, move |dy, back| {
        let times = |other: &Tensor| dy.iter().zip(other.data()).map(|(d, o)| d * o).collect::<Buffer<f32>>();
        back.give(to_a, times(&b_value));
        back.give(to_b, times(&a_value));
    })
}

/// The score of each row of the plan: `scores[token, expert]`.
pub(super) fn row_scores<'p>(g: &Graph<'p>, scores: &Var, plan: &Plan) -> Var {
    let experts = plan.n_experts();
    pick(g, scores, experts_of_rows(plan).zip(plan.token()).map(|(e, &t)| t as usize * experts + e).collect())
}

/// The expert of each row.
pub(super) fn experts_of_rows(plan: &Plan) -> impl Iterator<Item = usize> + '_ {
    plan.offsets().windows(2).enumerate().flat_map(|(expert, bounds)| (bounds[0]..bounds[1]).map(move |_| expert))
}

/// Row weights over their token's sum, times `factor`; `of` says which rows share a sum (`rows[offsets[i]..]`).
pub(super) fn normalised<'p>(g: &Graph<'p>, weights: &Var, plan: &Rc<Plan>, factor: f32) -> Var {
    let (offsets, rows) = plan.rows_of_token();
    let w = weights.data();
    let mut output = Buffer::zeroed(w.len());
    let mut sums = Vec::with_capacity(plan.n_tokens());
    for bounds in offsets.windows(2) {
        let mine = &rows[bounds[0]..bounds[1]];
        // What the papers' codes add to a sum that may be zero.
        let sum = mine.iter().map(|&row| w[row as usize]).sum::<f32>() + 1e-9;
        mine.iter().for_each(|&row| output[row as usize] = factor * w[row as usize] / sum);
        sums.push(sum);
    }
    let output = Tensor::new(&[w.len()], output);
    let (to_weights, plan, y) = (weights.place(), plan.clone(), output.clone());
    g.record_from(&[weights], output, move |mut dy, back| {
        let (offsets, rows) = plan.rows_of_token();
        for (bounds, sum) in offsets.windows(2).zip(sums) {
            let mine = &rows[bounds[0]..bounds[1]];
            let mean: f32 = mine.iter().map(|&row| dy[row as usize] * y.data()[row as usize]).sum();
            mine.iter().for_each(|&row| dy[row as usize] = (factor * dy[row as usize] - mean) / sum);
        }
        back.give(to_weights, dy);
    })
}

/// Each row of x `[rows, cols]` times its factor `[rows]`.
pub(crate) fn scale_rows<'p>(g: &Graph<'p>, x: &Var, factors: &Var) -> Result<Var, MoeError> {
    let [rows, cols] = x.dims()?;
    if factors.shape() != [rows] {
        let (wanted, found) = (vec![rows], factors.shape().to_vec());
        return Err(TensorError::Shape { what: "factors of rows", wanted, found }.into());
    }
    let scaled =
        move |f: &[f32], x: &[f32]| -> Buffer<f32> { x.iter().enumerate().map(|(i, x)| x * f[i / cols]).collect() };
    let output = Tensor::new(&[rows, cols], scaled(factors.data(), x.data()));
    let (to_x, to_factors, x, f) = (x.place(), factors.place(), x.clone(), factors.value().clone());
    Ok(g.record_from(&[&x.clone(), factors], output, move |dy, back| {
        let dots = dy.chunks_exact(cols).zip(x.data().chunks_exact(cols));
        let dots: Buffer<f32> = dots.map(|(d, x)| d.iter().zip(x).map(|(d, x)| d * x).sum()).collect();
        back.give(to_factors, dots);
        back.give(to_x, scaled(f.data(), &dy));
    }))
}

/// A loss whose slopes are known when it is made.
pub(super) fn scalar<'p>(g: &Graph<'p>, value: f64, slopes: Vec<(&Var, Vec<f32>)>) -> Var {
    let vars: Vec<&Var> = slopes.iter().map(|(var, _)| *var).collect();
    let output = Tensor::scalar(value as f32);
    let slopes: Vec<_> = slopes.iter().map(|(var, slopes)| (var.place(), slopes.clone())).collect();
    g.record_from(&vars, output, move |dloss, back| {
        for (place, slopes) in slopes {
            back.give(place, slopes.into_iter().map(|slope| slope * dloss[0]).collect::<Buffer<f32>>());
        }
    })
}

/// CV² = population variance over squared mean (Shazeer et al. 2017, eq. 7), and its slopes.
pub(super) fn squared_variation(values: &[f64]) -> (f64, Vec<f64>) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    let square = mean * mean + 1e-10;
    let slopes = values.iter().map(|v| 2.0 * (v - mean) / (n * square) - 2.0 * variance * mean / (n * square * square));
    (variance / square, slopes.collect())
}

/// The normal distribution function and its density; the first to about 1e-7 (Abramowitz and Stegun 7.1.26).
pub(super) fn normal(x: f64) -> (f64, f64) {
    let density = (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
    let z = x.abs() / std::f64::consts::SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let series =
        t * (0.254_829_592 + t * (-0.284_496_736 + t * (1.421_413_741 + t * (-1.453_152_027 + t * 1.061_405_429))));
    let half = 0.5 * series * (-z * z).exp();
    (if x >= 0.0 { 1.0 - half } else { half }, density)
}
