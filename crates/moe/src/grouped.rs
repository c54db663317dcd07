//! The steps of a layer of experts one by one, for experts that are no SwiGLU networks: a projection for each expert, and
//! the weighted sum of what a token's experts answer. [`ExpertBank`](crate::ExpertBank) does all of it at once.

use crate::{MoeError, Plan};
use moebius_kernels::gemm::{Beta, Mat, grouped_matmul, grouped_matmul_weight_gradient};
use moebius_kernels::memory::Buffer;
use moebius_kernels::select;
use moebius_tensor::{Graph, Param, Tensor, TensorError, Var};
use std::rc::Rc;

/// What the rows of a grouped projection are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Those of the tokens, taken as the plan says: x is `[tokens, in]`.
    OfTokens,
    /// Those of the plan, in its order: x is `[assignments, in]`.
    OfPlan,
}

fn check_rows(what: &'static str, x: &Var, rows: usize, width: usize) -> Result<(), TensorError> {
    if x.shape() == [rows, width] {
        return Ok(());
    }
    Err(TensorError::Shape { what, wanted: vec![rows, width], found: x.shape().to_vec() })
}

/// Each row of the plan times its expert's matrix.
///
/// # Shapes
/// x as `rows` says, weight `[experts, out, in]`, result `[assignments, out]` in the plan's order.
///
/// # Errors
/// Shapes that do not fit the plan; a weight that is held for running only while gradients are recorded.
pub fn grouped_linear<'p>(
    g: &Graph<'p>,
    x: &Var,
    rows: Rows,
    plan: &Rc<Plan>,
    weight: &'p Param,
) -> Result<Var, MoeError> {
    let [experts, out, inner] = weight.dims()?;
    let assignments = plan.n_assignments();
    if experts != plan.n_experts() {
        let (wanted, found) = (vec![plan.n_experts(), out, inner], weight.shape().to_vec());
        return Err(TensorError::Shape { what: "experts' projection", wanted, found }.into());
    }
    let n_rows = if rows == Rows::OfTokens { plan.n_tokens() } else { assignments };
    check_rows("input of the experts' projection", x, n_rows, inner)?;
    let precision = g.precision();
    let source = (rows == Rows::OfTokens).then(|| plan.token());
    let mut y = Buffer::scratch(assignments * out);
    weight.grouped_product(precision, x.data(), source, plan.offsets(), &mut y);
    let output = Tensor::new(&[assignments, out], y);
    if !g.is_recording() {
        return Ok(Var::constant(output));
    }
    weight.check_trainable()?;
    let (input, plan) = (x.clone(), plan.clone());
    Ok(g.record(output, move |dy, back| {
        let dy = Mat::new(&dy, assignments, out);
        let mut x_rows = Buffer::scratch(assignments * inner);
        match rows {
            Rows::OfTokens => select::gather_rows(input.data(), inner, plan.token(), &mut x_rows),
            Rows::OfPlan => x_rows.copy_from_slice(input.data()),
        }
        let (dweight, beta) = back.weight(weight);
        let x = Mat::new(&x_rows, assignments, inner);
        grouped_matmul_weight_gradient(precision, dy, x, plan.offsets(), dweight, beta);
        if back.wants(&input) {
            let mut dx_rows = x_rows;
            grouped_matmul(dy, plan.offsets(), weight.packed_backward(precision), &mut dx_rows, Beta::Overwrite);
            match rows {
                Rows::OfPlan => back.give(&input, dx_rows),
                Rows::OfTokens => {
                    let (offsets, of_token) = plan.rows_of_token();
                    let dx = back.sum_of(&input).expect("wanted above");
                    select::scatter_add(&dx_rows, inner, offsets, of_token, dx);
                }
            }
        }
    }))
}

/// The weighted sum of each token's rows, in slot order; zeros for a token without rows.
///
/// # Shapes
/// y `[assignments, width]` and weights `[assignments]` in the plan's order, result `[tokens, width]`.
///
/// # Errors
/// Shapes that do not fit the plan.
pub fn combine<'p>(g: &Graph<'p>, y: &Var, plan: &Rc<Plan>, weights: &Var) -> Result<Var, MoeError> {
    let [rows, width] = y.dims()?;
    check_rows("experts' answers", y, plan.n_assignments(), width)?;
    if weights.shape() != [rows] {
        let found = weights.shape().to_vec();
        return Err(TensorError::Shape { what: "experts' weights", wanted: vec![rows], found }.into());
    }
    let mut out = Buffer::scratch(plan.n_tokens() * width);
    let (offsets, of_token) = plan.rows_of_token();
    select::scatter_weighted(y.data(), width, offsets, of_token, weights.data(), &mut out);
    let (answers, weights_in, plan) = (y.clone(), weights.clone(), plan.clone());
    let output = Tensor::new(&[plan.n_tokens(), width], out);
    Ok(g.record_from(&[y, weights], output, move |d, back| {
        if back.wants(&weights_in) {
            let mut dweights = Buffer::scratch(rows);
            select::gathered_dots(&d, width, plan.token(), answers.data(), &mut dweights);
            back.give(&weights_in, dweights);
        }
        if back.wants(&answers) {
            let mut dy = Buffer::scratch(rows * width);
            select::gather_rows_weighted(&d, width, plan.token(), weights_in.data(), &mut dy);
            back.give(&answers, dy);
        }
    }))
}
