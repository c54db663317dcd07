//! Mixers that carry a state: causal convolution, selective scan, gated delta rule.
//!
//! Each takes the states of its sequences, to begin with and to leave behind; without (as in training) they begin with
//! zeros. With states nothing can be recorded: a gradient would have to flow into what was read before.

use super::rows_of;
use crate::{Graph, Param, Tensor, TensorError, Var};
use moebius_kernels::memory::Buffer;
use moebius_kernels::recurrent::convolution::{Taps, causal_convolution as convolve, causal_convolution_backward};
use moebius_kernels::recurrent::delta_rule::{
    Delta, DeltaGradients, gated_delta_rule as run_delta_rule, gated_delta_rule_backward,
};
use moebius_kernels::recurrent::selective_scan::{
    Scan, ScanGradients, selective_scan as run_scan, selective_scan_backward,
};

pub use moebius_kernels::recurrent::delta_rule::DeltaShape;

/// The states of a batch's sequences.
pub type States<'a, 's> = &'a mut [&'s mut [f32]];

fn check_states(g: &Graph<'_>, states: &[&mut [f32]]) {
    assert!(states.is_empty() || !g.is_recording(), "states are carried in inference only");
}

/// Convolution of each channel by itself over the tokens up to now, within each sequence; see
/// [`moebius_kernels::recurrent::convolution`].
///
/// # Shapes
/// x and result `[tokens, channels]`, weight `[channels, width]` or `[channels, 1, width]`, bias `[channels]`, starts
/// `[sequences + 1]`, histories `[width - 1, channels]` a sequence.
///
/// # Panics
/// If histories are given on a recording graph, or of another number or size.
pub fn causal_convolution<'p>(
    g: &Graph<'p>,
    x: &Var,
    weight: &'p Param,
    bias: Option<&'p Param>,
    starts: &[usize],
    histories: States<'_, '_>,
) -> Result<Var, TensorError> {
    check_states(g, histories);
    let (channels, width) = match *weight.shape() {
        [channels, width] | [channels, 1, width] => (channels, width),
        _ => return Err(TensorError::Rank { wanted: 2, found: weight.shape().to_vec() }),
    };
    rows_of("causal_convolution input", x, channels)?;
    let taps = move || Taps { weight: weight.value().data(), bias: bias.map(|bias| bias.value().data()), width };
    let mut y = Buffer::scratch(x.data().len());
    convolve(&taps(), x.data(), starts, histories, &mut y);
    let output = Tensor::new(x.shape(), y);
    if !g.is_recording() {
        return Ok(Var::constant(output));
    }
    let (input, starts) = (x.clone(), starts.to_vec());
    Ok(g.record(output, move |dy, back| {
        let mut dx = Buffer::scratch(dy.len());
        let mut dweight = Buffer::zeroed(channels * width);
        let mut dbias = Buffer::zeroed(bias.map_or(0, Param::n_elements));
        causal_convolution_backward(&taps(), &dy, input.data(), &starts, &mut dx, &mut dweight, &mut dbias);
        back.give(&input, dx);
        back.give_weight(weight, dweight);
        if let Some(bias) = bias {
            back.give_weight(bias, dbias);
        }
    }))
}

/// What [`selective_scan`] reads, apart from its weight.
#[derive(Clone, Debug)]
pub struct ScanInputs {
    /// Inputs `[tokens, channels]`.
    pub u: Var,
    /// Step sizes `[tokens, channels]`, not negative.
    pub delta: Var,
    /// Rates of decay `[channels, states]`, not positive.
    pub a: Var,
    /// What of the input enters the state `[tokens, states]`.
    pub b: Var,
    /// How the state is read `[tokens, states]`.
    pub c: Var,
}

