//! [`HeadBank`]: attention heads as experts (Zhang et al. 2022, "Mixture of Attention Heads: Selecting Attention Heads Per
//! Token"; Shen et al. 2024, "JetMoE"). An expert is a pair of projections, to queries and from what they read; keys and
//! values are everybody's.

use crate::grouped::{Rows, combine, grouped_linear};
use crate::{MoeError, Plan};
use moebius_kernels::memory::Buffer;
use moebius_tensor::{Graph, Param, Tensor, TensorError, Var};
use std::ops::Range;
use std::rc::Rc;

/// Query and output projections of all experts.
#[derive(Debug)]
pub struct HeadBank {
    query: Param,
    output: Param,
    n_kv_heads: usize,
}

impl HeadBank {
    /// A bank from its weights; an expert's query heads are as many as there are key heads.
    ///
    /// # Shapes
    /// query `[experts, n_kv_heads * head_dim, hidden]`, output `[experts, hidden, n_kv_heads * head_dim]`.
    ///
    /// # Errors
    /// Shapes that do not go together.
    pub fn new(query: Param, output: Param, n_kv_heads: usize) -> Result<Self, MoeError> {
        let [experts, width, hidden] = query.dims()?;
        if output.shape() != [experts, hidden, width] || n_kv_heads == 0 || !width.is_multiple_of(n_kv_heads) {
            let (wanted, found) = (vec![experts, hidden, width], output.shape().to_vec());
            return Err(TensorError::Shape { what: "attention experts' output", wanted, found }.into());
        }
        Ok(Self { query, output, n_kv_heads })
    }

    /// Its weights.
    pub fn params(&self) -> Vec<&Param> {
        vec![&self.query, &self.output]
    }

    /// Its weights, to be changed.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        vec![&mut self.query, &mut self.output]
    }

    /// The query heads of each token's experts, those that share a key head side by side.
    ///
    /// # Shapes
    /// x `[tokens, hidden]`, result `[tokens, n_kv_heads * k * head_dim]`, where the plan has k rows for each token.
    ///
    /// # Errors
    /// Shapes that do not fit the plan.
    pub fn queries<'p>(&'p self, g: &Graph<'p>, x: &Var, plan: &Rc<Plan>) -> Result<Var, MoeError> {
        let rows = grouped_linear(g, x, Rows::OfTokens, plan, &self.query)?;
        self.rearranged(g, &rows, plan, Direction::ToHeads)
    }

    /// What the experts make of what their heads have read, summed by the router's weights.
    ///
    /// # Shapes
    /// attended as the queries, weights `[assignments]` in the plan's order, result `[tokens, hidden]`.
    ///
    /// # Errors
    /// Shapes that do not fit the plan.
    pub fn outputs<'p>(
        &'p self,
        g: &Graph<'p>,
        attended: &Var,
        plan: &Rc<Plan>,
        weights: &Var,
    ) -> Result<Var, MoeError> {
        let rows = self.rearranged(g, attended, plan, Direction::ToRows)?;
        combine(g, &grouped_linear(g, &rows, Rows::OfPlan, plan, &self.output)?, plan, weights)
    }

    /// Between rows of experts `[assignments, n_kv_heads * head_dim]` and heads of tokens.
    fn rearranged<'p>(&self, g: &Graph<'p>, x: &Var, plan: &Rc<Plan>, direction: Direction) -> Result<Var, MoeError> {
        let width = self.query.shape()[1];
        let (tokens, rows) = (plan.n_tokens(), plan.n_assignments());
        let k = rows / tokens.max(1);
        let (in_rows, in_heads) = ([rows, width], [tokens, k * width]);
        let (from, to) = if direction == Direction::ToHeads { (in_rows, in_heads) } else { (in_heads, in_rows) };
        if x.shape() != from {
            let (wanted, found) = (from.to_vec(), x.shape().to_vec());
            return Err(TensorError::Shape { what: "attention experts' rows", wanted, found }.into());
        }
        let arrangement = Arrangement { plan: plan.clone(), k, n_kv_heads: self.n_kv_heads, width };
        let output = Tensor::new(&to, arrangement.moved(x.data(), direction));
        let to_x = x.place();
        Ok(g.record_from(&[x], output, move |d, back| back.give(to_x, arrangement.moved(&d, direction.back()))))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToHeads,
    ToRows,
}

impl Direction {
    fn back(self) -> Self {
        match self {
            Self::ToHeads => Self::ToRows,
            Self::ToRows => Self::ToHeads,
        }
    }
}

/// Which head of which expert's row is which head of which token.
struct Arrangement {
    plan: Rc<Plan>,
    /// Experts of a token.
    k: usize,
    n_kv_heads: usize,
    /// Numbers of an expert's row.
    width: usize,
}