/// The selective scan of Mamba (Gu and Dao 2023) over each sequence; see [`moebius_kernels::recurrent::selective_scan`].
///
/// # Shapes
/// d `[channels]`, starts `[sequences + 1]`, states `[states, channels]` a sequence, result `[tokens, channels]`.
///
/// # Panics
/// If states are given on a recording graph, or of another number or size.
pub fn selective_scan<'p>(
    g: &Graph<'p>,
    inputs: &ScanInputs,
    d: &'p Param,
    starts: &[usize],
    states: States<'_, '_>,
) -> Result<Var, TensorError> {
    check_states(g, states);
    let ([tokens, channels], [_, n_states]) = (inputs.u.dims()?, inputs.a.dims()?);
    let wanted = [
        ("scan's delta", &inputs.delta, [tokens, channels]),
        ("scan's a", &inputs.a, [channels, n_states]),
        ("scan's b", &inputs.b, [tokens, n_states]),
        ("scan's c", &inputs.c, [tokens, n_states]),
    ];
    for (what, x, wanted) in wanted {
        if x.shape() != wanted {
            return Err(TensorError::Shape { what, wanted: wanted.to_vec(), found: x.shape().to_vec() });
        }
    }
    if d.shape() != [channels] {
        return Err(TensorError::Shape { what: "scan's d", wanted: vec![channels], found: d.shape().to_vec() });
    }
    let mut y = Buffer::scratch(tokens * channels);
    run_scan(&scan_of(inputs, d, starts), states, &mut y);
    let output = Tensor::new(&[tokens, channels], y);
    if !g.is_recording() {
        return Ok(Var::constant(output));
    }
    let (inputs, starts) = (inputs.clone(), starts.to_vec());
    Ok(g.record(output, move |dy, back| {
        let ScanInputs { u, delta, a, b, c } = &inputs;
        let [mut du, mut ddelta, mut da, mut db, mut dc] = [u, delta, a, b, c].map(|x| Buffer::zeroed(x.data().len()));
        let mut dd = Buffer::zeroed(channels);
        let gradients =
            ScanGradients { u: &mut du, delta: &mut ddelta, a: &mut da, b: &mut db, c: &mut dc, d: &mut dd };
        selective_scan_backward(&scan_of(&inputs, d, &starts), &dy, gradients);
        for (x, dx) in [(u, du), (delta, ddelta), (a, da), (b, db), (c, dc)] {
            back.give(x, dx);
        }
        back.give_weight(d, dd);
    }))
}

fn scan_of<'a>(inputs: &'a ScanInputs, d: &'a Param, sequence_starts: &'a [usize]) -> Scan<'a> {
    let ScanInputs { u, delta, a, b, c } = inputs;
    Scan {
        u: u.data(),
        delta: delta.data(),
        a: a.data(),
        b: b.data(),
        c: c.data(),
        d: d.value().data(),
        sequence_starts,
    }
}

/// What [`gated_delta_rule`] reads.
#[derive(Clone, Debug)]
pub struct DeltaInputs {
    /// Queries `[tokens, key_heads * key_dim]`.
    pub q: Var,
    /// Keys, as queries.
    pub k: Var,
    /// Values `[tokens, value_heads * value_dim]`.
    pub v: Var,
    /// Logarithms of what is kept of the state `[tokens, value_heads]`, not positive.
    pub log_decay: Var,
    /// How much the state gives way `[tokens, value_heads]`.
    pub beta: Var,
}

/// The gated delta rule (Yang et al. 2024) over each sequence; see [`moebius_kernels::recurrent::delta_rule`].
///
/// # Shapes
/// starts `[sequences + 1]`, states `[value_heads, key_dim, value_dim]` a sequence, result as the values.
///
/// # Panics
/// If states are given on a recording graph, or of another number or size.
pub fn gated_delta_rule<'p>(
    g: &Graph<'p>,
    shape: &DeltaShape,
    inputs: &DeltaInputs,
    starts: &[usize],
    states: States<'_, '_>,
) -> Result<Var, TensorError> {
    check_states(g, states);
    let [tokens, _] = inputs.v.dims()?;
    let (keys, values, heads) = (shape.key_width(), shape.value_width(), shape.value_heads);
    let wanted = [
        ("delta rule's queries", &inputs.q, keys),
        ("delta rule's keys", &inputs.k, keys),
        ("delta rule's values", &inputs.v, values),
        ("delta rule's decays", &inputs.log_decay, heads),
        ("delta rule's betas", &inputs.beta, heads),
    ];
    for (what, x, width) in wanted {
        if rows_of(what, x, width)? != tokens {
            return Err(TensorError::Shape { what, wanted: vec![tokens, width], found: x.shape().to_vec() });
        }
    }
    let mut out = Buffer::scratch(tokens * values);
    run_delta_rule(&delta_of(shape, inputs, starts), states, &mut out);
    let DeltaInputs { q, k, v, log_decay, beta } = inputs;
    let (shape, saved, starts) = (*shape, inputs.clone(), starts.to_vec());
    Ok(g.record_from(&[q, k, v, log_decay, beta], Tensor::new(&[tokens, values], out), move |dout, back| {
        let DeltaInputs { q, k, v, log_decay, beta } = &saved;
        let [mut dq, mut dk, mut dv, mut dlog_decay, mut dbeta] =
            [q, k, v, log_decay, beta].map(|x| Buffer::zeroed(x.data().len()));
        let gradients =
            DeltaGradients { q: &mut dq, k: &mut dk, v: &mut dv, log_decay: &mut dlog_decay, beta: &mut dbeta };
        gated_delta_rule_backward(&delta_of(&shape, &saved, &starts), &dout, gradients);
        for (x, dx) in [(q, dq), (k, dk), (v, dv), (log_decay, dlog_decay), (beta, dbeta)] {
            back.give(x, dx);
        }
    }))
}

fn delta_of<'a>(shape: &DeltaShape, inputs: &'a DeltaInputs, sequence_starts: &'a [usize]) -> Delta<'a> {
    let DeltaInputs { q, k, v, log_decay, beta } = inputs;
    Delta {
        shape: *shape,
        q: q.data(),
        k: k.data(),
        v: v.data(),
        log_decay: log_decay.data(),
        beta: beta.data(),
        sequence_starts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_gradients, check_gradients_with_params, random};

    const STARTS: [usize; 3] = [0, 4, 6];

    /// Numbers moved to where an operation may take them.
    fn moved(x: &Tensor, to: impl Fn(f32) -> f32) -> Tensor {
        Tensor::new(x.shape(), x.data().iter().map(|&x| to(x)).collect::<Vec<_>>())
    }

    #[test]
    fn gradients_of_the_convolution_match_finite_differences() {
        let inputs = [random(&[6, 5], 1)];
        for shape in [&[5, 3][..], &[5, 1, 3]] {
            check_gradients_with_params(&inputs, &[random(shape, 2), random(&[5], 3)], |g, x, w| {
                causal_convolution(g, &x[0], &w[0], Some(&w[1]), &STARTS, &mut []).unwrap()
            });
        }
        check_gradients_with_params(&inputs, &[random(&[5, 4], 2)], |g, x, w| {
            causal_convolution(g, &x[0], &w[0], None, &STARTS, &mut []).unwrap()
        });
    }

    #[test]
    fn gradients_of_the_scan_match_finite_differences() {
        let inputs = [
            random(&[6, 5], 1),
            moved(&random(&[6, 5], 2), |x| 0.5 + 0.1 * x),
            moved(&random(&[5, 3], 3), |x| -1.0 + 0.2 * x),
            random(&[6, 3], 4),
            random(&[6, 3], 5),
        ];
        check_gradients_with_params(&inputs, &[random(&[5], 6)], |g, x, w| {
            let [u, delta, a, b, c] = std::array::from_fn(|i| x[i].clone());
            selective_scan(g, &ScanInputs { u, delta, a, b, c }, &w[0], &STARTS, &mut []).unwrap()
        });
    }

    #[test]
    fn gradients_of_the_delta_rule_match_finite_differences() {
        let shape = DeltaShape { key_heads: 1, value_heads: 2, key_dim: 3, value_dim: 4 };
        let inputs = [
            moved(&random(&[6, 3], 1), |x| 0.5 * x),
            moved(&random(&[6, 3], 2), |x| 0.5 * x),
            random(&[6, 8], 3),
            moved(&random(&[6, 2], 4), |x| -0.5 + 0.1 * x),
            moved(&random(&[6, 2], 5), |x| 0.5 + 0.1 * x),
        ];
        check_gradients(&inputs, |g, x| {
            let [q, k, v, log_decay, beta] = std::array::from_fn(|i| x[i].clone());
            gated_delta_rule(g, &shape, &DeltaInputs { q, k, v, log_decay, beta }, &STARTS, &mut []).unwrap()
        });
    }
}