impl Arrangement {
    /// Each head's place among the rows, and among the tokens.
    fn places(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let head_dim = self.width / self.n_kv_heads;
        let place = move |head: usize| head * head_dim..(head + 1) * head_dim;
        self.plan.rows_of_token().1.iter().enumerate().flat_map(move |(at, &row)| {
            let (token, slot) = (at / self.k, at % self.k);
            (0..self.n_kv_heads).map(move |head| {
                (place(row as usize * self.n_kv_heads + head), place((token * self.n_kv_heads + head) * self.k + slot))
            })
        })
    }

    fn moved(&self, x: &[f32], direction: Direction) -> Buffer<f32> {
        let mut out = Buffer::scratch(x.len());
        for (row, head) in self.places() {
            let (from, to) = if direction == Direction::ToHeads { (row, head) } else { (head, row) };
            out[to].copy_from_slice(&x[from]);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moebius_kernels::gemm::Precision;
    use moebius_tensor::{Gradients, Rng};
    use moebius_testkit::check_gradient;

    const TOKENS: usize = 3;

    fn random(shape: &[usize], seed: u64) -> Tensor {
        let mut data = vec![0.0; shape.iter().product()];
        Rng::new(seed).fill_normal(&mut data, 1.0);
        Tensor::new(shape, data)
    }

    /// Three experts of two heads of two.
    fn bank(weights: &[Tensor; 2]) -> HeadBank {
        let [query, output] = weights;
        HeadBank::new(Param::new(0, "q", query.clone()), Param::new(1, "o", output.clone()), 2).unwrap()
    }

    fn plan() -> Rc<Plan> {
        Rc::new(Plan::from_choices(3, 2, &[2, 0, 0, 1, 1, 2]).unwrap())
    }

    fn forward<'p>(bank: &'p HeadBank, g: &Graph<'p>, x: &Var, weights: &Var) -> Var {
        let heads = bank.queries(g, x, &plan()).unwrap();
        bank.outputs(g, &heads, &plan(), weights).unwrap()
    }

    #[test]
    fn heads_that_share_a_key_stand_together() {
        // One feature a head; expert e's head h gives 10 e + h of a token that is one.
        let query = Tensor::new(&[3, 2, 1], vec![0.0, 1.0, 10.0, 11.0, 20.0, 21.0]);
        let bank = bank(&[query, Tensor::zeros(&[3, 1, 2])]);
        let g = Graph::inference(Precision::F32);
        let heads = bank.queries(&g, &Var::constant(Tensor::new(&[TOKENS, 1], vec![1.0; TOKENS])), &plan()).unwrap();
        let wanted = [20.0, 0.0, 21.0, 1.0, 0.0, 10.0, 1.0, 11.0, 10.0, 20.0, 11.0, 21.0];
        assert_eq!((heads.shape(), heads.data()), (&[TOKENS, 4][..], &wanted[..]));
    }

    #[test]
    fn gradients_match_finite_differences() {
        let weights = [random(&[3, 4, 5], 1), random(&[3, 5, 4], 2)];
        let (x, shares, direction) = (random(&[TOKENS, 5], 3), random(&[6], 4), random(&[TOKENS * 5], 5));
        let value = |weights: &[Tensor; 2], x: &Tensor, shares: &Tensor| -> f64 {
            let (bank, g) = (bank(weights), Graph::inference(Precision::F32));
            let y = forward(&bank, &g, &Var::constant(x.clone()), &Var::constant(shares.clone()));
            y.data().iter().zip(direction.data()).map(|(&y, &d)| f64::from(y) * f64::from(d)).sum()
        };
        let (bank, g, mut gradients) = (bank(&weights), Graph::training(Precision::F32), Gradients::new());
        let (leaf, of_shares) = (g.variable(x.clone()), g.variable(shares.clone()));
        let y = forward(&bank, &g, &leaf, &of_shares);
        let leaves = g.backward_from(&[(&y, direction.data())], &mut gradients);
        let at = |like: &Tensor, data: &[f32]| Tensor::new(like.shape(), data.to_vec());
        check_gradient("x", x.data(), leaves.get(&leaf).unwrap(), |to| value(&weights, &at(&x, to), &shares));
        check_gradient("weights", shares.data(), leaves.get(&of_shares).unwrap(), |to| {
            value(&weights, &x, &at(&shares, to))
        });
        for id in 0..2 {
            check_gradient("projection", weights[id].data(), gradients.get(id).unwrap(), |to| {
                let mut moved = weights.clone();
                moved[id] = at(&weights[id], to);
                value(&moved, &x, &shares)
            });
        }
    }
}
